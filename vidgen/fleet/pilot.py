"""`vidgen pilot`: a sample of a run, made as the run makes it, and what its seconds say about the rest.

The sample's videos are the run's own: committed, counted, and not made again. Refuses to know how a sample is chosen
(`vidgen.plan.sample`) and what an estimate says (`vidgen.plan.forecast`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vidgen.fleet import run as fleet
from vidgen.fleet.driver import Outcome
from vidgen.fleet.opening import Run
from vidgen.plan import forecast, sample
from vidgen.plan.cost import OTHERS
from vidgen.plan.forecast import Calibration, Measured
from vidgen.plan.sample import Shapes
from vidgen.store import ledger, state
from vidgen.types import Plan, Record

ITEMS = 20


def pilot(
    source: str, overrides: Sequence[str], options: fleet.Options, items: int = ITEMS
) -> tuple[Run, Outcome, dict[str, Any]]:
    """Makes what is not yet made of a stratified sample of `items` items, and rewrites estimate.json; its content is {}
    where nothing was made. Raises and ends as `vidgen.fleet.run.generate`."""
    began = time.time()
    run, outcome = fleet.generate(source, overrides, replace(options, sample=items))
    known = sample.shapes(run.objects, run.plans)
    before = forecast.calibration(run.objects)
    first = before.first if before is not None else ()
    found = calibrate(run.plans, known, records(run, sample.stratified(known, items)), began, first)
    return run, outcome, {} if found is None else forecast.write(run.objects, run.plans, run.config, found)


def records(run: Run, ordinals: Sequence[int]) -> list[Record]:
    """The commits of those of these items that are done."""
    held, wanted = state.load(run.objects, run.items), set(ordinals)
    return [
        record
        for table in ledger.read_tables(run.objects, min(wanted, default=0), max(wanted, default=0))
        for record in ledger.to_records(table)
        if record.ordinal in wanted
        and record.status == "done"
        and record.generation == held.generation_of(record.item_id)
    ]


def calibrate(
    plans: Sequence[Plan], known: Shapes, made: Sequence[Record], began: float, first: Iterable[str] = ()
) -> Calibration | None:
    """What these records say about their shapes. The first batch of each replica since `began`, and the items named by
    `first`, warm up: they tell of a shape's seconds only where nothing else does. None without records."""
    if not made:
        return None
    openers: dict[str, float] = {}
    for record in made:
        if record.started_at >= began:
            openers[record.replica] = min(record.started_at, openers.get(record.replica, record.started_at))
    warming = {r.item_id for r in made if r.started_at == openers.get(r.replica)} | set(first)
    by_shape: dict[str, list[Record]] = {}
    for record in made:
        by_shape.setdefault(known.label(record.ordinal), []).append(record)
    shapes = {label: _measured(group, warming) for label, group in by_shape.items()}
    entries = {entry["shape"]: entry for plan in plans for entry in plan.estimate["shapes"]}
    sizes = {label: forecast.size_of(entries.get(label) or entries[OTHERS]) for label in shapes}
    extra = [
        _seconds(record) - shapes[label].seconds
        for label, group in by_shape.items()
        for record in group
        if record.item_id in warming and len(group) > sum(r.item_id in warming for r in group)
    ]
    peaks = [record.peak_bytes for record in made]
    return Calibration(
        items=len(made),
        device=", ".join(sorted({record.gpu for record in made if record.gpu})),
        shapes=shapes,
        sizes=sizes,
        warm_up=max(0.0, statistics.median(extra)) if extra else 0.0,
        peak_bytes=max(peaks) or None,
        first=tuple(sorted(warming)),
    )


def _measured(group: Sequence[Record], warming: set[str]) -> Measured:
    steady = [record for record in group if record.item_id not in warming] or list(group)
    seconds = [_seconds(record) for record in steady]
    mean = statistics.fmean(seconds)
    return Measured(
        items=len(steady),
        encode=statistics.median(record.encode_s / max(1, record.batch) for record in steady),
        denoise=statistics.median(record.denoise_s / max(1, record.batch) for record in steady),
        decode=statistics.median(record.decode_s for record in steady),
        write=statistics.median(record.write_s for record in steady),
        bytes=statistics.fmean(record.bytes for record in steady),
        spread=statistics.pstdev(seconds) / mean if mean > 0 else 0.0,
    )


def _seconds(record: Record) -> float:
    """For which an item occupied its replica: its share of the batch's steps, and its own decoding."""
    return (record.encode_s + record.denoise_s) / max(1, record.batch) + record.decode_s
