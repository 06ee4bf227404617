"""What a fleet did when, from the records of a run: each replica's time by stage in bins, gaps cut out, the tail.

Holds bins, never the records, whatever their number. Failed attempts leave no times: they, loading and waiting are all
the time that is not busy. Refuses to know how it is drawn (`vidgen.report.timeline`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidgen.store import commits, ledger
from vidgen.store.objects import Objects

BINS = 480
"""Bins of the whole time, cuts left out."""
COARSE = 20_000
"""Bins in which gaps are looked for."""
SHORTEST_CUT = 0.04
"""Share of the whole time from which a gap without any work is cut out, if it is also a minute long."""
CUT_SECONDS = 60.0
ENGINE = ("encode", "denoise", "decode")
TAIL_SHARE = 0.5
"""The tail begins when for the last time at least this share of the replicas was busy."""
_COLUMNS = (
    *("replica", "node", "status", "started_at", "write_started_at", "created_at", "attempt", "generation"),
    *("encode_s", "denoise_s", "decode_s", "item_id"),
)


@dataclass(frozen=True, slots=True)
class Axis:
    """Clock times to bins: piecewise linear, the cut gaps of no width. `segments` are (from, to) in seconds since the
    epoch."""

    segments: tuple[tuple[float, float], ...]
    bins: int = BINS

    @property
    def seconds(self) -> float:
        """All of the time that is shown."""
        return sum(end - begin for begin, end in self.segments)

    @property
    def bin_seconds(self) -> float:
        return self.seconds / self.bins

    def place(self, times: np.ndarray) -> np.ndarray:
        """Bins, with fractions, of clock times."""
        edges = np.array(self.segments)
        widths = edges[:, 1] - edges[:, 0]
        ends = np.cumsum(widths)
        marks = np.stack([ends - widths, ends], 1).ravel() * (self.bins / ends[-1])
        return np.asarray(np.interp(times, edges.ravel(), marks))


@dataclass(slots=True)
class Lane:
    """One replica. `stages` is the share of each bin's time, [encode, denoise, decode, write] x bins."""

    name: str
    node: str
    items: int
    stages: np.ndarray

    @property
    def busy(self) -> np.ndarray:
        """Share of each bin in which it generated."""
        return np.asarray(np.minimum(self.stages[:3].sum(0), 1.0))


@dataclass(slots=True)
class History:
    """`done` and `failed` are items settled by bin, `tail` seconds from when most replicas were last busy to the end,
    `tail_idle` replica-seconds idle in it, `retries` attempts beyond the first of each item."""

    axis: Axis
    lanes: list[Lane]
    done: np.ndarray
    failed: np.ndarray
    retries: int
    tail: float = 0.0
    tail_idle: float = 0.0

    @property
    def busy(self) -> np.ndarray:
        """Share of the replicas that generated, by bin."""
        return np.asarray(np.mean([lane.busy for lane in self.lanes], axis=0))


@dataclass(slots=True)
class _Sums:
    """What is added up, lane by lane. A bin's share is `part` plus the running sum of `full`."""

    full: np.ndarray
    part: np.ndarray
    items: np.ndarray
    settled: dict[str, np.ndarray] = field(default_factory=dict)
    retries: int = 0

    def add(self, lanes: np.ndarray, stage: int, begin: np.ndarray, end: np.ndarray) -> None:
        """Covers bins `begin` to `end`, with fractions."""
        for edge, sign in ((begin, 1.0), (np.maximum(begin, end), -1.0)):
            whole = np.minimum(edge.astype(np.int64), self.part.shape[2] - 1)
            stages = np.full_like(whole, stage)
            np.add.at(self.part, (lanes, stages, whole), sign * (1.0 - (edge - whole)))
            np.add.at(self.full, (lanes, stages, whole + 1), sign)

    def shares(self) -> np.ndarray:
        bins = self.part.shape[2]
        return np.asarray(np.clip(np.cumsum(self.full, axis=2)[:, :, :bins] + self.part, 0.0, 1.0))


def read(objects: Objects, finished: bool) -> History | None:
    """The history of a run so far, videos that were made again included; None before anything is done. Of one that has
    `finished` the ledger knows all."""
    fresh = None if finished else _unlisted(objects)

    def tables() -> Iterator[pa.Table]:
        for table in ledger.read_tables(objects):
            yield table.select(_COLUMNS)
        if fresh is not None:
            yield fresh

    return of(tables)


def of(tables: Callable[[], Iterator[pa.Table]]) -> History | None:
    """The history that records tell; `tables` gives them anew each time it is called."""
    names: dict[str, str] = {}
    first, last = np.inf, -np.inf
    for table in tables():
        done = table.filter(pc.equal(table.column("status"), "done"))
        if done.num_rows:
            pairs = done.group_by(["replica", "node"], use_threads=False).aggregate([]).to_pylist()
            names.update({row["replica"]: row["node"] for row in pairs})
            first = min(first, pc.min(done.column("started_at")).as_py())
            last = max(last, pc.max(done.column("created_at")).as_py())
    if not names:
        return None
    last = max(last, first + 1e-3)
    order = {name: index for index, name in enumerate(sorted(names, key=_natural))}
    axis = Axis(_segments(tables, first, last))
    shape = (len(order), 4, BINS)
    sums = _Sums(np.zeros((*shape[:2], BINS + 2)), np.zeros(shape), np.zeros(len(order), int))
    sums.settled = {"done": np.zeros(BINS), "failed": np.zeros(BINS)}
    for table in tables():
        _add(table, axis, order, sums)
    shares = sums.shares()
    lanes = [Lane(name, names[name], int(sums.items[index]), shares[index]) for name, index in order.items()]
    found = History(axis, lanes, sums.settled["done"], sums.settled["failed"], sums.retries)
    found.tail, found.tail_idle = _tail(found)
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _unlisted(objects: Objects) -> pa.Table | None:
    """Records of commits that no ledger part names: of a run that goes on, or of a driver that died."""
    named: set[tuple[int, str]] = set()
    for table in ledger.read_tables(objects):
        named.update(zip(*(table.column(name).to_pylist() for name in ("generation", "item_id")), strict=True))
    records = []
    for generation in [0, *commits.list_generations(objects)]:
        missing = [item for item in commits.list_commits(objects, generation) if (generation, item) not in named]
        records += list(ledger.read_commits(objects, generation, missing))
    if not records:
        return None
    columns = {name: [getattr(record, name) for record in records] for name in _COLUMNS}
    return pa.table(columns, schema=pa.schema([ledger.SCHEMA.field(name) for name in _COLUMNS]))


def _segments(tables: Callable[[], Iterator[pa.Table]], first: float, last: float) -> tuple[tuple[float, float], ...]:
    """The time from `first` to `last` without its long gaps."""
    width = (last - first) / COARSE
    edges = np.zeros(COARSE + 1)
    for table in tables():
        done = table.filter(pc.equal(table.column("status"), "done"))
        for name, sign, shift in (("started_at", 1, 0), ("created_at", -1, 1)):
            places = np.clip((done.column(name).to_numpy() - first) / width, 0, COARSE - 1).astype(np.int64)
            np.add.at(edges, places + shift, sign)
    busy = np.cumsum(edges)[:COARSE] > 0
    turns = np.flatnonzero(np.diff(np.concatenate([[False], busy, [False]]).astype(np.int8)))
    begins, ends = first + turns[::2] * width, first + turns[1::2] * width
    least = max(CUT_SECONDS, SHORTEST_CUT * (last - first))
    found: list[tuple[float, float]] = []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if found and begin - found[-1][1] < least:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)


def _add(table: pa.Table, axis: Axis, order: dict[str, int], sums: _Sums) -> None:
    settled_at = np.clip(axis.place(table.column("created_at").to_numpy()).astype(np.int64), 0, axis.bins - 1)
    is_done = pc.equal(table.column("status"), "done").to_numpy()
    np.add.at(sums.settled["done"], settled_at[is_done], 1)
    np.add.at(sums.settled["failed"], settled_at[~is_done], 1)
    sums.retries += int(np.maximum(table.column("attempt").to_numpy() - 1, 0).sum())
    done = table.filter(pc.equal(table.column("status"), "done"))
    if not done.num_rows:
        return
    lanes = np.array([order[name] for name in done.column("replica").to_pylist()])
    np.add.at(sums.items, lanes, 1)
    sums.add(lanes, 3, *(axis.place(done.column(name).to_numpy()) for name in ("write_started_at", "created_at")))
    # The items of a batch begin together, and each has the whole batch's encode and denoise beside its own decode.
    batches = done.group_by(["replica", "started_at"], use_threads=False).aggregate(
        [("encode_s", "max"), ("denoise_s", "max"), ("decode_s", "sum")]
    )
    lanes = np.array([order[name] for name in batches.column("replica").to_pylist()])
    begin = batches.column("started_at").to_numpy()
    for stage, name in enumerate(("encode_s_max", "denoise_s_max", "decode_s_sum")):
        end = begin + batches.column(name).to_numpy()
        sums.add(lanes, stage, axis.place(begin), axis.place(end))
        begin = end


def _tail(found: History) -> tuple[float, float]:
    """Seconds from when most replicas were last busy to the end, and the replica-seconds idle in them."""
    most = np.flatnonzero(found.busy >= TAIL_SHARE)
    begin = int(most[-1]) + 1 if len(most) else 0
    idle = float((1.0 - found.busy[begin:]).sum()) * len(found.lanes) * found.axis.bin_seconds
    return (found.axis.bins - begin) * found.axis.bin_seconds, idle
