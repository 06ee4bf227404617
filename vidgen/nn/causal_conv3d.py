"""Causal 3D convolution as a function of (frames, past): what came before is passed in and handed back.

Refuses to keep state: no buffer, no counter, no "first call" flag lives in a module.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """3D convolution that sees no later frame. Same padding in space, none after the last frame.

    `history` = kernel - stride frames of its input precede the frames of a call: zeros at the start of a clip,
    else the `past` that the call before handed back. Stride 2 in time eats an even number of frames a call.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        same = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, stride=(stride, 1, 1), padding=same)
        self.history = kernel[0] - stride

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [B, C, F, H, W], past [B, C, history, H, W] or None -> (y [B, C', F / stride, H, W], past)."""
        if past is None:
            x = F.pad(x, (0, 0, 0, 0, self.history, 0))
        elif self.history > 0:
            x = torch.cat([past.to(x.dtype), x], dim=2)
        # A copy: a view would keep every frame of this layer alive for as long as the cache lives.
        return super().forward(x), x[:, :, x.shape[2] - self.history :].clone()


class Causal(Protocol):
    """A layer that is a function of (frames, past)."""

    def __call__(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]: ...


class Stream:
    """Threads the pasts of a network's causal layers through one call, in the order in which the layers run.

    `cache` is None at the start of a clip, else `next` of the call before. Lives as long as one forward.
    """

    def __init__(self, cache: list[Tensor] | None) -> None:
        self._cache = cache
        self.next: list[Tensor] = []

    def __call__(self, layer: Causal | Any, x: Tensor) -> Tensor:
        past = None if self._cache is None else self._cache[len(self.next)]
        y, past = layer(x, past)
        self.next.append(past)
        return y
