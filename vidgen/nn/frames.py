"""What a decoder gives out, as frames. Refuses to know any decoder."""

from __future__ import annotations

from torch import Tensor


def shown(chunk: Tensor) -> Tensor:
    """A decoder's [1, 3, n, H, W] in [-1, 1], of any dtype -> frames [n, H, W, 3] in [0, 1], fp32."""
    return (chunk[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
