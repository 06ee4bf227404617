"""How the ranks of a gang divide the work: cfg x ring x ulysses, from a configuration's `parallel`. Standard library
only.

A rank's number is (cfg index x ring + ring index) x ulysses + ulysses index: ranks of one Ulysses group are neighbours,
because they exchange the most, and the halves of the guidance are furthest apart. Refuses to know what is exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import ConfigError

DEGREES = ("degree", "context", "ulysses", "ring")
"""Keys of `parallel` that say how many GPUs share the tokens of a clip."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh of a gang. `ring` x `ulysses` ranks share the tokens of a clip; with `cfg` 2, two such sets each predict
    one branch of the guidance."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def context(self) -> int:
        """Ranks that share the tokens of one clip."""
        return self.ring * self.ulysses

    @property
    def size(self) -> int:
        """Ranks of the gang."""
        return self.cfg * self.context

    def place(self, rank: int) -> tuple[int, int, int]:
        """(cfg, ring, ulysses) index of a rank."""
        return rank // self.context, rank % self.context // self.ulysses, rank % self.ulysses

    def __str__(self) -> str:
        """For people: `4 GPUs: tokens over 4 (ring 2 x ulysses 2)`."""
        if self.size == 1:
            return "1 GPU"
        parts = []
        if self.context > 1:
            split = f" (ring {self.ring} x ulysses {self.ulysses})" if min(self.ring, self.ulysses) > 1 else ""
            by = "" if split else f" ({'ring' if self.ring > 1 else 'ulysses'})"
            parts.append(f"tokens over {self.context}{split}{by}")
        if self.cfg > 1:
            parts.append("a branch of the guidance each half")
        return f"{self.size} GPUs: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Band:
    """Items of more than `above` tokens, up to the next band, and the mesh that makes them. `key` is where the
    configuration says so, `degree_said` whether it names one there, `replicas` how many, None for as many as fit."""

    key: str
    above: int
    layout: Layout
    degree_said: bool = False
    replicas: int | None = None


def bands(parallel: Mapping[str, Any], heads: int, gpus_per_node: int | None = None) -> list[Band]:
    """The bands of a configuration's `parallel`, the fewest tokens first: what it says itself for the items below all
    of `by_shape`, then each entry of that, complete in itself. ConfigError as `layout`, naming the band's key."""
    wanted = [("parallel", -1, parallel)]
    for index, entry in enumerate(parallel.get("by_shape") or []):
        wanted.append((f"parallel.by_shape[{index}]", int(entry["tokens_above"]), entry))
    found = []
    for key, above, entry in wanted:
        try:
            mesh = layout(entry, heads, gpus_per_node)
        except ConfigError as error:
            raise ConfigError(str(error).replace("parallel.", f"{key}.")) from error
        said = any(entry.get(name) is not None for name in DEGREES)
        replicas = entry.get("replicas")
        found.append(Band(key, above, mesh, said, None if replicas in (None, "auto") else int(replicas)))
    return sorted(found, key=lambda band: band.above)


def is_single(parallel: Mapping[str, Any]) -> bool:
    """Whether every replica is one GPU: then no model needs to be asked for its heads."""
    meshes = [parallel, *(parallel.get("by_shape") or [])]
    return all((mesh.get(name) or 1) == 1 for mesh in meshes for name in (*DEGREES, "cfg"))


def layout(parallel: Mapping[str, Any], heads: int, gpus_per_node: int | None = None) -> Layout:
    """The mesh that `context` (or `degree`, which says the same), `ulysses`, `ring` and `cfg` of a configuration ask
    for; None is not given. A `degree` of auto must have been settled before (`vidgen.placement`).

    `context` alone is split: Ulysses takes the largest part that divides it, the heads and a node of `gpus_per_node`
    GPUs (so that no rank has more heads than another and no all-to-all crosses nodes), the ring takes the rest. A given
    `ulysses` need not divide the heads, but cannot exceed them. ConfigError names the key, the value and what is
    allowed.
    """
    degree, context, ulysses, ring = (_count(parallel, name) for name in DEGREES)
    if degree is not None and (context, ulysses, ring) != (None, None, None):
        raise ConfigError(
            f"parallel.degree: {degree} beside parallel.context ({context}), parallel.ulysses ({ulysses}) and "
            f"parallel.ring ({ring}); give either, allowed: null"
        )
    context = degree if context is None else context
    cfg = _count(parallel, "cfg") or 1
    if cfg > 2:
        raise ConfigError(f"parallel.cfg: {cfg}; allowed: 1, or 2 for a branch of the guidance each")
    if context is None:
        ulysses, ring = ulysses or 1, ring or 1
    elif ulysses is None and ring is None:
        ulysses = _widest(context, cfg, heads, gpus_per_node)
        ring = context // ulysses
    else:
        given = (ulysses or 1) * (ring or 1)
        if context % given or (ulysses is not None and ring is not None and context != given):
            raise ConfigError(
                f"parallel.context: {context} is not parallel.ulysses ({ulysses}) x parallel.ring ({ring}); give "
                "either, or numbers that agree"
            )
        ulysses, ring = (context // (ring or 1) if ulysses is None else ulysses), ring or context // (ulysses or 1)
    if ulysses > heads:
        raise ConfigError(f"parallel.ulysses: {ulysses}; this model has {heads} attention heads, allowed: at most that")
    return Layout(cfg, ring, ulysses)


def shares(count: int, ranks: int) -> list[int]:
    """`count` things over `ranks`: as even as can be, the first ones have one more."""
    least, more = divmod(count, ranks)
    return [least + (rank < more) for rank in range(ranks)]


def _count(parallel: Mapping[str, Any], name: str) -> int | None:
    value = parallel.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"parallel.{name}: {value!r}; allowed: null, or a whole number from 1")
    return value


def _widest(context: int, cfg: int, heads: int, gpus_per_node: int | None) -> int:
    """The largest Ulysses degree that divides the context degree, the heads, and a node where one is not enough."""
    node = gpus_per_node if gpus_per_node is not None and cfg * context > gpus_per_node else context
    return max(degree for degree in range(1, context + 1) if not (context % degree or heads % degree or node % degree))
