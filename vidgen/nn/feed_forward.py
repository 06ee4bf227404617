"""The feed-forward of a transformer's block, under the names that checkpoints have: net.0.proj and net.2."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


class Activated(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))


class FeedForward(nn.Module):
    """[..., width] -> `inner` features, activated -> [..., out], which is `width` by default."""

    def __init__(
        self, width: int, inner: int, out: int | None = None, activation: Callable[[Tensor], Tensor] = gelu
    ) -> None:
        super().__init__()
        # The checkpoint counts a dropout between the two.
        self.net = nn.Sequential(Activated(width, inner, activation), nn.Identity(), nn.Linear(inner, out or width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
