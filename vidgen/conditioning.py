"""Conditioning media of a request, decoded and fitted to its size. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vidgen.errors import ItemError
from vidgen.types import Request


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Decoded conditioning media of one request, at its size: uint8 RGB [H, W, 3], and [F, H, W, 3] for the video."""

    image: np.ndarray | None = None
    last_image: np.ndarray | None = None
    video: np.ndarray | None = None


def read(request: Request) -> Conditioning:
    """ItemError names what is wrong with a medium."""
    if request.image is None and request.last_image is None and request.video is None:
        return Conditioning()
    raise ItemError("conditioning media cannot be read yet")
