"""What a native family's `tiny_checkpoint.py` offers to the tests that run over every family."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidgen import family


@dataclass(frozen=True)
class Case:
    """A tiny random checkpoint and a request that it can do.

    `write` puts the checkpoint into a folder, in the Diffusers layout. `sampling` overrides the family's defaults.
    `media` are given beside those that the task cannot do without. `causal`: no frame depends on a later latent frame.
    `pipeline` is the diffusers class that is the oracle, where it is not the one that model_index.json names.
    """

    task: str
    write: Callable[[Path], None]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[str, ...] = ()
    causal: bool = True
    pipeline: str | None = None


def native_families() -> list[str]:
    """Families with weights and a pipeline of their own."""
    return [name for name in family.families() if importlib.util.find_spec(f"vidgen.models.{name}.pipeline")]


def cases() -> dict[str, Case]:
    """Every case of every native family, as `family/name`."""
    found = {}
    for name in native_families():
        module = importlib.import_module(f"tests.models.{name}.tiny_checkpoint")
        found.update({f"{name}/{case}": value for case, value in module.CASES.items()})
    return found
