"""The plan's pending items, in the order in which a run takes them, read a part at a time.

| order | after the highest priority |
|---|---|
| longest | as planned, very long items before the others; of what the driver holds at once the longest first |
| input | as planned |
| stratified | so that what is done when the run is stopped is a sample: of each shape and each stretch its share |

Items go by priority first. Up to PRIORITY_LEVELS different priorities that holds over the whole plan; of more, each
level is a range of them. Memory is a part's table and ROUND_ITEMS items, whatever the plan's size. Refuses to know
replicas, and what became of an item.

How stratified comes about. In a part, the items of one shape get places in [0, 1), evenly, so that the first of them
lie evenly in the part (the j-th at the rank of frac(j x golden ratio) among them). A round takes a slice of places
from every part of a cohort, which is every c-th part of the plan, and cohorts take turns. So after k items of a plan of
one cohort of P parts with S shapes, of a shape with share p there are k p of them, give or take P (1 + S p), and a
place. Where there are several bands of items, that is so in each: they are made by replicas of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vidgen.fleet.offering import long_first, long_flops
from vidgen.fleet.rules import Rules
from vidgen.plan.files import items_of, part_table
from vidgen.store.objects import Objects
from vidgen.store.state import PENDING, State
from vidgen.types import Item, Part, Plan

ORDERS = ("stratified", "longest", "input")
PRIORITY_LEVELS = 16
PARTS_AT_ONCE = 32
"""Parts of a cohort: a million items. Each round reads all of them."""
ROUND_ITEMS = 2048
PLACES = 64
GOLDEN = (math.sqrt(5) - 1) / 2

_DECIDING = ["tokens", "batch_key", "priority"]

Level = tuple[int, int]
"""Priorities from, to (both included)."""


@dataclass(slots=True)
class Supply:
    """Where the dispatcher's items come from, for `replicas`: all that is pending, or of those ordinals `only`. `read`
    may be asked once for each band; `alive` is called before each part that it reads, of which there may be thousands.
    """

    objects: Objects
    plans: Sequence[Plan]
    state: State
    rules: Rules
    replicas: Sequence[str] = ()
    alive: Callable[[], object] = lambda: None
    only: np.ndarray | None = None
    _levels: list[Level] = field(default_factory=list)
    _of_part: dict[str, Level] = field(default_factory=dict)

    def read(self, band: int) -> Iterator[tuple[Item, int]]:
        """(item, place) of each pending item of a band. Items of one place may go in any order: where items share
        batches, as many as make a batch, so that equal shapes meet; but there are PLACES of them at least."""
        if not self._levels:
            self._find_levels()
        place, count, widest = 0, 0, 1
        coarsest = max(1, self.state.count("pending") // PLACES)
        for level in self._levels:
            parts = [
                (index, plan, part)
                for index, (plan, part) in enumerate(self._parts())
                if self._overlap(part, level) and not self._settled(part)
            ]
            for item in self._ordered(parts, level, band):
                widest = max(widest, item.tokens)
                together = min(self.rules.batch_items, self.rules.batch_tokens // widest, coarsest)
                if count >= together and self.rules.order != "longest":
                    place, count, widest = place + 1, 0, item.tokens
                yield item, place
                count += 1

    # ---------------------------------------------------------------- orders

    def _ordered(self, parts: list[tuple[int, Plan, Part]], level: Level, band: int) -> Iterator[Item]:
        if self.rules.order == "stratified":
            return self._stratified(parts, level, band)
        if self.rules.order == "input":
            return self._as_planned(parts, level, band)
        return long_first(lambda: self._as_planned(parts, level, band), self._long(band))

    def _long(self, band: int) -> float | None:
        """FLOPs above which an item of a band is offered first."""
        shapes = [shape for plan in self.plans for shape in plan.estimate["shapes"]]
        replicas = sum(self.rules.band_of.get(name, 0) == band for name in self.replicas)
        return long_flops([s for s in shapes if self.rules.band(s["tokens"]) == band], self.rules.window, replicas)

    def _as_planned(self, parts: list[tuple[int, Plan, Part]], level: Level, band: int) -> Iterator[Item]:
        for _, plan, part in parts:
            table = self._table(part)
            yield from items_of(plan, table.take(np.nonzero(self._wanted(table, part, level, band))[0]))

    def _stratified(self, parts: list[tuple[int, Plan, Part]], level: Level, band: int) -> Iterator[Item]:
        cohorts = -(-len(parts) // PARTS_AT_ONCE)
        turns = sorted(range(cohorts), key=lambda cohort: cohort * GOLDEN % 1)
        members = [parts[cohort::cohorts] for cohort in turns]
        borders: dict[int, list[float]] = {}
        for number in itertools.count():
            for turn, cohort in enumerate(members):
                if turn not in borders:
                    borders[turn] = self._borders(cohort, level, band)
                if number + 1 < len(borders[turn]):
                    begin, end = borders[turn][number], borders[turn][number + 1]
                    yield from self._round(cohort, begin, end, level, band)
            if all(number + 2 >= len(found) for found in borders.values()):
                return

    def _borders(self, cohort: list[tuple[int, Plan, Part]], level: Level, band: int) -> list[float]:
        """Places between which there are ROUND_ITEMS pending items of a cohort, or a few more."""
        found = [np.empty(0)]
        for index, _, part in cohort:
            table = self._table(part, _DECIDING)
            found.append(_places_of(table, level, index)[self._wanted(table, part, level, band)])
        return [*np.sort(np.concatenate(found))[::ROUND_ITEMS].tolist(), 1.0]

    def _round(
        self, cohort: list[tuple[int, Plan, Part]], begin: float, end: float, level: Level, band: int
    ) -> Iterator[Item]:
        """What has a place from `begin` up to `end`, by place."""
        found: list[tuple[float, int, Item]] = []
        for index, plan, part in cohort:
            if self._settled(part):
                continue
            table = self._table(part)
            at = _places_of(table, level, index)
            chosen = np.nonzero(self._wanted(table, part, level, band) & (at >= begin) & (at < end))[0]
            items = items_of(plan, table.take(chosen))
            found += [(float(place), item.ordinal, item) for place, item in zip(at[chosen], items, strict=True)]
        found.sort(key=lambda entry: entry[:2])
        yield from (item for _, _, item in found)

    # ---------------------------------------------------------------- which items

    def _table(self, part: Part, columns: list[str] | None = None) -> pa.Table:
        self.alive()
        return part_table(self.objects, part, columns)

    def _parts(self) -> Iterator[tuple[Plan, Part]]:
        yield from ((plan, part) for plan in self.plans for part in plan.parts)

    def _settled(self, part: Part) -> bool:
        return bool(self.state.status[part.first : part.first + part.items].all())

    def _wanted(self, table: pa.Table, part: Part, level: Level, band: int) -> np.ndarray:
        pending = self.state.status[part.first : part.first + part.items] == PENDING
        if self.only is not None:
            pending &= np.isin(np.arange(part.first, part.first + part.items), self.only)
        of_band = np.searchsorted(self.rules.bands, table.column("tokens").to_numpy(), side="left") == band
        return np.asarray(pending & of_band & _within(table, level))

    def _overlap(self, part: Part, level: Level) -> bool:
        low, high = self._of_part.get(part.name, level)
        return low <= level[1] and level[0] <= high

    def _find_levels(self) -> None:
        """The priorities there are, highest first, from one pass over the plan; none is needed where no column has
        them."""
        everything = (-(2**31), 2**31 - 1)
        if not any("priority" in plan.config["dataset"]["columns"] for plan in self.plans):
            self._levels = [everything]
            return
        known: set[int] = set()
        for _, part in self._parts():
            if not self._settled(part):
                here = np.unique(self._table(part, ["priority"]).column("priority").to_numpy())
                self._of_part[part.name] = (int(here[0]), int(here[-1]))
                known.update(here.tolist())
        falling = sorted(known, reverse=True)
        size = max(1, -(-len(falling) // PRIORITY_LEVELS))
        groups = [falling[i : i + size] for i in range(0, len(falling), size)]
        self._levels = [(group[-1], group[0]) for group in groups] or [everything]


def places(strata: np.ndarray, number: int) -> np.ndarray:
    """A place in [0, 1) for each of a part's items, from the stratum of each; `number` is the part's own, so that the
    first items of rare strata do not come from all parts at once. Those of one stratum of n are 1 / n apart."""
    result = np.empty(len(strata))
    for index, stratum in enumerate(np.unique(strata)):
        where = np.nonzero(strata == stratum)[0]
        keys = np.arange(len(where)) * GOLDEN % 1
        ranks = np.empty(len(where))
        ranks[np.argsort(keys, kind="stable")] = np.arange(len(where))
        offset = ((number + 1) * GOLDEN + index * math.sqrt(2)) % 1
        result[where] = (ranks + offset) / len(where)
    return result


def _places_of(table: pa.Table, level: Level, number: int) -> np.ndarray:
    shape = table.column("batch_key").combine_chunks().dictionary_encode().indices.to_numpy()
    return places(shape * 2 + _within(table, level), number)


def _within(table: pa.Table, level: Level) -> np.ndarray:
    priority = table.column("priority").to_numpy()
    return np.asarray((priority >= level[0]) & (priority <= level[1]))
