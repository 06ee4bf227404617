"""How far a run is: counts, rate, time left.

Shown live in a terminal, as a line every few seconds in a log, and mirrored in OUTPUT/progress.json so that
`vidgen status` needs no cluster. On request the log is JSON lines instead (`vidgen.fleet.log`). Decides nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vidgen import faults
from vidgen.fleet import log
from vidgen.report.wording import duration
from vidgen.store.objects import Objects

LOG_SECONDS = 5.0
RATE_WINDOW = 300.0
"""Seconds over which the rate is measured."""


@dataclass(slots=True)
class ReplicaState:
    """One replica: starting, idle, or the stage of the item it makes."""

    name: str
    stage: str
    step: int = 0
    steps: int = 0
    item_id: str = ""

    def text(self) -> str:
        step = f" {self.step}/{self.steps}" if self.steps else ""
        return f"{self.stage}{step}" + (f" {self.item_id[:8]}" if self.item_id and self.stage != "idle" else "")


@dataclass(slots=True)
class Snapshot:
    """What a person wants to know while it runs. `rate` is items an hour, `eta` seconds left; None while unknown.
    `queue` is pending items that the driver has read and no replica has, `cost` in the currency of
    run.price_per_gpu_hour, `metrics` what `vidgen.fleet.metrics` declares, by name."""

    name: str
    total: int
    done: int
    failed: int
    quarantined: int
    rejected: int
    pending: int
    in_flight: int
    rate: float | None
    eta: float | None
    elapsed: float
    gpu_seconds: float
    state: str
    queue: int = 0
    cost: float | None = None
    replicas: list[ReplicaState] = field(default_factory=list)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What holds now and a person should know: a node that is avoided, a shape that does not fit as others do."""
    reason: str = ""
    """Why a driver stopped with items pending; "" as long as it drives, and after the last item."""
    updated_at: float = field(default_factory=time.time)


class Progress:
    """Feeds one display and progress.json. `interactive` None: live where standard error is a terminal. `json`: no
    display but JSON lines, those of `note` among them; `run` is the run's name in them."""

    def __init__(
        self, objects: Objects, *, interactive: bool | None = None, quiet: bool = False, json: bool = False
    ) -> None:
        self.objects = objects
        self.console = Console(stderr=True)
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self.quiet, self.json = quiet, json
        self.run: str | None = None
        self._live: Live | None = None
        self._last_line = self._last_write = 0.0
        self._history: deque[tuple[float, int]] = deque()
        self._began = time.monotonic()

    def rate(self, settled: int) -> float | None:
        """Items a second over the last minutes, from the count of settled items now."""
        now = time.monotonic()
        self._history.append((now, settled))
        while self._history[0][0] < now - RATE_WINDOW:
            self._history.popleft()
        since, before = self._history[0]
        if settled == before or now - since < 0.5:
            return None
        return (settled - before) / (now - since)

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str, level: str = "info", replica: str | None = None) -> None:
        """One line, above the live display or in the log."""
        if self.json:
            self.note(text, level, replica=replica)
        elif not self.quiet:
            self.console.print(Text(text), highlight=False, soft_wrap=True)

    def note(
        self,
        text: str,
        level: str = "info",
        *,
        item: str | None = None,
        replica: str | None = None,
        attempt: int | None = None,
    ) -> None:
        """One line of the JSON log; too much for a person to read."""
        if self.json:
            written = log.line(text, level, run=self.run, item=item, replica=replica, attempt=attempt)
            print(written, file=sys.stderr, flush=True)

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        now = time.monotonic()
        if not self.quiet and not self.json and self.interactive:
            if self._live is None:
                self._live = Live(console=self.console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(panel(snapshot))
        elif (not self.quiet or self.json) and (last or now - self._last_line >= LOG_SECONDS):
            self._last_line = now
            self.say(line(snapshot))
        if last or now - self._last_write >= LOG_SECONDS:
            self._last_write = now
            with faults.around("progress"):
                self.objects.put("progress.json", json.dumps(asdict(snapshot), indent=1).encode())
        if last:
            self.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def line(snapshot: Snapshot) -> str:
    """One log line."""
    parts = [f"{snapshot.done}/{snapshot.total} done"]
    if snapshot.failed or snapshot.quarantined:
        parts.append(f"{snapshot.failed} failed, {snapshot.quarantined} quarantined")
    parts.append(f"{snapshot.in_flight} in flight")
    if snapshot.rate:
        parts.append(f"{snapshot.rate:,.0f} items/h")
    if snapshot.eta is not None:
        parts.append(f"{duration(snapshot.eta)} left")
    busy = [f"{r.name}: {r.text()}" for r in snapshot.replicas[:8]]
    return f"[{snapshot.name}] {', '.join(parts)}" + (f" | {'; '.join(busy)}" if busy else "")


def panel(snapshot: Snapshot) -> Group:
    """The live display: a bar, the counts, a line a replica."""
    settled = snapshot.done + snapshot.failed + snapshot.quarantined
    head = Text.assemble(
        (f" {snapshot.name} ", "bold reverse"),
        f"  {snapshot.state}  ",
        (f"{snapshot.done} done", "green"),
        ("" if not snapshot.failed else f"  {snapshot.failed} failed", "red"),
        ("" if not snapshot.quarantined else f"  {snapshot.quarantined} quarantined", "magenta"),
        ("" if not snapshot.rejected else f"  {snapshot.rejected} rejected", "yellow"),
        f"  of {snapshot.total}   ",
        f"{snapshot.rate:,.0f} items/h   " if snapshot.rate else "",
        f"{duration(snapshot.eta)} left" if snapshot.eta is not None else "",
    )
    replicas = Table.grid(padding=(0, 2))
    for replica in snapshot.replicas[:16]:
        replicas.add_row(Text(f"  {replica.name}", "cyan"), replica.text())
    if len(snapshot.replicas) > 16:
        replicas.add_row("", f"and {len(snapshot.replicas) - 16} more replicas")
    bar = Table.grid()
    bar.add_row(ProgressBar(total=max(1, snapshot.total), completed=settled, width=80))
    return Group(head, bar, replicas, *(Text(f"  {note}", "yellow") for note in snapshot.notes[:4]))
