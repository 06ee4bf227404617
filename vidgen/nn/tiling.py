"""Overlapping tiles of the last two dimensions: cut, worked on by one rank or by several, and put together again with
linear seams.

Refuses to know what is done to a tile in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vidgen.parallel import ALONE, Ranks


def split(x: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> list[list[Tensor]]:
    """Rows of tiles of at most `size`, one every `stride`; those at the end are cut off by the border."""
    return [
        [x[..., i : i + size[0], j : j + size[1]] for j in range(0, x.shape[-1], stride[1])]
        for i in range(0, x.shape[-2], stride[0])
    ]


def in_step(
    tiles: list[list[Tensor]], streams: Sequence[Sequence[Iterator[Tensor]]], ranks: Ranks = ALONE
) -> Iterator[list[list[Tensor]]]:
    """What is made of `tiles` (rows of [..., h, w]), a stream of results each: the next result of all of them, again
    and again until they end, together. A result is as large to its tile as every other.

    Ranks take turns at the tiles, and each runs the streams of its own alone; all results come out at rank 0, and none
    elsewhere. One tile is rank 0's.
    """
    sizes = [tile.shape[-2:] for row in tiles for tile in row]
    every = [stream for row in streams for stream in row]
    own = range(ranks.rank, len(every), ranks.size)
    for results in zip(*(every[index] for index in own), strict=True):
        *like, height, width = results[0].shape
        rows, columns = sizes[own[0]]
        shapes = [(*like, h * height // rows, w * width // columns) for h, w in sizes]
        found = ranks.collect(dict(zip(own, results, strict=True)), shapes)
        if found is not None:
            taken = iter(found)
            yield [[next(taken) for _ in row] for row in tiles]


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
