"""Overlapping tiles of the last two dimensions: cut, and put together again with linear seams.

Refuses to know what is done to a tile in between.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(x: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> list[list[Tensor]]:
    """Rows of tiles of at most `size`, one every `stride`; those at the end are cut off by the border."""
    return [
        [x[..., i : i + size[0], j : j + size[1]] for j in range(0, x.shape[-1], stride[1])]
        for i in range(0, x.shape[-2], stride[0])
    ]


def merge(rows: list[list[Tensor]], overlap: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The tiles as one tensor of `size`: each fades in over its upper and left neighbour, as they came out of it."""
    blended: list[list[Tensor]] = []
    for i, row in enumerate(rows):
        blended.append([])
        for j, tile in enumerate(row):
            if i > 0:
                tile = _fade(blended[i - 1][j], tile, overlap[0], dim=-2)
            if j > 0:
                tile = _fade(blended[i][j - 1], tile, overlap[1], dim=-1)
            blended[i].append(tile)
    kept = [torch.cat([tile[..., : stride[0], : stride[1]] for tile in row], dim=-1) for row in blended]
    return torch.cat(kept, dim=-2)[..., : size[0], : size[1]]


def _fade(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    extent = min(before.shape[dim], tile.shape[dim], extent)
    weight = torch.arange(extent, dtype=tile.dtype, device=tile.device) / max(extent, 1)
    weight = weight.unsqueeze(-1) if dim == -2 else weight
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new = tile.narrow(dim, 0, extent)
    rest = tile.narrow(dim, extent, tile.shape[dim] - extent)
    return torch.cat([old * (1 - weight) + new * weight, rest], dim=dim)
