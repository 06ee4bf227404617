"""Context parallelism as an argument: one clip's tokens spread over the GPUs of a gang.

A transformer calls it at three visible places: `shard` after patchify, `to_heads` / `to_tokens` around attention,
`gather` before unpatchify. At size 1 each of them is the identity. Refuses to know any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class ContextParallel(Protocol):
    """What a transformer asks of its gang. Tokens are dimension 1 of every tensor that is passed in."""

    @property
    def size(self) -> int:
        """Ranks that share one clip."""

    def shard(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> this rank's tokens [B, n, ...]; n may differ by one between ranks."""

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """This rank's [B, n, ...] -> all `tokens` of the clip [B, N, ...], on every rank."""

    def to_heads(self, x: Tensor) -> Tensor:
        """[B, n, heads, d] -> [B, N, heads / size, d]: all tokens of this rank's heads."""

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, N, heads / size, d] -> [B, n, heads, d]: the way back."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One rank that holds the whole clip: no collective."""

    size: int = 1

    def shard(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        return x

    def to_heads(self, x: Tensor) -> Tensor:
        return x

    def to_tokens(self, x: Tensor) -> Tensor:
        return x


IDENTITY: ContextParallel = Identity()
