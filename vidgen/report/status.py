"""`vidgen status`: how far a run is, from its output alone; no cluster, no lease, nothing written."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vidgen import manifest
from vidgen.errors import printable
from vidgen.plan import forecast
from vidgen.plan.files import require_plan, total_items, total_rejected
from vidgen.report.actual import MOST_ITEMS, Comparison, compare
from vidgen.report.actual import lines as against
from vidgen.report.summary import like, signature
from vidgen.report.wording import duration
from vidgen.store import epochs
from vidgen.store import state as states
from vidgen.store.objects import Objects
from vidgen.types import Plan

FRESH_SECONDS = 3 * epochs.BEAT_SECONDS
MOST_COMMANDS = 10
"""Groups of failures whose own command is shown."""
NONE_YET, RUNNING, STOPPED, DIED = "none yet", "running", "stopped", "died"


@dataclass(slots=True)
class Failures:
    """Items that failed alike, with one of them, and the command that opens them again."""

    signature: str
    count: int
    example: str
    error: str
    retry: str


@dataclass(slots=True)
class Status:
    """`driver`: running, stopped, died, or none yet. While it runs: `rate` is items an hour, `eta` seconds, `replicas`
    how many are in which state. `cost` is in the currency of run.price_per_gpu_hour, `metrics` what the last driver
    counted, by the names of `vidgen.fleet.metrics`."""

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
    cost: float | None = None
    replicas: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[Failures] = field(default_factory=list)
    against: Comparison | None = None
    notes: list[str] = field(default_factory=list)
    """What holds while it runs: a node that is avoided, a shape that fits only with some of the memory ladder."""
    reason: str = ""
    """Why its last driver stopped with items pending, if it said so."""


class Counted(Protocol):
    """What a line of numbers is made of; a Status is one."""

    total: int
    done: int
    rate: float | None
    eta: float | None
    gpu_hours: float
    cost: float | None


def read(output: str, *, compared: bool = True) -> Status:
    """The state of a run; PlanError if there is none at `output`. `compared`: with its plan's estimate."""
    objects = Objects(output)
    plans = require_plan(objects)
    state = states.load(objects, total_items(plans))
    counts = state.counts()
    epoch = epochs.current(objects)
    beat = last_sign(objects, epoch)
    driver = driver_of(epoch, beat)
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
    shown = progress_of(objects)
    found.cost = cost_of(shown, plans[-1], float(beat.get("gpu_seconds", 0.0)))
    found.metrics = shown.get("metrics", {})
    if driver == RUNNING:
        for name, value in live(shown).items():
            setattr(found, name, value)
    elif found.pending:
        found.reason = shown.get("reason", "")
    if compared:
        rows = manifest.rows(objects, plans, state) if found.total <= MOST_ITEMS and found.done else None
        found.against = compare(forecast.read(objects), rows, found.gpu_hours, found.cost)
    if counts["failed"] or counts["quarantined"]:
        found.failures = _failures(output, manifest.rows(objects, plans, state))
    return found


def render(found: Status) -> Group:
    """The status as a person reads it."""
    state = "finished" if found.finished else f"driver {found.driver}"
    model = f"{found.family}, {found.checkpoint}" if found.checkpoint else found.family
    head = Text.assemble((printable(found.name), "bold"), f"  {printable(model)}  ({state})")
    lines: list[Text | Table] = [head, Text(f"  {numbers(found)}")]
    if found.replicas:
        states = ", ".join(f"{count} {stage}" for stage, count in found.replicas.items())
        lines.append(Text(f"  replicas: {states}"))
    lines += [Text(f"  note: {printable(note)}") for note in found.notes]
    if found.reason:
        lines.append(Text(f"  it stopped: {printable(found.reason)}"))
    if found.against is not None:
        lines += against(found.against)
    place = shlex.quote(found.output)
    if found.failures:
        table = Table("items", "failure", "example", title="failures", title_justify="left")
        for row in found.failures:
            table.add_row(str(row.count), Text(printable(row.error[:200])), row.example)
        listed = found.failures[:MOST_COMMANDS] if len(found.failures) > 1 else []
        lines += [table, *(Text(f"  {printable(row.retry)}") for row in listed), Text(f"  vidgen retry {place}")]
    elif found.pending and found.driver != RUNNING:
        lines.append(Text(f"  vidgen generate {place}"))
    return Group(*lines)


def numbers(found: Counted) -> str:
    """Counts, pace and cost in a line."""
    parts = [f"{found.done}/{found.total} done"]
    parts += [f"{getattr(found, n)} {n}" for n in ("pending", "failed", "quarantined", "rejected") if getattr(found, n)]
    if found.rate:
        parts.append(f"{found.rate:,.0f} items/h")
    if found.eta is not None:
        parts.append(f"{duration(found.eta)} left")
    parts.append(f"{found.gpu_hours:g} replica-hours")
    if found.cost is not None:
        parts.append(f"cost {found.cost:,.2f}")
    return ", ".join(parts)


def live(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What progress.json says of a run that is driven now, as fields of a Status."""
    stages = Counter(str(replica["stage"]) for replica in shown.get("replicas", ()))
    return {
        "rate": shown.get("rate"),
        "eta": shown.get("eta"),
        "gpu_hours": round(float(shown.get("gpu_seconds", 0.0)) / 3600, 4),
        "cost": shown.get("cost"),
        "replicas": dict(stages.most_common()),
        "metrics": shown.get("metrics", {}),
        "notes": shown.get("notes", []),
    }


def last_sign(objects: Objects, epoch: int | None) -> dict[str, Any]:
    """The last beat of an epoch; before the first, when it began; {} without an epoch."""
    if epoch is None:
        return {}
    beat = epochs.read_beat(objects, epoch)
    if beat:
        return beat
    try:
        return {"at": json.loads(objects.read(f"epochs/{epoch}.json"))["started_at"]}
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def driver_of(epoch: int | None, beat: Mapping[str, Any]) -> str:
    """How the driver of the highest epoch is, by its last beat."""
    if epoch is None:
        return NONE_YET
    if beat.get("released"):
        return STOPPED
    at = beat.get("at", 0.0)
    return RUNNING if isinstance(at, float) and time.time() - at < FRESH_SECONDS else DIED


def progress_of(objects: Objects) -> dict[str, Any]:
    """progress.json; {} if there is none."""
    try:
        shown: dict[str, Any] = json.loads(objects.read("progress.json"))
        return shown
    except (FileNotFoundError, ValueError):
        return {}


def gpu_seconds(objects: Objects) -> float:
    """What the drivers of a run have spent so far, as the last beat says."""
    return float(last_sign(objects, epochs.current(objects)).get("gpu_seconds", 0.0))


def cost_of(shown: Mapping[str, Any], plan: Plan, spent: float) -> float | None:
    """What GPU-seconds cost: as the last driver had it in progress.json, else at the plan's run.price_per_gpu_hour;
    None without a price."""
    if shown.get("cost") is not None:
        return float(shown["cost"])
    price = plan.config["run"].get("price_per_gpu_hour")
    return None if price is None else spent / 3600 * float(price)


def _failures(output: str, tables: Iterable[pa.Table]) -> list[Failures]:
    groups: dict[str, Failures] = {}
    for table in tables:
        failed = table.filter(pc.is_in(table.column("status"), pa.array(["failed", "quarantined"])))
        for row in failed.select(["item_id", "error_class", "error"]).to_pylist():
            key = signature(row["error_class"] or "", row["error"] or "")
            group = groups.get(key)
            if group is None:
                error = row["error"] or ""
                command = shlex.join(["vidgen", "retry", output, "--where", like(key, error)])
                group = groups[key] = Failures(key, 0, row["item_id"], error, command)
            group.count += 1
    return sorted(groups.values(), key=lambda group: -group.count)
