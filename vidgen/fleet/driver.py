"""Drives one run to its end: the dispatcher's decisions, carried out.

Holds the lease, a window of the plan and one byte an item; feeds events to `dispatch.Dispatcher`, does what it says,
and writes what only the driver may write: failed and quarantined commits, attempts, ledger, progress, manifest. Imports
no ray (the fleet is given) and no torch: a head node has no GPU.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vidgen import VERSION, manifest
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.fleet.formation import replica_names as replica_names
from vidgen.fleet.observer import Observer
from vidgen.fleet.progress import Progress, ReplicaState, Snapshot
from vidgen.fleet.replica import Pulse
from vidgen.fleet.saving import Saves
from vidgen.fleet.supply import Supply
from vidgen.plan.files import total_rejected
from vidgen.store import commits, epochs, ledger
from vidgen.store.epochs import BEAT_SECONDS, Lease
from vidgen.store.objects import Objects, new_token
from vidgen.store.state import NAMES, State
from vidgen.types import Item, Plan, Record

LEDGER_RECORDS = 5_000
"""Commits gathered before they become a ledger part."""
POLL_SECONDS = 0.25


class Fleet(Protocol):
    """Replicas, wherever they run: `vidgen.fleet.cluster.RayFleet`."""

    def start(self, name: str, avoid: Sequence[str] = ()) -> None: ...
    def enlist(self, name: str, band: int, avoid: Sequence[str] = ()) -> None: ...
    def dismiss(self, name: str) -> None: ...
    def send(self, name: str, batch: int, works: tuple[ev.Work, ...]) -> None: ...
    def recall(self, name: str, within: float | None = None) -> None: ...
    def reclaim(self, name: str) -> None: ...
    def pulses(self) -> dict[str, Pulse | None]: ...
    def poll(self, timeout: float) -> list[ev.Event]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a run early. `gpu_seconds` is cumulative over the run, `deadline` in seconds since the epoch."""

    gpu_seconds: float | None = None
    deadline: float | None = None
    grace: float = 10.0
    """Seconds that what is in flight gets after an interrupt."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the exit code of the command line, why, and items by state."""

    code: int
    reason: str
    counts: dict[str, int]
    elapsed: float


@dataclass(slots=True)
class Interrupt:
    """Set by a signal handler, read by the loop. `grace`: seconds for what is in flight."""

    asked: bool = False
    grace: float | None = None


class Driver:
    """One run. `run()` returns when every item is terminal or the run must stop."""

    def __init__(
        self,
        name: str,
        objects: Objects,
        plans: Sequence[Plan],
        state: State,
        lease: Lease,
        fleet: Fleet,
        progress: Progress,
    ) -> None:
        self.name, self.objects, self.plans = name, objects, plans
        self.state, self.lease, self.fleet, self.progress = state, lease, fleet, progress
        self.total = len(state.status)
        self.rejected = total_rejected(plans)
        self.token = new_token()
        self.records: list[Record] = []
        self.suspects: set[str] = set()
        self.attempts: dict[str, list[commits.Attempt]] = {}
        """Those that count, of earlier drivers, by item."""
        self.tasks: list[Iterator[ev.Task]] = []
        self.saves = Saves(objects, lease.check)
        self.notes: dict[str, str] = {}
        self.reason = ""
        self.interrupt = Interrupt()
        self.only: np.ndarray | None = None
        """Ordinals of the items to make, of all that are pending; None: all."""
        self.observer = Observer(progress)
        self._stopping_until: float | None = None
        self._queue: list[ev.Event] = []
        self._spent_before = float(lease.before.get("gpu_seconds", 0.0))
        self._busy: dict[str, float] = {}
        self._outlived = not lease.unclean
        self._began = time.monotonic()
        self._looked_after = lease.last_beat

    # ---------------------------------------------------------------- the loop

    def run(self, rules: Rules, replicas: Sequence[str], limits: Limits) -> Outcome:
        """Runs until done, stopped or broken; always flushes what it knows before it returns."""
        with epochs.beating(self.lease):
            self._inherit()
        supply = Supply(self.objects, self.plans, self.state, rules, replicas, self._beat_if_due, self.only)
        self.tasks = [self._pending(supply, band) for band in range(1 + len(rules.bands))]
        dispatcher = self.dispatcher = Dispatcher(rules, list(replicas))
        if self.state.count("pending"):
            for name in replicas:
                self.fleet.start(name)
        self._feed(ev.Tick())
        while dispatcher.finished is None:
            for event in self.fleet.poll(POLL_SECONDS) or [ev.Tick()]:
                self._feed(event)
            self._housekeeping(limits)
        return self._end(dispatcher.finished)

    def _feed(self, event: ev.Event) -> None:
        self._awake()
        self.observer.heard(event)
        if isinstance(event, ev.ItemDone):
            self._settle(event.record)
        elif isinstance(event, ev.ReplicaLost):
            self._spent_before += self._busy.pop(event.replica, 0.0)  # its successor counts from zero
        elif isinstance(event, ev.NodeDraining):
            self.progress.say(f"node {event.node[:8]} will go: it gets nothing new")
        elif isinstance(event, ev.NodeStays):
            self.progress.say(f"node {event.node[:8]} will stay after all: it is used again")
        elif isinstance(event, ev.Noted):
            self.progress.say(f"{event.replica}: {event.text}", replica=event.replica)
        self.saves.hear(event, self.state.generation_of)
        self._queue.append(event)
        while self._queue:
            for action in self.dispatcher.handle(self._queue.pop(0), time.monotonic()):
                self._do(action)

    def _do(self, action: ev.Action) -> None:
        self._awake()
        self.observer.does(action)
        match action:
            case ev.Send():
                if not self._outlived:
                    self._beat()
                self.fleet.send(action.replica, action.batch, self.saves.aboard(action))
            case ev.Recall():
                self.fleet.recall(action.replica, action.within)
            case ev.Reclaim():
                self.fleet.reclaim(action.replica)
            case ev.Replace():
                self._spent_before += self._busy.pop(action.replica, 0.0)
                self.fleet.start(action.replica, action.avoid)
            case ev.Enlist():
                self.progress.say(f"replica {action.replica} is started, or waits for a place")
                self.fleet.enlist(action.replica, action.band, action.avoid)
            case ev.Dismiss():
                self.progress.say(f"replica {action.replica} is closed: its node goes, or it has nothing to do")
                self.fleet.dismiss(action.replica)
                self._spent_before += self._busy.pop(action.replica, 0.0)
            case ev.Look():
                record = commits.read_commit(self.objects, action.generation, action.item_id)
                if record is not None:
                    self._settle(record)
                else:
                    self.saves.look(action.generation, action.item_id)
                self._queue.append(ev.Looked(action.item_id, record))
            case ev.Evidence():
                attempt = commits.Attempt(
                    action.item_id, action.generation, action.error_class, action.count, new_token()
                )
                evidence = {"error": action.error, "node": action.node, "at": time.time()}
                ladder = {"rungs": ", ".join(action.rungs), "next": action.next} if action.rungs or action.next else {}
                commits.record_attempt(self.objects, attempt, {**evidence, **ladder})
            case ev.Settle():
                self._give_up(action)
            case ev.Refill():
                tasks = tuple(itertools.islice(self.tasks[action.band], action.items))
                self._queue.append(ev.Offered(tasks, len(tasks) < action.items, action.band))
            case ev.Say():
                self._say(action)
            case ev.Finish():
                pass

    def _say(self, said: ev.Say) -> None:
        if said.text:
            self.progress.say(f"note: {said.text}")
        if said.key:
            self.notes.pop(said.key, None)
        if said.key and said.text:
            self.notes[said.key] = said.text

    def _give_up(self, action: ev.Settle) -> None:
        task = action.task
        record = Record(
            item_id=task.item_id,
            ordinal=task.item.ordinal,
            status=action.status,
            generation=task.generation,
            attempt=task.attempt,
            error_class=action.error_class,
            error=action.error,
            node=action.node,
            rungs=", ".join(task.rungs),
            created_at=time.time(),
            vidgen_version=VERSION,
        )
        self.lease.check()
        _, truth = commits.commit(self.objects, record, self.token)
        self._settle(truth)

    def _settle(self, record: Record) -> None:
        news = record.ordinal < self.total and self.state.is_pending(record.ordinal)
        if self.state.settle(record):
            self.records.append(record)
            self.saves.settled(record)
            if news:
                self.observer.settled(record)

    # ---------------------------------------------------------------- what is to do

    def _inherit(self) -> None:
        """What a predecessor that died left: items in flight on this host are suspects, and one that was alone in
        flight as a suspect at another death gets a count (its token is the epoch's, so it counts once)."""
        attempts = list(commits.read_attempts(self.objects))
        self.saves.load(self.state.generation_of, attempts)
        before = self.lease.before
        self.suspects = set(before.get("in_flight", ()))
        if before.get("lone_suspect") is not None and len(self.suspects) == 1:
            (item_id,) = self.suspects
            token = f"epoch{before['lone_suspect']}"
            attempt = commits.Attempt(item_id, self.state.generation_of(item_id), "replica", 1.0, token)
            if attempt not in attempts:
                self.lease.check()
                commits.record_attempt(self.objects, attempt, {"error": "the driver died while it was alone in flight"})
                attempts.append(attempt)
        for attempt in attempts:
            if attempt.count and attempt.generation == self.state.generation_of(attempt.item_id):
                self.attempts.setdefault(attempt.item_id, []).append(attempt)

    def _pending(self, supply: Supply, band: int) -> Iterator[ev.Task]:
        """Pending items of a band in the run's order, suspects at the very end."""
        last: list[ev.Task] = []
        for item, place in supply.read(band):
            task = self._task(item, place)
            if item.item_id in self.suspects:
                task.suspect = True
                last.append(task)
            else:
                yield task
        yield from last

    def _task(self, item: Item, place: int) -> ev.Task:
        """An item, with what its attempts under earlier drivers count."""
        task = ev.Task(item, self.state.generation_of(item.item_id), place=place)
        for attempt in self.attempts.get(item.item_id, ()):
            task.count += attempt.count
            if attempt.error_class == "replica" and (host := commits.read_evidence(self.objects, attempt).get("node")):
                task.killed_on.add(host)
        return task

    # ---------------------------------------------------------------- beats, limits, display

    def _housekeeping(self, limits: Limits) -> None:
        now, pulses = time.monotonic(), self.fleet.pulses()
        for name, pulse in pulses.items():
            if pulse is not None:
                spent = pulse.busy * self.dispatcher.rules.degree_of.get(name, 1)
                self._busy[name] = max(self._busy.get(name, 0.0), spent)
        self._beat_if_due()
        if self.lease.last_beat != self._looked_after:  # whoever beat
            self._looked_after = self.lease.last_beat
            self._outlived = self._outlived or now - self._began > 2 * BEAT_SECONDS
            if self.lease.stop_requested():
                self._stop(130, "stopped by `vidgen stop`", None)
        if len(self.records) >= LEDGER_RECORDS:
            self._flush()
        if limits.gpu_seconds is not None and self.gpu_seconds() >= limits.gpu_seconds:
            self._stop(5, "run.max_gpu_hours is spent", None)
        if limits.deadline is not None and time.time() >= limits.deadline:
            self._stop(5, "run.deadline is reached", None)
        if self.interrupt.asked:
            grace = limits.grace if self.interrupt.grace is None else self.interrupt.grace
            self._stop(130, "interrupted", grace)
        if self._stopping_until is not None and now >= self._stopping_until and self.dispatcher.finished is None:
            self.dispatcher.finished = ev.Finish(130, "interrupted; what was in flight is made again by the next run")
        self._show(pulses)

    def _stop(self, code: int, reason: str, grace: float | None) -> None:
        if self.dispatcher.stopping is None:
            self.progress.say(f"{reason}: waiting for what is in flight")
            self._feed(ev.StopAsked(code, reason))
        if grace is not None:
            until = time.monotonic() + grace
            self._stopping_until = min(until, self._stopping_until or until)

    def _beat_if_due(self) -> bool:
        """Also called while something takes long between two rounds of the loop."""
        due = time.monotonic() - self.lease.last_beat >= BEAT_SECONDS
        if due:
            self.lease.check()
            self._beat()
        return due

    def _awake(self) -> None:
        """Before each thing that is done, of which there may be thousands at once (a lost node's items are looked up
        one by one): others see us, and after a gap of a lease we ask whether the run is still ours."""
        if not self._beat_if_due():
            self.lease.awake()

    def _beat(self) -> None:
        in_flight = self.dispatcher.in_flight()
        here = [item_id for item_id, node in in_flight.items() if node == self.dispatcher.rules.own_node]
        lone = self.lease.epoch if len(here) == 1 and here[0] in self.suspects else None
        self.lease.beat(in_flight=here, lone_suspect=lone, gpu_seconds=self.gpu_seconds(), counts=self.state.counts())

    def gpu_seconds(self) -> float:
        """Seconds that replicas have spent generating, over the whole run, those of every member of a gang."""
        return self._spent_before + sum(self._busy.values())

    def _show(self, pulses: Mapping[str, Pulse | None], state: str = "", last: bool = False) -> None:
        snapshot = self.snapshot(pulses, state)
        self.observer.show(snapshot, pulses, self.dispatcher.rules.degree_of, last=last)

    def snapshot(self, pulses: Mapping[str, Pulse | None], state: str = "") -> Snapshot:
        counts = self.state.counts()
        settled = self.total - counts["pending"]
        rate = self.progress.rate(settled)
        states = [
            ReplicaState(name, p.stage, p.step, p.steps, p.item_id) if p else ReplicaState(name, "starting")
            for name, p in sorted(pulses.items())
        ]
        return Snapshot(
            name=self.name,
            total=self.total,
            done=counts["done"],
            failed=counts["failed"],
            quarantined=counts["quarantined"],
            rejected=self.rejected,
            pending=counts["pending"],
            in_flight=len(self.dispatcher.in_flight()),
            queue=self.dispatcher.order.pending(),
            rate=rate * 3600 if rate else None,
            eta=counts["pending"] / rate if rate else None,
            elapsed=self.progress.elapsed(),
            gpu_seconds=self.gpu_seconds(),
            state=state or ("stopping" if self.dispatcher.stopping else "running"),
            replicas=states,
            notes=list(self.notes.values()),
            reason=self.reason,
        )

    # ---------------------------------------------------------------- the end

    def _flush(self) -> None:
        if self.records:
            self.lease.awake()
            ledger.write_part(self.objects, self.records)
            self.records = []

    def _end(self, finish: ev.Finish) -> Outcome:
        self.fleet.close()
        self._flush()
        counts = self.state.counts()
        code, reason = finish.code, finish.reason
        if code is None and counts["pending"]:
            code, reason = self._sampled()
        elif code is None:
            code = finished_code(counts)
            self.lease.check()
            with epochs.beating(self.lease, in_flight=[], gpu_seconds=self.gpu_seconds(), counts=counts):
                manifest.write(self.objects, self.plans, self.state, self.token, before_write=self.lease.check)
        self.lease.awake()
        whole = finish.code is None and not counts["pending"]
        self.reason = "" if whole else reason
        self._show(self.fleet.pulses(), "finished" if whole else "stopped", last=True)
        self.lease.release(in_flight=[], gpu_seconds=self.gpu_seconds(), counts=counts)
        return Outcome(code, reason, counts, self.progress.elapsed())

    def _sampled(self) -> tuple[int, str]:
        """Exit code and reason where all of a sample is terminal, and the rest is pending."""
        assert self.only is not None, "the dispatcher ends with everything it was offered"
        names = Counter(NAMES[code] for code in self.state.status[self.only].tolist())
        return finished_code(names), f"every item of the sample of {len(self.only)} is terminal"


def finished_code(counts: Mapping[str, int]) -> int:
    """Exit code of a run whose every item is terminal."""
    return 3 if counts["failed"] or counts["quarantined"] else 0
