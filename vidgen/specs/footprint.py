"""The sizes that a family's memory follows from: numbers, not bytes. Standard library only.

A family's `footprint.py` fills one in for a request. Refuses to know dtypes, GPUs, gangs and what fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Tiling = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Footprint:
    """How many numbers are alive in the transformer and in the decoder, for one item.

    `tokens` of the video are divided among the ranks of a gang, `text` beside them (joint attention) are not; each has
    `token` numbers at the fullest moment of a block, of which the attention's queries, keys or values are `width`.
    `kept` are the numbers made once a prompt (keys and values of cross-attention), `branches` the forwards a step,
    `latents` the numbers of the latents. Decoding takes `work` numbers a pixel of the tile in hand (its convolutions'
    buffers included) and holds `held` a pixel of every tile from one chunk of `frames` to the next.
    """

    tokens: int
    width: int
    token: float
    branches: int
    latents: int
    frames: int
    work: float
    held: float = 0.0
    kept: int = 0
    text: int = 0


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of a picture: pixels of the largest tile, pixels of all tiles with their overlaps, and how many there are."""

    largest: int
    total: int
    count: int


def tiles(height: int, width: int, tiling: Tiling | None) -> Tiles:
    """The tiles that `vidgen.nn.tiling.split` cuts, in pixels; the picture itself without tiling, and where it fits
    one."""
    if tiling is None or (height <= tiling[0] and width <= tiling[1]):
        return Tiles(height * width, height * width, 1)
    rows = [min(tiling[0], height - start) for start in range(0, height, tiling[2])]
    columns = [min(tiling[1], width - start) for start in range(0, width, tiling[3])]
    return Tiles(max(rows) * max(columns), sum(rows) * sum(columns), len(rows) * len(columns))


def latents(channels: int, *grid: int) -> int:
    """Numbers of latents of these channels on this grid."""
    return channels * math.prod(grid)
