"""A gang of processes, a GPU each (or CPUs, over gloo), and what they say to each other. The only importer of
torch.distributed.

What a block of a transformer costs, of a clip of N tokens, batch B, h heads of size d and s bytes a number, for a rank
with n tokens in a ring block of m, g of the heads, and L text tokens that take part in the attention (0 without):

| mode | collectives a block | bytes that leave a rank |
|---|---|---|
| Ulysses over U | two all-to-alls | 3 B n (h - g) d s before, B (m - n + (U - 1) L) g d s after the attention |
| ring over R | R - 1 rotations | 2 B (N - m') g d s, m' the tokens of the next rank's block |
| both | their sum | their sum |

Beside that, a forward gathers its result once. Everything is sent at its own size: uneven shares of tokens and heads
are neither padded nor masked, except in that gather, where a rank sends a row more than it has if others have one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vidgen.errors import GangError, GenerationError
from vidgen.parallel.context import IDENTITY, Arriving, ContextParallel
from vidgen.parallel.layout import Layout, shares
from vidgen.parallel.tree import put_together, take_apart

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another one's part: rank 0 may encode a long video, or compile. A rank that has died is
noticed at once where its connection breaks; who started the gang watches the rest."""


@dataclass(frozen=True, slots=True)
class Handover:
    """A block of keys and values on the way; holds what is being sent until it is gone."""

    work: list[dist.Work]
    sent: tuple[Tensor, Tensor]
    arriving: tuple[Tensor, Tensor]

    def wait(self) -> tuple[Tensor, Tensor]:
        with _peers():
            for one in self.work:
                one.wait()
        return self.arriving


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks that share one clip's tokens, seen from one of them. Implements `vidgen.parallel.ContextParallel`."""

    layout: Layout
    rank: int
    """In the gang."""
    everyone: dist.ProcessGroup | None
    block: dist.ProcessGroup | None
    """Those of the same ring block, who divide its heads."""
    around: dist.ProcessGroup | None
    """Those with the same heads in each ring block."""
    tokens: int | None = None

    @property
    def size(self) -> int:
        return self.layout.context

    @property
    def ring(self) -> int:
        return self.layout.ring

    def over(self, tokens: int) -> ContextParallel:
        return replace(self, tokens=tokens)

    def shard(self, x: Tensor) -> Tensor:
        mine = shares(x.shape[1], self.size)
        index = self.rank % self.size
        return x.narrow(1, sum(mine[:index]), mine[index])

    def gather(self, x: Tensor) -> Tensor:
        tokens = self._shares()
        rows = x.new_zeros(max(tokens), x.shape[0], *x.shape[2:])
        rows[: x.shape[1]] = x.transpose(0, 1)
        found = [torch.empty_like(rows) for _ in tokens]
        with _peers():
            dist.all_gather(found, rows, group=self.everyone)
        kept = [part[:count] for part, count in zip(found, tokens, strict=True)]
        return torch.cat(kept).transpose(0, 1)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.layout.ulysses == 1:
            return q, k, v
        batch, count, total, size = q.shape
        heads, tokens = shares(total, self.layout.ulysses), self._block(self._ring_index)
        own = heads[self._index]
        assert count == tokens[self._index], f"{count} tokens where this rank has {tokens[self._index]}"
        leaving = [3 * batch * count * part * size for part in heads]
        sent = q.new_empty(sum(leaving))
        for piece, first, part in zip(sent.split(leaving), _starts(heads), heads, strict=True):
            chosen = [x.narrow(2, first, part) for x in (q, k, v)]
            torch.stack(chosen, out=piece.view(3, batch, count, part, size))
        coming = [3 * batch * part * own * size for part in tokens]
        got = self._swap(sent, leaving, coming)
        whole = q.new_empty(3, batch, sum(tokens), own, size)
        for piece, first, part in zip(got.split(coming), _starts(tokens), tokens, strict=True):
            whole.narrow(2, first, part).copy_(piece.view(3, batch, part, own, size))
        return whole[0], whole[1], whole[2]

    def own_heads(self, x: Tensor) -> Tensor:
        heads = shares(x.shape[2], self.layout.ulysses)
        return x.narrow(2, sum(heads[: self._index]), heads[self._index])

    def to_tokens(self, x: Tensor, heads: int, whole: int = 0) -> Tensor:
        if self.layout.ulysses == 1:
            return x
        batch, rows, own, size = x.shape
        parts, tokens = shares(heads, self.layout.ulysses), self._block(self._ring_index)
        assert rows == sum(tokens) + whole, f"{rows} rows where the block has {sum(tokens)} tokens and {whole} of text"
        leaving = [batch * (part + whole) * own * size for part in tokens]
        sent = x.new_empty(sum(leaving))
        for piece, first, part in zip(sent.split(leaving), _starts(tokens), tokens, strict=True):
            chosen = [x.narrow(1, first, part), x.narrow(1, rows - whole, whole)]
            torch.cat(chosen, dim=1, out=piece.view(batch, part + whole, own, size))
        count = tokens[self._index] + whole
        coming = [batch * count * part * size for part in parts]
        got = self._swap(sent, leaving, coming)
        pieces = zip(got.split(coming), parts, strict=True)
        return torch.cat([piece.view(batch, count, part, size) for piece, part in pieces], dim=2)

    def pass_on(self, k: Tensor, v: Tensor, turn: int) -> Arriving:
        blocks, index = self.layout.ring, self._ring_index
        assert k.shape[1] == sum(self._block((index - turn) % blocks)), "the block in hand has another number of tokens"
        shape = (k.shape[0], sum(self._block((index - turn - 1) % blocks)), *k.shape[2:])
        sent, arriving = (k.contiguous(), v.contiguous()), (k.new_empty(shape), v.new_empty(shape))
        after, before = self._at((index + 1) % blocks), self._at((index - 1) % blocks)
        ops = []
        for tag in range(2):
            if sent[tag].numel():
                ops.append(dist.P2POp(dist.isend, sent[tag], after, group=self.around, tag=tag))
            if arriving[tag].numel():
                ops.append(dist.P2POp(dist.irecv, arriving[tag], before, group=self.around, tag=tag))
        with _peers():
            work = dist.batch_isend_irecv(ops) if ops else []
        return Handover(work, sent, arriving)

    @property
    def _index(self) -> int:
        return self.layout.place(self.rank)[2]

    @property
    def _ring_index(self) -> int:
        return self.layout.place(self.rank)[1]

    def _at(self, ring_index: int) -> int:
        """The rank of the gang with this one's heads in another block."""
        return self.rank + (ring_index - self._ring_index) * self.layout.ulysses

    def _shares(self) -> list[int]:
        """Tokens of every rank."""
        assert self.tokens is not None, "a transformer says `cp.over(tokens)` before it shards"
        return shares(self.tokens, self.size)

    def _block(self, ring_index: int) -> list[int]:
        """Tokens of every rank of a ring block."""
        return self._shares()[ring_index * self.layout.ulysses : (ring_index + 1) * self.layout.ulysses]

    def _swap(self, sent: Tensor, leaving: list[int], coming: list[int]) -> Tensor:
        got = sent.new_empty(sum(coming))
        with _peers():
            dist.all_to_all_single(got, sent, coming, leaving, group=self.block)
        return got


@dataclass
class Gang:
    """The processes of one gang, seen from one of them. Implements `vidgen.parallel.Ranks`.

    An error that all ranks meet alike (latents that are not finite, a cancelled batch, what `agree` carries) leaves the
    gang usable. One that a rank meets alone (out of memory) leaves the others waiting: whoever started the gang ends
    all of it.
    """

    rank: int
    layout: Layout
    device: torch.device
    context: ContextParallel
    _opposite: dist.ProcessGroup | None = field(repr=False)
    """This rank and the one that predicts the other branch from the same tokens."""

    @property
    def size(self) -> int:
        return self.layout.size

    @property
    def first(self) -> bool:
        """Whether this rank speaks to the world."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Rank 0's value (see `vidgen.parallel.tree`), on every rank."""
        return self.agree(lambda: value)

    def agree(self, act: Callable[[], T]) -> T:
        if not self.first:
            return self._told()
        try:
            value = act()
            description, tensors = take_apart(value)
        except Exception as error:
            self._tell((False, _portable(error)))
            raise
        self._tell((True, (description, [(x.shape, x.dtype, x.device.type == "cpu") for x in tensors])))
        for x in tensors:
            self._spread(x.contiguous())
        return value

    def predictions(self, branches: Sequence[str], predict: Callable[[str], Tensor]) -> list[Tensor]:
        if self.layout.cfg == 1 or len(branches) == 1:
            return [predict(branch) for branch in branches]
        own = predict(branches[self.layout.place(self.rank)[0]]).contiguous()
        found = [torch.empty_like(own) for _ in branches]
        with _peers():
            dist.all_gather(found, own, group=self._opposite)
        return found

    def collect(self, parts: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        whole = {index: part.contiguous() for index, part in parts.items()}
        assert all(tuple(part.shape) == tuple(shapes[index]) for index, part in whole.items()), "parts of other shapes"
        if self.first:
            like = next(iter(whole.values()))
            others = {index: like.new_empty(shapes[index]) for index in range(len(shapes)) if index not in whole}
            ops = [dist.P2POp(dist.irecv, part, index % self.size, tag=index) for index, part in others.items()]
        else:
            others = {}
            ops = [dist.P2POp(dist.isend, part, 0, tag=index) for index, part in whole.items()]
        with _peers():
            for work in dist.batch_isend_irecv(ops) if ops else []:
                work.wait()
        return [{**whole, **others}[index] for index in range(len(shapes))] if self.first else None

    def close(self) -> None:
        """Leaves the gang; every rank does, or is gone."""
        dist.destroy_process_group()

    def _tell(self, message: Any) -> None:
        with _peers():
            dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    def _told(self) -> Any:
        box: list[Any] = [None]
        with _peers():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        fine, content = box[0]
        if not fine:
            raise content
        description, kinds = content
        tensors = [torch.empty(shape, dtype=dtype, device="cpu" if cpu else self.device) for shape, dtype, cpu in kinds]
        for x in tensors:
            self._spread(x)
        return put_together(description, tensors)

    def _spread(self, x: Tensor) -> None:
        """As bytes, since not every backend knows every dtype."""
        if x.numel():
            with _peers():
                dist.broadcast(x.view(-1).view(torch.uint8), src=0)


def join(rank: int, layout: Layout, address: str, port: int, *, device: str, timeout: float) -> Gang:
    """Takes a place in a gang; returns once all of `layout.size` ranks have. Rank 0 listens at `address` and `port`.

    Ranks on GPUs speak NCCL (small things that live on the CPU: gloo), ranks on the CPU gloo. `device` is cpu, cuda or
    cuda:N. A process is in one gang at a time. GangError if they have not met within `timeout` seconds.
    """
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        store, *_ = next(rendezvous(f"tcp://{address}:{port}", rank, layout.size, timeout=limit))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(layout.size)], limit)
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=layout.size, timeout=PATIENCE)
    except (RuntimeError, OSError) as error:
        raise GangError(
            f"rank {rank} of {layout.size} did not meet the others at {address}:{port} within {timeout:g} s: {error}"
        ) from error
    context, ulysses = layout.context, layout.ulysses
    halves = [list(range(first, first + context)) for first in range(0, layout.size, context)]
    blocks = [half[first : first + ulysses] for half in halves for first in range(0, context, ulysses)]
    arounds = [half[index::ulysses] for half in halves for index in range(ulysses)]
    opposites = [list(range(index, layout.size, context)) for index in range(context)]
    with _peers():
        everyone, block, around, opposite = (_group(rank, sets) for sets in (halves, blocks, arounds, opposites))
    mesh = IDENTITY if context == 1 else Mesh(layout, rank, everyone, block, around)
    return Gang(rank, layout, place, mesh, opposite)


def _group(rank: int, sets: Sequence[list[int]]) -> dist.ProcessGroup | None:
    """This rank's of the disjoint sets that make up the gang; None where it is alone in it. Every rank makes all."""
    own = None
    for members in sets:
        made = dist.new_group(members, timeout=PATIENCE) if len(members) > 1 else None
        own = made if rank in members else own
    return own


@contextmanager
def _peers() -> Iterator[None]:
    """What goes wrong between ranks is no item's fault."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise GangError(f"a rank of the gang does not answer: {error}") from error


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way to another process, else its words."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # an exception may refuse in any way it likes; its words are recorded below
        pass
    return GenerationError(f"{type(error).__name__} at rank 0: {error}")


def _starts(parts: Sequence[int]) -> list[int]:
    return [sum(parts[:index]) for index in range(len(parts))]
