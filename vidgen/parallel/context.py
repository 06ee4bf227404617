"""What code asks of the ranks it shares its work with, and the answers of a gang of one, which are the identity.

A transformer asks a `ContextParallel`, at three visible places: `shard` after patchify, the attention call, `gather`
before unpatchify. The loop asks `Ranks`. Both are arguments: there is one forward and one loop, no global state and no
patched method. Refuses to know any model, and how ranks speak to each other.

Letters: B batch, N tokens of a clip, n those of this rank, m those of its ring block, L text tokens, h heads, g
those of this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Arriving(Protocol):
    """Keys and values on their way from the rank before."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """They are here, and what this rank passed on is gone."""


class ContextParallel(Protocol):
    """Ranks that share the tokens of one clip. Tokens are dimension 1 of every tensor that is passed in.

    Ranks stand in `ring` blocks of neighbouring tokens; the ranks of a block divide the heads of its attention
    (Ulysses: Jacobs et al. 2023, arXiv 2309.14509), and keys and values go round the blocks (Ring Attention: Liu et al.
    2023, arXiv 2310.01889).
    """

    @property
    def size(self) -> int:
        """Ranks that share one clip."""

    @property
    def ring(self) -> int:
        """Blocks that keys and values go round."""

    def over(self, tokens: int) -> ContextParallel:
        """The same ranks, sharing a clip of so many tokens."""

    def shard(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> this rank's tokens [B, n, ...]; n differs by at most one between ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """This rank's [B, n, ...] -> all tokens of the clip [B, N, ...], on every rank."""

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three [B, n, h, d] -> three [B, m, g, d]: all tokens of this rank's block, of this rank's heads."""

    def own_heads(self, x: Tensor) -> Tensor:
        """[B, L, h, d] that every rank holds -> [B, L, g, d]."""

    def to_tokens(self, x: Tensor, heads: int, whole: int = 0) -> Tensor:
        """[B, m + whole, g, d] -> [B, n + whole, h, d]: the way back. The last `whole` rows are text, which every rank
        gets."""

    def pass_on(self, k: Tensor, v: Tensor, turn: int) -> Arriving:
        """Starts to give the block in hand after `turn` turns to the next rank of the ring, and to take the previous
        rank's. Both stay as they are until `wait`."""


class Ranks(Protocol):
    """Ranks that work on the same batches: each has the same latents, and rank 0 alone speaks to the world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def context(self) -> ContextParallel:
        """The ranks among which this one's share of a forward is divided."""

    def agree(self, act: Callable[[], T]) -> T:
        """What `act` returns on rank 0, on every rank; what it raises there is raised on every rank. It is called on
        rank 0 alone. Tensors come to this rank's device, or stay on the CPU."""

    def predictions(self, branches: Sequence[str], predict: Callable[[str], Tensor]) -> list[Tensor]:
        """The prediction of each branch, on every rank."""

    def collect(self, parts: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        """One tensor of each of `shapes`; part p is made by rank p % size. All of them at rank 0, None elsewhere."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One rank that holds the whole clip: no collective."""

    size: int = 1
    ring: int = 1

    def over(self, tokens: int) -> ContextParallel:
        return self

    def shard(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def own_heads(self, x: Tensor) -> Tensor:
        return x

    def to_tokens(self, x: Tensor, heads: int, whole: int = 0) -> Tensor:
        return x

    def pass_on(self, k: Tensor, v: Tensor, turn: int) -> Arriving:
        raise AssertionError("a ring of one block passes nothing on")


IDENTITY: ContextParallel = Identity()


@dataclass(frozen=True, slots=True)
class Alone:
    """One rank that does all of the work."""

    rank: int = 0
    size: int = 1
    context: ContextParallel = IDENTITY

    def agree(self, act: Callable[[], Any]) -> Any:
        return act()

    def predictions(self, branches: Sequence[str], predict: Callable[[str], Tensor]) -> list[Tensor]:
        return [predict(branch) for branch in branches]

    def collect(self, parts: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        return [parts[index] for index in range(len(shapes))]


ALONE: Ranks = Alone()
