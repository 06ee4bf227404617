"""Which replicas a run has: how many of one GPU, how many gangs of several, and what each of them takes of the cluster.

Arithmetic on the configuration's `parallel`, the plan's estimate and the nodes there are. Refuses to know Ray, and what
a replica does.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vidgen.errors import ConfigError
from vidgen.parallel import layout as layouts
from vidgen.parallel.layout import Layout

MANY_SHAPES = "other shapes"
"""The estimate's entry for shapes it did not count one by one."""
SMALLEST_SHARE = 1e-4
"""Of a CPU: Ray counts no finer."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine of the cluster has; `id` is Ray's name for it."""

    cpus: float
    gpus: int
    id: str = ""


@dataclass(frozen=True, slots=True)
class Coming:
    """What an autoscaler may still bring to the machines there are: GPUs in all, and on the largest machine."""

    gpus: int = 0
    largest: int = 0

    def machines(self, members: int) -> list[int]:
        """GPUs of each machine, so many machines at most as that number of members can use."""
        if not self.gpus:
            return []
        most = self.largest or self.gpus
        whole = [most] * min(self.gpus // most, members)
        return [*whole, self.gpus - sum(whole)] if len(whole) < members and self.gpus % most else whole


@dataclass(frozen=True, slots=True)
class Band:
    """Items of more than `tokens_above` tokens, up to the next band, and how they are made. `replicas` None: as many as
    their share of the work; `key` is where the configuration says so. `flops` and `items` are the plan's, items None
    where it does not tell."""

    key: str
    tokens_above: int
    layout: Layout
    replicas: int | None = None
    flops: float = 0.0
    items: int | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """The replicas of one band. `strict`: a gang fits one node and must be on one."""

    layout: Layout
    names: tuple[str, ...]
    strict: bool = True


@dataclass(frozen=True, slots=True)
class Formation:
    """All replicas of a run, by band. Each member of a gang takes `cpus` and `gpus`, as a replica of one does."""

    kinds: tuple[Kind, ...]
    cpus: float
    gpus: float
    threads: int | None = None
    bands: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    _by_name: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = {name: band for band, kind in enumerate(self.kinds) for name in kind.names}
        object.__setattr__(self, "_by_name", known)

    @property
    def names(self) -> list[str]:
        """In the order in which to start them: what needs the most room first."""
        largest = sorted(self.kinds, key=lambda kind: -kind.layout.size)
        return [name for kind in largest for name in kind.names]

    @property
    def band_of(self) -> Mapping[str, int]:
        return dict(self._by_name)

    def kind(self, name: str) -> Kind:
        return self.kinds[self._by_name[name]]

    def with_one(self, name: str, band: int) -> Formation:
        """This formation with one replica more."""
        kinds = list(self.kinds)
        kinds[band] = replace(kinds[band], names=(*kinds[band].names, name))
        return replace(self, kinds=tuple(kinds))

    def degrees(self) -> dict[str, int]:
        """Members of each replica."""
        return {name: kind.layout.size for kind in self.kinds for name in kind.names}

    def __str__(self) -> str:
        """For people: `6 replicas, 1 gang of 4 (ring 2 x ulysses 2)`."""
        return ", ".join(_named(len(kind.names), kind.layout) for kind in self.kinds if kind.names)


def _named(count: int, layout: Layout) -> str:
    plural = "" if count == 1 else "s"
    if layout.size == 1:
        return f"{count} replica{plural}"
    mesh = {"cfg": layout.cfg, "ring": layout.ring, "ulysses": layout.ulysses}
    split = " x ".join(f"{name} {degree}" for name, degree in mesh.items() if degree > 1)
    return f"{count} gang{plural} of {layout.size} ({split})"


def bands_of(
    parallel: Mapping[str, Any], heads: int, estimates: Iterable[Mapping[str, Any]], gpus_per_node: int | None
) -> list[Band]:
    """The bands of a configuration with what the plans hold of each. ConfigError as `vidgen.parallel.layout.bands`."""
    wanted = layouts.bands(parallel, heads, gpus_per_node)
    above = [band.above for band in wanted[1:]]
    flops, items, counted = [0.0] * len(wanted), [0] * len(wanted), True
    for estimate in estimates:
        for shape in estimate["shapes"]:
            band = bisect.bisect_left(above, shape["tokens"])
            flops[band] += shape["tflops_per_item"] * 1e12 * shape["items"]
            items[band] += shape["items"]
            counted = counted and shape["shape"] != MANY_SHAPES
    return [
        Band(band.key, band.above, band.layout, band.replicas, flops[i], items[i] if counted else None)
        for i, band in enumerate(wanted)
    ]


def on_gpus(
    bands: Sequence[Band],
    nodes: Sequence[Node],
    pending: int,
    threads: int | None = None,
    coming: Coming = Coming(),
) -> Formation:
    """One GPU a member. ConfigError if the cluster has fewer GPUs than the configuration names, or than one replica of
    each band needs, those that are `coming` counted.

    A number that the configuration does not name is that of the GPUs there are now, one at least: what finds no place
    waits, and its waiting is what an autoscaler sees."""
    free = [node.gpus for node in nodes]
    wanted = sum(band.layout.size * (band.replicas or 1) for band in bands if band.items != 0)
    machines = coming.machines(wanted)
    try:
        counts, strict, notes = _counts(bands, free, pending, insist=True)
    except ConfigError:
        if not machines:
            raise
        _, strict, notes = _counts(bands, [*free, *machines], pending, insist=True, coming=len(machines))
        counts, _, _ = _counts(bands, free, pending, insist=False)
    return Formation(_kinds(bands, counts, strict), 1, 1, threads, _limits(bands), notes)


def on_cpus(bands: Sequence[Band], nodes: Sequence[Node], pending: int, fit: int, threads: int | None) -> Formation:
    """The cores divided among all members, of which `fit` have room in memory; what the configuration insists on is
    made even where there are fewer cores."""
    cpus = int(sum(node.cpus for node in nodes))
    insisted = sum(band.layout.size * (band.replicas or 1) for band in bands if band.items != 0)
    most = sum(band.layout.size * min(pending, band.items or pending) for band in bands if band.items != 0)
    auto = any(band.replicas is None for band in bands if band.items != 0)
    members, _, _ = cpu_replicas(cpus, fit, most, None if auto else insisted, threads)
    members = max(members, insisted)
    share = share_of(nodes, members)
    slots = [int(node.cpus / share + 1e-6) for node in nodes]
    slots[slots.index(max(slots))] += max(0, members - sum(slots))
    counts, strict, notes = _counts(bands, slots, pending, insist=False)
    members = sum(count * band.layout.size for count, band in zip(counts, bands, strict=True))
    _, threads, share = cpu_replicas(cpus, fit, pending, members, threads)
    share = min(share, math.floor(share_of(nodes, members) / SMALLEST_SHARE) * SMALLEST_SHARE)
    return Formation(_kinds(bands, counts, strict), share, 0, threads, _limits(bands), notes)


def cpu_replicas(cpus: int, fit: int, pending: int, wanted: int | None, threads: int | None) -> tuple[int, int, float]:
    """(replicas, threads of each, CPUs that each reserves) on `cpus` cores where `fit` replicas fit into memory.

    More threads than cores slow each other manyfold, so an unsaid number of replicas or threads is what is left."""
    count = wanted or max(1, min(cpus // (threads or 1), fit, pending))
    share = cpus / count
    reserved = float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
    return count, threads or max(1, cpus // count), reserved


def share_of(nodes: Sequence[Node], members: int) -> float:
    """The largest share of a CPU at which the nodes hold so many members."""
    shares = {node.cpus / part for node in nodes if node.cpus > 0 for part in range(1, members + 1)}
    fitting = [s for s in shares if sum(int(node.cpus / s + 1e-6) for node in nodes) >= members]
    return max(fitting, default=1.0)


def _limits(bands: Sequence[Band]) -> tuple[int, ...]:
    return tuple(band.tokens_above for band in bands[1:])


def _kinds(bands: Sequence[Band], counts: Sequence[int], strict: Sequence[bool]) -> tuple[Kind, ...]:
    """Names: r0, r1, ... for replicas of one, g0, g1, ... for gangs; padded so that they sort."""
    kinds, numbers = [], {"r": 0, "g": 0}
    totals = {"r": 0, "g": 0}
    for band, count in zip(bands, counts, strict=True):
        totals["g" if band.layout.size > 1 else "r"] += count
    for band, count, on_one in zip(bands, counts, strict, strict=True):
        letter = "g" if band.layout.size > 1 else "r"
        names = replica_names(totals[letter], letter)[numbers[letter] : numbers[letter] + count]
        numbers[letter] += count
        kinds.append(Kind(band.layout, tuple(names), on_one))
    return tuple(kinds)


def replica_names(count: int, letter: str = "r") -> list[str]:
    """r0, r1, ...: padded so that they sort."""
    width = len(str(max(0, count - 1)))
    return [f"{letter}{index:0{width}d}" for index in range(count)]


def _counts(
    bands: Sequence[Band], free: list[int], pending: int, insist: bool, coming: int = 0
) -> tuple[list[int], list[bool], tuple[str, ...]]:
    """(replicas, whether each is to be on one node) of each band, and what a person should know. `free` are the places
    for members on each node, of which the last `coming` are not there yet; the largest gangs choose first. `insist`: a
    number that does not fit is an error."""
    late = sum(free[len(free) - coming :])
    widest = max(free, default=0)
    counts, strict, notes = [0] * len(bands), [True] * len(bands), []
    order = sorted((i for i, band in enumerate(bands) if band.items != 0), key=lambda i: -bands[i].layout.size)
    free = list(free)
    for position, index in enumerate(order):
        band, degree = bands[index], bands[index].layout.size
        strict[index] = degree <= widest
        later = [bands[i] for i in order[position + 1 :]]
        room = sum(places // degree for places in free) if strict[index] else sum(free) // degree
        kept = sum(other.layout.size * (other.replicas or 1) for other in later)
        most = max(0, min(room, (sum(free) - kept) // degree))
        enough = min(pending, pending if band.items is None else band.items)
        count = min(band.replicas if band.replicas is not None else _fair(band, later, sum(free), most), enough)
        if count > most and insist:
            raise ConfigError(_too_many(band, bands, count, room, late))
        counts[index] = count
        _take(free, degree, count, strict[index])
        if not strict[index]:
            place = f"the largest has room for {widest}"
            notes.append(
                f"{band.key}: a gang of {degree} fits no node ({place}); it is spread, and the network is used"
            )
    if idle := sum(free) if insist and not late and any(band.layout.size > 1 for band in bands) else 0:
        notes.append(
            f"{idle} of the cluster's GPUs stay idle: no replica of this configuration fits them, or needs them"
        )
    return counts, strict, tuple(notes)


def room_for(bands: Sequence[Band], free: Sequence[int]) -> list[int]:
    """Replicas of each band where there are so many places on each node, as if every band had all the items it could
    want; none of a band that has none."""
    counts, _, _ = _counts(bands, list(free), sum(free), insist=False)
    return counts


def _fair(band: Band, later: Sequence[Band], free: int, most: int) -> int:
    """Replicas for an unsaid number: all there is room for, or what the band's share of the work comes to beside other
    bands whose number is unsaid; one at least."""
    said = sum(other.layout.size * other.replicas for other in later if other.replicas is not None)
    rivals = [other for other in later if other.replicas is None]
    if not rivals:
        return max(1, most)
    work = band.flops + sum(other.flops for other in rivals)
    places = (free - said) * (band.flops / work if work else 1 / (1 + len(rivals)))
    return max(1, min(most, round(places / band.layout.size)))


def _take(free: list[int], degree: int, count: int, strict: bool) -> None:
    """Takes places: of the fullest node that has room for a whole gang, or wherever there are any."""
    for _ in range(count):
        fitting = [i for i, places in enumerate(free) if places >= degree]
        if strict and fitting:
            free[min(fitting, key=lambda i: free[i])] -= degree
            continue
        left = degree
        for i in sorted(range(len(free)), key=lambda i: -free[i]):
            taken = min(left, max(0, free[i]))
            free[i] -= taken
            left -= taken


def _too_many(band: Band, bands: Sequence[Band], count: int, room: int, late: int) -> str:
    degree = band.layout.size
    if len(bands) == 1 and degree == 1:
        more = f" and may get {late} more" if late else ""
        return f"parallel.replicas: {count}, but the cluster has {room - late} GPUs{more}; at most one replica a GPU"
    others = [other for other in bands if other is not band and other.items != 0]
    beside = f", beside {', '.join(f'{o.replicas or 1} of {o.layout.size}' for o in others)}" if others else ""
    return (
        f"{band.key}: {count} {'gang' if count == 1 else 'gangs'} of {degree} GPUs{beside}; the cluster's nodes hold "
        f"{room} of them{', those that may still come too' if late else ''}"
    )
