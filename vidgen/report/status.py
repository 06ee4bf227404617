"""`vidgen status`: how far a run is, from its output alone; no cluster, no lease, nothing written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vidgen import manifest
from vidgen.errors import printable
from vidgen.plan.files import require_plan, total_items, total_rejected
from vidgen.report.summary import signature
from vidgen.report.wording import duration
from vidgen.store import epochs
from vidgen.store import state as states
from vidgen.store.objects import Objects

FRESH_SECONDS = 3 * epochs.BEAT_SECONDS


@dataclass(slots=True)
class Failures:
    """Items that failed alike, with one of them."""

    signature: str
    count: int
    example: str
    error: str


@dataclass(slots=True)
class Status:
    """`driver`: running, stopped, died, or none yet. `rate` is items an hour and `eta` seconds, while it runs."""

    output: str
    name: str
    family: str
    checkpoint: str
    total: int
    done: int
    failed: int
    quarantined: int
    pending: int
    rejected: int
    generation: int
    driver: str
    finished: bool
    rate: float | None = None
    eta: float | None = None
    gpu_hours: float = 0.0
    failures: list[Failures] = field(default_factory=list)


def read(output: str) -> Status:
    """The state of a run; PlanError if there is none at `output`."""
    objects = Objects(output)
    plans = require_plan(objects)
    state = states.load(objects, total_items(plans))
    counts = state.counts()
    epoch = epochs.current(objects)
    beat = epochs.read_beat(objects, epoch) if epoch is not None else {}
    driver = _driver(epoch, beat)
    found = Status(
        output=output,
        name=str(plans[-1].config.get("name", "")),
        family=plans[-1].family,
        checkpoint=plans[-1].checkpoint,
        total=len(state.status),
        rejected=total_rejected(plans),
        generation=state.generation,
        driver=driver,
        finished=manifest.is_valid(objects, plans, state),
        gpu_hours=round(float(beat.get("gpu_seconds", 0.0)) / 3600, 4),
        done=counts["done"],
        failed=counts["failed"],
        quarantined=counts["quarantined"],
        pending=counts["pending"],
    )
    if driver == "running":
        shown = _progress(objects)
        found.rate, found.eta = shown.get("rate"), shown.get("eta")
    if counts["failed"] or counts["quarantined"]:
        found.failures = _failures(manifest.rows(objects, plans, state))
    return found


def show(found: Status, console: Console) -> None:
    """The status as a person reads it."""
    state = "finished" if found.finished else f"driver {found.driver}"
    model = f"{found.family}, {found.checkpoint}" if found.checkpoint else found.family
    name, model = escape(printable(found.name)), escape(printable(model))
    console.print(f"[bold]{name}[/bold]  {model}  ({state})", highlight=False)
    parts = [f"{found.done}/{found.total} done"]
    parts += [f"{getattr(found, n)} {n}" for n in ("pending", "failed", "quarantined", "rejected") if getattr(found, n)]
    if found.rate:
        parts.append(f"{found.rate:,.0f} items/h")
    if found.eta is not None:
        parts.append(f"{duration(found.eta)} left")
    console.print("  " + ", ".join(parts) + f", {found.gpu_hours:g} replica-hours", highlight=False)
    if found.failures:
        table = Table("items", "failure", "example", title="failures", title_justify="left")
        for row in found.failures:
            table.add_row(str(row.count), Text(printable(row.error[:200])), row.example)
        console.print(table)
        console.print(f"  vidgen retry {found.output}", markup=False, highlight=False, soft_wrap=True)
    elif found.pending and found.driver != "running":
        console.print(f"  vidgen generate {found.output}", markup=False, highlight=False, soft_wrap=True)


def _driver(epoch: int | None, beat: dict[str, object]) -> str:
    if epoch is None:
        return "none yet"
    if beat.get("released"):
        return "stopped"
    at = beat.get("at", 0.0)
    return "running" if isinstance(at, float) and time.time() - at < FRESH_SECONDS else "died"


def _progress(objects: Objects) -> dict[str, float | None]:
    try:
        shown: dict[str, float | None] = json.loads(objects.read("progress.json"))
        return shown
    except (FileNotFoundError, ValueError):
        return {}


def _failures(tables: Iterable[pa.Table]) -> list[Failures]:
    groups: dict[str, Failures] = {}
    for table in tables:
        failed = table.filter(pc.is_in(table.column("status"), pa.array(["failed", "quarantined"])))
        for row in failed.select(["item_id", "error_class", "error"]).to_pylist():
            key = signature(row["error_class"] or "", row["error"] or "")
            group = groups.setdefault(key, Failures(key, 0, row["item_id"], row["error"] or ""))
            group.count += 1
    return sorted(groups.values(), key=lambda group: -group.count)
