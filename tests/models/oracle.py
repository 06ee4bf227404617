"""A family's whole pipeline beside its oracle, diffusers': the frames of ours, and how far the two may lie apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vidgen import engine
from vidgen.loop import Loop
from vidgen.types import Request

STAGE = 1e-4
"""fp32 on both sides; sums in another order."""
WHOLE = 1e-3
"""A few guided steps multiply the stages' rounding. Frames lie in [0, 1]."""

Build = Callable[..., Path]
"""What the fixture `build` gives: options of a tiny checkpoint -> its folder."""


def opened(pipeline: Any, folder: Path, **options: Any) -> Any:
    """The oracle of this class on a checkpoint."""
    pipe = pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(loaded: engine.Engine, *requests: Request) -> list[np.ndarray]:
    """Frames of each video, uint8 [F, H, W, 3]."""
    return [np.concatenate(list(video.chunks)) for video in loaded.generate(requests)]


def native(loaded: engine.Engine) -> Any:
    """The family's pipeline inside an engine."""
    assert isinstance(loaded.backend, Loop)
    return loaded.backend.pipeline


def assert_same_frames(uint8: np.ndarray, floats: np.ndarray) -> None:
    """Ours are the oracle's, whose frames lie in [0, 1]."""
    assert uint8.shape == floats.shape
    assert floats.std() > 20 * WHOLE, "the oracle's frames are flat, so that they would prove nothing"
    # 0.5 is the rounding to uint8.
    assert np.abs(uint8.astype(np.float64) - floats * 255).max() <= 0.5 + WHOLE * 255
