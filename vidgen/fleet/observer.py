"""Sees what happens to a run and tells it on: numbers to the meter, lines to the log, a picture to the display.

The driver shows it every event, action, settled record and snapshot. Decides nothing, and writes nothing durable.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from vidgen.fleet import events as ev
from vidgen.fleet import metrics
from vidgen.fleet.metrics import Meter
from vidgen.fleet.progress import Progress, Snapshot
from vidgen.fleet.replica import Pulse
from vidgen.report.summary import STAGES
from vidgen.types import Record

STARTING, IDLE, WAITING = "starting", "idle", "waiting"
"""States of a replica that makes nothing; one that waits for its place has no GPU."""


class Observer:
    """`price` is run.price_per_gpu_hour; `clock` counts seconds from any origin."""

    def __init__(
        self,
        progress: Progress,
        meter: Meter | None = None,
        price: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.progress, self.meter, self.price, self.clock = progress, meter or Meter(), price, clock
        self._attempts: dict[str, tuple[str, int]] = {}
        self._seen_at = clock()
        self._states = {STARTING, IDLE, WAITING, *STAGES[:3]}

    # ---------------------------------------------------------------- what happens

    def heard(self, event: ev.Event) -> None:
        """An event, before the dispatcher has it."""
        match event:
            case ev.ReplicaReady():
                self.progress.note("the replica is ready", replica=event.replica)
            case ev.ReplicaLost():
                text = f"replica {event.replica} was lost ({event.cause}): {event.error}"
                self.progress.say(text, level="warning", replica=event.replica)
                self.meter.record(metrics.LOST, 1, cause=event.cause)
            case ev.ItemFailed():
                self.meter.record(metrics.ATTEMPTS_FAILED, 1, error_class=event.error_class)
                text = f"the attempt failed ({event.error_class}): {event.error}"
                self._note(text, event.item_id, "warning")

    def does(self, action: ev.Action) -> None:
        """An action, before it is carried out."""
        match action:
            case ev.Send():
                for work in action.works:
                    self._attempts[work.item.item_id] = (action.replica, work.attempt)
                    self.meter.record(metrics.RETRIES, int(work.attempt > 1))
                    self._note(f"sent in batch {action.batch} of {len(action.works)}", work.item.item_id, "debug")
            case ev.Finish():
                self.progress.note(action.reason)

    def settled(self, record: Record) -> None:
        """An item became terminal, and was not before."""
        self.meter.record(metrics.SETTLED, 1, state=record.status, error_class=record.error_class)
        if record.status == "done":
            self.meter.record(metrics.FRAMES, record.frames)
            self.meter.record(metrics.BYTES, record.bytes)
            for stage in STAGES:
                self.meter.record(metrics.STAGE_SECONDS, getattr(record, f"{stage}_s"), stage=stage)
            self._note(f"done: {record.video}", record.item_id, "info")
        else:
            self._note(f"{record.status} ({record.error_class}): {record.error}", record.item_id, "error")
        self._attempts.pop(record.item_id, None)

    def _note(self, text: str, item: str, level: str) -> None:
        replica, attempt = self._attempts.get(item, (None, None))
        self.progress.note(text, level=level, item=item, replica=replica, attempt=attempt)

    # ---------------------------------------------------------------- how it stands

    def show(
        self,
        snapshot: Snapshot,
        pulses: Mapping[str, Pulse | None],
        degree_of: Mapping[str, int],
        *,
        last: bool = False,
    ) -> None:
        """How the run stands now, to the display and progress.json. `degree_of`: GPUs of a replica, 1 if not named."""
        now = self.clock()
        since, self._seen_at = now - self._seen_at, now
        spent: Counter[str] = Counter()
        for name, pulse in pulses.items():
            state = _state(STARTING if pulse is None else pulse.stage)
            spent[state if state in (STARTING, IDLE, WAITING) else "busy"] += degree_of.get(name, 1)
        del spent[WAITING]
        for state, gpus in spent.items():
            self.meter.record(metrics.GPU_SECONDS, gpus * since, state=state)
        snapshot.cost = snapshot.gpu_seconds / 3600 * self.price if self.price is not None else None
        self._gauges(snapshot)
        snapshot.metrics = self.meter.values()
        self.progress.show(snapshot, last=last)

    def _gauges(self, snapshot: Snapshot) -> None:
        record = self.meter.record
        for state in ("pending", "done", "failed", "quarantined", "rejected"):
            record(metrics.ITEMS, getattr(snapshot, state), state=state)
        record(metrics.IN_FLIGHT, snapshot.in_flight)
        record(metrics.QUEUE, snapshot.queue)
        states = Counter(_state(replica.stage) for replica in snapshot.replicas)
        self._states.update(states)
        for state in sorted(self._states):
            record(metrics.REPLICAS, states[state], state=state)
        record(metrics.SPENT, snapshot.gpu_seconds)
        if snapshot.cost is not None:
            record(metrics.COST, snapshot.cost)
        record(metrics.RATE, snapshot.rate or 0.0)
        record(metrics.LEFT, snapshot.eta or 0.0)


def _state(stage: str) -> str:
    """A replica's stage without what it says beside: what it waits for."""
    return WAITING if stage.startswith(WAITING) else stage
