"""What the tests of a family's networks begin with."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.oracle import Build


@pytest.fixture(scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Writes a checkpoint with the `tiny_checkpoint.py` beside the test's module, once for the same options."""
    tiny = importlib.import_module(f"{request.module.__package__}.tiny_checkpoint")
    made: dict[str, Path] = {}

    def once(*kind: str, **options: Any) -> Path:
        key = repr((kind, sorted(options.items())))
        if key not in made:
            made[key] = tiny.build(tmp_path_factory.mktemp("checkpoint"), *kind, **options)
        return made[key]

    return once
