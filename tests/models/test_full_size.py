"""Checkpoints of published size with random weights, but for most of their layers: they open, and are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import full_size
from tests.models.case import native_families
from tests.models.published import find
from vidgen.parity import compare
from vidgen.types import ModelSettings

SMALL = {
    "Wan 1.3B": {"height": 32, "width": 32, "num_frames": 5},
    "LTX 2B 0.9.0": {"height": 64, "width": 64, "num_frames": 9},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_one_layer_of_a_published_size_agrees_with_diffusers(name: str, tmp_path: Path) -> None:
    full_size.write(name, tmp_path, dtype=torch.float32, layers=1)
    settings = ModelSettings(checkpoint=str(tmp_path), family="auto", dtype="float32", device="cpu")
    report = compare(settings, {**SMALL[name], "num_inference_steps": 2})
    assert report.ok, report.stages


def test_every_native_family_has_a_published_checkpoint_and_an_unknown_one_is_named() -> None:
    assert {
        find(name)[0] for name in ("Wan 1.3B", "LTX 2B 0.9.0", "CogVideoX-2b", "HunyuanVideo", "Mochi", "Allegro")
    } == {*native_families()}
    with pytest.raises(KeyError, match="'Sora' is no published checkpoint; known: Allegro, "):
        find("Sora")
