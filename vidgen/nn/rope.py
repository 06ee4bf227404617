"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) over a grid of positions, in neighbouring pairs.

Refuses to know how a model divides its head size among the axes of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def grid_rope(sizes: tuple[int, ...], dims: tuple[int, ...], theta: float, device: torch.device) -> Rope:
    """(cos, sin) of a grid, flattened row by row: each [1, N, 1, d / 2] in fp32, from angles in float64.

    `sizes` are the positions along each axis, `dims` the even number of channels that encode it; d is their sum.
    """
    angles = []
    for axis, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        position = torch.arange(size, dtype=torch.float64, device=device)
        shape = [1] * len(sizes)
        shape[axis] = size
        angle = torch.outer(position, 1.0 / theta**exponent).view(*shape, -1)
        angles.append(angle.expand(*sizes, -1))
    grid = torch.cat(angles, dim=-1).flatten(0, len(sizes) - 1)[None, :, None]
    return grid.cos().float(), grid.sin().float()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, N, h, d] with each pair (x[2i], x[2i + 1]) turned by its angle; in fp32 with one rounding."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
