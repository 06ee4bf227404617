"""One manifest over all runs of a schedule: `OUTPUT/manifest/run-*.parquet`, and `_VIEW.json` that names them.

A part of the view is a part of a run's manifest with the run's number, paths from the schedule's own folder, and the
run that made the row's sample again, if one did. Bytes follow from the runs alone, and a part that would not change is
neither read nor written. Refuses to know who updates it; several may at once, the last one looks again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidgen import faults, manifest
from vidgen.plan.files import total_rejected
from vidgen.scheduled.runs import READERS, ScheduledRun, read_runs
from vidgen.scheduled.seen import Keys, find, sample_keys
from vidgen.store import state as states
from vidgen.store.objects import Objects

VIEW = "manifest/_VIEW.json"
OTHERWISE = f"what {VIEW} names; delete that, and the next tick writes the view again"
"""What is said of a part with other bytes; a tick does not read the parts that it need not write."""
TRIES = 10
"""Rounds after which somebody else's updates are left to them."""
ADDED = ("run", "superseded_by")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run stands: a digest of all that its manifest follows from, its counts, and the parts of its manifest by
    hash (None while it has not finished: then they follow from plan and commits)."""

    source: str
    counts: Mapping[str, int]
    parts: Mapping[str, str] | None
    state: states.State | None = None


def read(root: Objects) -> dict[str, Any]:
    """The view's own account of itself; of no runs if there is none yet."""
    try:
        found: dict[str, Any] = json.loads(root.read(VIEW))
        return found
    except (FileNotFoundError, ValueError):
        return {"counts": {}, "unfinished": [], "runs": []}


def update(root: Objects, runs: Sequence[ScheduledRun] = ()) -> dict[str, Any]:
    """Brings the view up to date with all runs there are, `runs` among them; returns what `_VIEW.json` says."""
    body, before = read(root), {-1: ""}
    for _ in range(TRIES):
        runs = read_runs(root, runs)
        standings = {run.number: standing for run, standing in zip(runs, _each(_standing, runs), strict=True)}
        now = {number: standing.source for number, standing in standings.items()}
        if now == before or not runs:
            break
        body, before = _write(root, runs, standings), now
    return body


def problems(root: Objects, runs: Sequence[ScheduledRun]) -> Iterator[str]:
    """Sentences about what of the view is not as these runs are, or not as the view itself says."""
    entries = {entry["run"]: entry for entry in read(root)["runs"]}
    for number in sorted(entries.keys() - {run.number for run in runs}):
        yield f"run {number}: its plan is gone, and without it the next tick refuses to go on"
    for run, standing in zip(runs, _each(_standing, runs), strict=True):
        if entries.get(run.number, {}).get("source") != standing.source:
            yield f"manifest/ does not show run {run.number} as it is; the next tick brings it up to date"
    for entry in entries.values():
        for name, digest in entry["parts"].items():
            try:
                data = root.read(name)
            except FileNotFoundError:
                data = b""
            if hashlib.sha256(data).hexdigest() != digest:
                yield f"{name} is not {OTHERWISE}"


def _each(act: Callable[[ScheduledRun], Standing], runs: Sequence[ScheduledRun]) -> list[Standing]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(act, runs))


def _standing(run: ScheduledRun) -> Standing:
    try:
        success = json.loads(run.objects.read(manifest.SUCCESS))
        facts = [success["plan"], success["generation"], success["parts"]]
        return Standing(_digest(["finished", *facts]), success["counts"], success["parts"])
    except FileNotFoundError:
        state = states.load(run.objects, run.items)
        counts = {**state.counts(), "rejected": total_rejected([run.plan])}
        bits = hashlib.sha256(state.status.tobytes()).hexdigest()
        return Standing(_digest(["unfinished", state.generation, bits]), counts, None, state)


def _write(root: Objects, runs: Sequence[ScheduledRun], standings: Mapping[int, Standing]) -> dict[str, Any]:
    known = {entry["run"]: entry for entry in read(root)["runs"]}
    later = _successors(runs)
    done: dict[int, Keys] = {}
    entries = []
    for run in runs:
        standing = standings[run.number]
        over = {number: standings[number].source for number in later[run.number]}
        entry = {"run": run.number, "source": standing.source, "later": _digest(over) if over else ""}
        before = known.get(run.number, {})
        if {key: before.get(key) for key in entry} == entry:
            entries.append(before)
            continue
        for number in over.keys() - done.keys():
            done[number] = _done(runs[number], standings[number])
        newest = [(number, done[number]) for number in sorted(over)]
        parts = _parts(root, run, standing, newest, before.get("parts", {}))
        finished = standing.parts is not None
        entries.append({**entry, "finished": finished, "counts": dict(standing.counts), "parts": parts})
    counts: dict[str, int] = {}
    for entry in entries:
        for name, rows in entry["counts"].items():
            counts[name] = counts.get(name, 0) + rows
    body = {"counts": counts, "unfinished": [e["run"] for e in entries if not e["finished"]], "runs": entries}
    data = json.dumps(body, indent=1).encode()
    _put_changed(root, VIEW, data)
    return body


def _successors(runs: Sequence[ScheduledRun]) -> dict[int, list[int]]:
    """By run, the later ones that made rows of it again, or rows of such a one."""
    later: dict[int, set[int]] = {run.number: set() for run in runs}
    for run in runs:
        above = {int(number) for number in run.facts["again"]}
        for number in range(run.number):
            if number in above or later[number] & above:
                later[number].add(run.number)
    return {number: sorted(found) for number, found in later.items()}


def _parts(
    root: Objects, run: ScheduledRun, standing: Standing, newest: Sequence[tuple[int, Keys]], known: Mapping[str, str]
) -> dict[str, str]:
    """Writes the parts of a run that are not as `known` says; returns each one's hash."""
    parts = {}
    for number, table in enumerate(_tables(run, standing)):
        name = f"manifest/run-{run.number:06d}-{number:06d}.parquet"
        sink = io.BytesIO()
        pq.write_table(_viewed(run.number, table, newest), sink, compression="zstd")
        data = sink.getvalue()
        parts[name] = hashlib.sha256(data).hexdigest()
        if known.get(name) != parts[name]:
            with faults.around("view part"):
                root.put(name, data)
    return parts


def _tables(run: ScheduledRun, standing: Standing) -> Iterator[pa.Table]:
    """The manifest of a run, finished or not."""
    if standing.parts is not None:
        otherwise = f"what its _SUCCESS.json names; `vidgen generate {run.objects.url}` writes it again"
        yield from manifest.read_parts(run.objects, standing.parts, otherwise)
    else:
        assert standing.state is not None, "an unfinished run has a state"
        yield from manifest.rows(run.objects, [run.plan], standing.state)


def _viewed(number: int, table: pa.Table, newest: Sequence[tuple[int, Keys]]) -> pa.Table:
    """A manifest's table as the view has it."""
    rows = table.num_rows
    over = np.full(rows, -1, np.int64)
    if newest:
        planned = np.flatnonzero(table.column("sample").is_valid().to_numpy())
        chosen = table.select(["row_id", "sample"]).take(pa.array(planned))
        keys = sample_keys(chosen.column("row_id").to_pylist(), chosen.column("sample").to_pylist())
        for later, done in newest:
            over[planned[find(done, keys) >= 0]] = later
    video = pc.binary_join_element_wise(pa.scalar(f"runs/{number}"), table.column("video"), "/")
    table = table.set_column(table.schema.get_field_index("video"), "video", video)
    names = [name if name not in ADDED else f"input_{name}" for name in table.column_names]
    added = [pa.array([number] * rows, pa.int32()), pa.array(over, pa.int32(), mask=over < 0)]
    return pa.table([*added, *table.columns], names=[*ADDED, *names])


def _done(run: ScheduledRun, standing: Standing) -> Keys:
    """The samples that a run has made, sorted."""
    found = []
    for table in _tables(run, standing):
        done = table.filter(pc.equal(table.column("status"), "done"))
        found.append(sample_keys(done.column("row_id").to_pylist(), done.column("sample").to_pylist()))
    high, low = (
        np.concatenate([getattr(k, half) for k in found] or [np.zeros(0, np.uint64)]) for half in Keys.__slots__
    )
    pairs = np.unique(np.stack([high, low], axis=1), axis=0)  # variants share a sample
    return Keys(pairs[:, 0], pairs[:, 1])


def _put_changed(root: Objects, path: str, data: bytes) -> None:
    try:
        if root.read(path) == data:
            return
    except FileNotFoundError:
        pass
    with faults.around("view"):
        root.put(path, data)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
