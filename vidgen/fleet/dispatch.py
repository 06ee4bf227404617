"""The driver's decisions as a pure state machine: events in, actions out.

No ray, no clock, no storage: time comes with each event, and what must be done comes out as values. It decides which
replica gets work, what is looked up when one dies, and when the run must stop; `judgement` what a failure counts,
`order` which item goes next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vidgen.fleet.events import (
    Action,
    BatchGenerated,
    BatchReturned,
    Event,
    Finish,
    ItemDone,
    ItemFailed,
    Look,
    Looked,
    Offered,
    Recall,
    Refill,
    Replace,
    ReplicaLost,
    ReplicaReady,
    Send,
    StopAsked,
    Task,
    Tick,
    Work,
)
from vidgen.fleet.judgement import CRASH_COUNT, Judge, Withheld
from vidgen.fleet.order import Order
from vidgen.fleet.rules import Rules as Rules

START_FAILURES = 3
"""Replicas that may fail to start, with none ever ready, before the run stops."""


@dataclass(slots=True)
class Batch:
    number: int
    tasks: dict[str, Task]
    generated: bool = False
    size: int = 0


@dataclass(slots=True)
class Replica:
    name: str
    band: int = 0
    node: str = ""
    ready: bool = False
    batches: dict[int, Batch] = field(default_factory=dict)

    def waiting(self) -> int:
        """Batches whose frames are not made yet."""
        return sum(not batch.generated for batch in self.batches.values())


@dataclass(slots=True)
class Starts:
    """How the replicas of one band come up."""

    failures: int = 0
    ever_ready: bool = False


class Dispatcher:
    """One run's decisions. `handle(event, now)` returns the actions in the order in which they must be done."""

    def __init__(self, rules: Rules, replicas: list[str]) -> None:
        self.rules = rules
        self.replicas = {name: self._replica(name) for name in replicas}
        self.order, self.judge = Order(rules), Judge(rules)
        self._starts = [Starts() for _ in self.order.bands]
        self._served = {replica.band for replica in self.replicas.values()}
        self.looking: dict[str, tuple[Task, ReplicaLost, bool, str]] = {}
        self.stopping: StopAsked | None = None
        self.finished: Finish | None = None
        self._number = 0

    # ---------------------------------------------------------------- what is where

    def _replica(self, name: str) -> Replica:
        return Replica(name, self.rules.band_of.get(name, 0))

    def in_flight(self) -> dict[str, str]:
        """Item id -> node, of everything a replica has."""
        return {
            item_id: replica.node
            for replica in self.replicas.values()
            for batch in replica.batches.values()
            for item_id in batch.tasks
        }

    def _aboard(self, node: str) -> list[Task]:
        there = (replica for replica in self.replicas.values() if replica.node == node)
        return [task for replica in there for batch in replica.batches.values() for task in batch.tasks.values()]

    # ---------------------------------------------------------------- events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes one event into account at time `now` (seconds, any origin)."""
        actions: list[Action] = []
        match event:
            case Offered():
                band = self.order.bands[event.band]
                band.asked = False
                band.exhausted = band.exhausted or event.exhausted
                for task in event.tasks:
                    self._admit(task, actions)
            case ReplicaReady():
                replica = self.replicas.setdefault(event.replica, self._replica(event.replica))
                replica.ready, replica.node = True, event.node
                starts = self._starts[replica.band]
                starts.ever_ready, starts.failures = True, 0
            case ReplicaLost():
                self._lost(event, now, actions)
            case BatchGenerated():
                batch = self._batch(event.replica, event.batch)
                batch.generated = True
                self._forget_if_empty(event.replica, event.batch)
            case BatchReturned():
                self._returned(event)
            case ItemDone():
                self._done(event, actions)
            case ItemFailed():
                self._failed(event, now, actions)
            case Looked():
                self._looked(event, now, actions)
            case StopAsked():
                if self.stopping is None:
                    self.stopping = event
                    actions += [Recall(name) for name, r in self.replicas.items() if r.ready and r.batches]
            case Tick():
                pass
        self._decide(now, actions)
        return actions

    def _batch(self, replica: str, number: int) -> Batch:
        known = self.replicas.get(replica)
        return (known.batches.get(number) if known else None) or Batch(number, {})

    def _returned(self, event: BatchReturned) -> None:
        replica = self.replicas.get(event.replica)
        batch = replica.batches.get(event.batch) if replica else None
        if batch is None:
            return
        chosen = event.items or tuple(batch.tasks)
        self._queue([batch.tasks.pop(item_id) for item_id in chosen if item_id in batch.tasks])
        batch.generated = True  # what is left of it is being written
        self._forget_if_empty(event.replica, event.batch)

    def _forget_if_empty(self, replica: str, number: int) -> None:
        known = self.replicas.get(replica)
        batch = known.batches.get(number) if known else None
        if known is not None and batch is not None and not batch.tasks and batch.generated:
            del known.batches[number]

    def _take(self, replica: str, item_id: str) -> tuple[Task | None, Batch | None]:
        """Removes an item from the batch it flies in."""
        for batch in self.replicas[replica].batches.values() if replica in self.replicas else ():
            if item_id in batch.tasks:
                task = batch.tasks.pop(item_id)
                self._forget_if_empty(replica, batch.number)
                return task, batch
        return None, None

    def _admit(self, task: Task, actions: list[Action]) -> None:
        if self.rules.band(task.item.tokens) not in self._served and self.finished is None:
            self.finished = Finish(2, f"no replica is for items of {task.item.tokens:,} tokens")
            actions.append(self.finished)
        if self.judge.admits(task, actions):
            self.order.add(task)

    def _queue(self, tasks: list[Task]) -> None:
        for task in tasks:
            self.order.add(task)

    def _done(self, event: ItemDone, actions: list[Action]) -> None:
        self._take(event.replica, event.record.item_id)
        self._queue(self.judge.success(actions))

    def _failed(self, event: ItemFailed, now: float, actions: list[Action]) -> None:
        node = self.replicas[event.replica].node if event.replica in self.replicas else ""
        task, batch = self._take(event.replica, event.item_id)
        if task is None or batch is None:
            return
        if event.error_class in ("item", "capacity") and batch.size > 1:
            # Whose fault it was cannot be told from a batch: its items run one by one.
            self.judge.mark(event.signature)
            task.alone = True
            self.order.add(task)
        elif event.error_class == "infrastructure":
            self.judge.mark(event.signature)
            self.order.add_later(task, now + self.judge.backoff(event.signature))
        else:
            held = Withheld(task, event.error_class, event.error, node, 1.0)
            self._queue(self.judge.failed(held, event.signature, actions))

    def _lost(self, event: ReplicaLost, now: float, actions: list[Action]) -> None:
        replica = self.replicas.pop(event.replica, None)
        if replica is None:
            return
        if event.cause == "refused":
            self.finished = Finish(2, event.error)
            actions.append(self.finished)
            return
        if event.cause == "start":
            starts = self._starts[replica.band]
            starts.failures += 1
            if not starts.ever_ready and starts.failures >= START_FAILURES:
                self.finished = Finish(4, f"no replica became ready: {event.error}")
                actions.append(self.finished)
                return
        aboard = [task for batch in replica.batches.values() for task in batch.tasks.values()]
        if not aboard or event.cause == "gang":
            self.judge.mark(event.cause)
        guilty = event.cause in ("crash", "hang") and len(aboard) == 1
        for task in aboard:
            # Who killed a replica with several items aboard cannot be told: each flies alone from now on.
            task.alone = task.alone or event.cause in ("crash", "hang")
            self.looking[task.item_id] = (task, event, guilty, replica.node)
            actions.append(Look(task.item_id, task.generation))
        if self.stopping is None:
            self.replicas[event.replica] = self._replica(event.replica)
            actions.append(Replace(event.replica))

    def _looked(self, event: Looked, now: float, actions: list[Action]) -> None:
        task, lost, blamed, node = self.looking.pop(event.item_id)
        if event.record is not None:
            self._queue(self.judge.success(actions))
        elif blamed:
            task.killed_on.add(node)
            error = f"the replica was lost ({lost.cause}): {lost.error}"
            held = Withheld(task, "replica", error, node, CRASH_COUNT)
            self._queue(self.judge.failed(held, lost.cause, actions))
        else:
            self.order.add(task)

    # ---------------------------------------------------------------- decisions

    def _decide(self, now: float, actions: list[Action]) -> None:
        if self.finished is not None:
            return
        if reason := self.judge.broken():
            self.finished = Finish(4, reason)
            actions.append(self.finished)
            return
        self.order.release(now)
        if self.stopping is None:
            self._assign(actions)
            for number, band in enumerate(self.order.bands):
                if room := self.order.room(number):
                    band.asked = True
                    actions.append(Refill(room, number))
        idle = not self.in_flight() and not self.looking
        everything = self.order.exhausted() and not self.order.pending()
        if idle and self.stopping is not None and not (everything and not self.judge.withheld):
            self.finished = Finish(self.stopping.code, self.stopping.reason)
            actions.append(self.finished)
        elif idle and everything:
            self._finish_or_retry_withheld(actions)

    def _finish_or_retry_withheld(self, actions: list[Action]) -> None:
        if self.judge.withheld:
            self._queue(self.judge.end(actions))
            self._assign(actions)
        if not self.in_flight() and not self.order.pending():
            self.finished = Finish(None, "every item is terminal")
            actions.append(self.finished)

    def _assign(self, actions: list[Action]) -> None:
        ready = [replica for replica in self.replicas.values() if replica.ready]
        for depth in range(1 + self.rules.prefetch):
            for replica in sorted(ready, key=Replica.waiting):
                if replica.waiting() <= depth:
                    batch = self._next_batch(replica, sum(other.band == replica.band for other in ready))
                    if batch is not None:
                        replica.batches[batch.number] = batch
                        works = tuple(Work(t.item, t.generation, t.attempt) for t in batch.tasks.values())
                        actions.append(Send(replica.name, batch.number, works))

    def _next_batch(self, replica: Replica, ready: int) -> Batch | None:
        """The next items for a replica. An item that must fly alone has a replica to itself, nothing prefetched behind
        it, so that a crash has one suspect; one from a driver that died, the driver's whole machine."""
        first = self.order.first(replica.band)
        if first is None or (replica.batches and (first.alone or first.suspect or _flies_alone(replica))):
            return None
        if replica.node == self.rules.own_node:
            aboard = self._aboard(replica.node)
            if any(task.suspect for task in aboard) or (first.suspect and aboard):
                return None
        tasks = self.order.take(replica.band, ready)
        for task in tasks:
            task.attempt += 1
        self._number += 1
        return Batch(self._number, {task.item_id: task for task in tasks}, size=len(tasks))


def _flies_alone(replica: Replica) -> bool:
    return any(task.alone or task.suspect for batch in replica.batches.values() for task in batch.tasks.values())
