"""The driver's decisions as a pure state machine: events in, actions out.

No ray, no clock, no storage: time comes with each event, and what must be done comes out as values. It decides which
item goes to which replica, what a failure counts, when an item is given up, and when the run must stop.

Failures are judged by class: an item's own failure counts 1, a crash of the replica that ran it alone 0.5, lost nodes
and storage trouble nothing. Counted failures are withheld while nothing succeeds, so that a bad configuration trips the
breaker instead of burning the dataset.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from vidgen.fleet.events import (
    Action,
    BatchGenerated,
    BatchReturned,
    Event,
    Evidence,
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
    Settle,
    StopAsked,
    Task,
    Tick,
    Work,
)

INFRASTRUCTURE_BACKOFF = 2.0
"""Seconds before an item that met storage or node trouble is tried again, doubled with each event of the streak."""
MAX_BACKOFF = 60.0
CRASH_COUNT = 0.5
START_FAILURES = 3
"""Replicas that may fail to start, with none ever ready, before the run stops."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`window`: items known at once. `batch_tokens`, `batch_items`: most tokens and items of a batch (1 item always
    fits). `prefetch`: batches waiting in a replica beside the running one. `own_node`: the driver's machine.

    `bands`: token counts, rising. Items of at most the first are of band 0, above it of band 1, and so on; `band_of`
    says which band a replica serves (0 where it says nothing), and an item goes to replicas of its own band only.
    `degree_of`: members of a replica, where it is a gang."""

    max_attempts: int = 3
    breaker_failures: int = 50
    window: int = 4096
    batch_tokens: int = 0
    batch_items: int = 1
    prefetch: int = 1
    own_node: str = ""
    bands: tuple[int, ...] = ()
    band_of: Mapping[str, int] = field(default_factory=dict)
    degree_of: Mapping[str, int] = field(default_factory=dict)

    def band(self, tokens: int) -> int:
        """The band of an item of so many tokens."""
        return bisect.bisect_left(self.bands, tokens)


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
class Band:
    """What waits for the replicas of one band. `asked`: more of the plan is on its way; `exhausted`: there is none."""

    order: list[tuple[tuple[object, ...], Task]] = field(default_factory=list)
    asked: bool = False
    exhausted: bool = False
    start_failures: int = 0
    ever_ready: bool = False


@dataclass(slots=True)
class Withheld:
    """A counted failure that waits for a success, or for the end of everything else."""

    task: Task
    error_class: str
    error: str
    node: str
    count: float


class Dispatcher:
    """One run's decisions. `handle(event, now)` returns the actions in the order in which they must be done."""

    def __init__(self, rules: Rules, replicas: list[str]) -> None:
        self.rules = rules
        self.replicas = {name: self._replica(name) for name in replicas}
        self._bands = [Band() for _ in range(1 + len(rules.bands))]
        self._served = {replica.band for replica in self.replicas.values()}
        self._later: list[tuple[float, int, Task]] = []
        self.looking: dict[str, tuple[Task, ReplicaLost, bool, str]] = {}
        self.withheld: dict[str, Withheld] = {}
        self.streak: Counter[str] = Counter()
        self.final = False
        self.stopping: StopAsked | None = None
        self.finished: Finish | None = None
        self._number = 0

    # ---------------------------------------------------------------- what is where

    def pending(self) -> int:
        return sum(len(band.order) for band in self._bands) + len(self._later)

    def _replica(self, name: str) -> Replica:
        return Replica(name, self.rules.band_of.get(name, 0))

    def _band(self, task: Task) -> Band:
        return self._bands[self.rules.band(task.item.tokens)]

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
                band = self._bands[event.band]
                band.asked = False
                band.exhausted = band.exhausted or event.exhausted
                for task in event.tasks:
                    self._admit(task, actions)
            case ReplicaReady():
                replica = self.replicas.setdefault(event.replica, self._replica(event.replica))
                replica.ready, replica.node = True, event.node
                band = self._bands[replica.band]
                band.ever_ready, band.start_failures = True, 0
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
        batch = replica.batches.pop(event.batch, None) if replica else None
        for task in batch.tasks.values() if batch else ():
            self._queue(task)

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
        """An item whose earlier attempts used up its allowance is settled, not run again."""
        if self.rules.band(task.item.tokens) not in self._served and self.finished is None:
            self.finished = Finish(2, f"no replica is for items of {task.item.tokens:,} tokens")
            actions.append(self.finished)
        if task.count >= self.rules.max_attempts:
            actions.append(Settle(task, "failed", "replica", f"gave up after attempts that weigh {task.count:g}"))
        else:
            self._queue(task)

    def _queue(self, task: Task) -> None:
        # Suspects last; then by priority; then longest first, equal shapes together.
        item = task.item
        key = (task.suspect, -item.priority, -item.flops, item.batch_key, item.ordinal)
        heapq.heappush(self._band(task).order, (key, task))

    def _done(self, event: ItemDone, actions: list[Action]) -> None:
        self._take(event.replica, event.record.item_id)
        self._success(actions)

    def _success(self, actions: list[Action]) -> None:
        self.streak.clear()
        for held in list(self.withheld.values()):
            self._count(held, actions)
        self.withheld.clear()

    def _count(self, held: Withheld, actions: list[Action]) -> None:
        """A withheld failure becomes a counted one: the item is tried again or given up."""
        task = held.task
        actions.append(Evidence(task.item_id, task.generation, held.error_class, held.count, held.error, held.node))
        self._retry_or_settle(held, actions)

    def _retry_or_settle(self, held: Withheld, actions: list[Action]) -> None:
        task = held.task
        if len(task.killed_on) >= 2:
            actions.append(Settle(task, "quarantined", held.error_class, held.error))
        elif task.count >= self.rules.max_attempts:
            actions.append(Settle(task, "failed", held.error_class, held.error))
        else:
            self._queue(task)

    def _failed(self, event: ItemFailed, now: float, actions: list[Action]) -> None:
        node = self.replicas[event.replica].node if event.replica in self.replicas else ""
        task, batch = self._take(event.replica, event.item_id)
        if task is None or batch is None:
            return
        if event.error_class in ("item", "capacity") and batch.size > 1:
            # Whose fault it was cannot be told from a batch: its items run one by one.
            self._mark(event.signature)
            task.alone = True
            self._queue(task)
            return
        if event.error_class == "infrastructure":
            self._mark(event.signature)
            delay = min(MAX_BACKOFF, INFRASTRUCTURE_BACKOFF * 2 ** min(self.streak[event.signature] - 1, 10))
            task.not_before = now + delay
            heapq.heappush(self._later, (task.not_before, task.item.ordinal, task))
            return
        self._withhold(Withheld(task, event.error_class, event.error, node, 1.0), event.signature, actions)

    def _withhold(self, held: Withheld, signature: str, actions: list[Action]) -> None:
        task = held.task
        task.count += held.count
        if self.final:
            self._count(held, actions)
            return
        self._mark(signature)
        actions.append(Evidence(task.item_id, task.generation, held.error_class, 0.0, held.error, held.node))
        self.withheld[task.item_id] = held

    def _mark(self, signature: str) -> None:
        self.streak[signature] += 1

    def _lost(self, event: ReplicaLost, now: float, actions: list[Action]) -> None:
        replica = self.replicas.pop(event.replica, None)
        if replica is None:
            return
        if event.cause == "refused":
            self.finished = Finish(2, event.error)
            actions.append(self.finished)
            return
        if event.cause == "start":
            band = self._bands[replica.band]
            band.start_failures += 1
            if not band.ever_ready and band.start_failures >= START_FAILURES:
                self.finished = Finish(4, f"no replica became ready: {event.error}")
                actions.append(self.finished)
                return
        aboard = [task for batch in replica.batches.values() for task in batch.tasks.values()]
        if not aboard or event.cause == "gang":
            self._mark(event.cause)
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
            self._success(actions)
        elif blamed:
            task.killed_on.add(node)
            error = f"the replica was lost ({lost.cause}): {lost.error}"
            self._withhold(Withheld(task, "replica", error, node, CRASH_COUNT), lost.cause, actions)
        else:
            self._queue(task)

    # ---------------------------------------------------------------- decisions

    def _decide(self, now: float, actions: list[Action]) -> None:
        if self.finished is not None:
            return
        worst = max(self.streak.items(), key=lambda pair: pair[1], default=("", 0))
        if worst[1] >= self.rules.breaker_failures:
            reason = f"{worst[1]} failures in a row without a success: {worst[0]}"
            self.finished = Finish(4, reason)
            actions.append(self.finished)
            return
        while self._later and self._later[0][0] <= now:
            self._queue(heapq.heappop(self._later)[2])
        if self.stopping is None:
            self._assign(actions)
            for number, band in enumerate(self._bands):
                room = self.rules.window - len(band.order) - len(self._later)
                if not band.exhausted and not band.asked and room >= max(1, self.rules.window // 2):
                    band.asked = True
                    actions.append(Refill(room, number))
        idle = not self.in_flight() and not self.looking
        everything = all(band.exhausted for band in self._bands) and not self.pending()
        if idle and self.stopping is not None and not (everything and not self.withheld):
            self.finished = Finish(self.stopping.code, self.stopping.reason)
            actions.append(self.finished)
        elif idle and everything:
            self._finish_or_retry_withheld(actions)

    def _finish_or_retry_withheld(self, actions: list[Action]) -> None:
        """Nothing else is pending: what was withheld is counted, tried as often as it may be, and settled."""
        if self.withheld:
            self.final = True
            self.streak.clear()
            for held in list(self.withheld.values()):
                self._count(held, actions)
            self.withheld.clear()
            self._assign(actions)
        if not self.in_flight() and not self.pending():
            self.finished = Finish(None, "every item is terminal")
            actions.append(self.finished)

    def _assign(self, actions: list[Action]) -> None:
        ready = [replica for replica in self.replicas.values() if replica.ready]
        for depth in range(1 + self.rules.prefetch):
            for replica in sorted(ready, key=Replica.waiting):
                if replica.waiting() <= depth and self._bands[replica.band].order:
                    batch = self._next_batch(replica, sum(other.band == replica.band for other in ready))
                    if batch is not None:
                        replica.batches[batch.number] = batch
                        works = tuple(Work(t.item, t.generation, t.attempt) for t in batch.tasks.values())
                        actions.append(Send(replica.name, batch.number, works))

    def _next_batch(self, replica: Replica, ready: int) -> Batch | None:
        """The next items for a replica: one shape, as many as fit. An item that must fly alone has a replica to itself,
        nothing prefetched behind it, so that a crash has one suspect; one from a driver that died, the driver's whole
        machine."""
        order = self._bands[replica.band].order
        first = order[0][1]
        if replica.batches and (first.alone or first.suspect or _flies_alone(replica)):
            return None
        if replica.node == self.rules.own_node:
            aboard = self._aboard(replica.node)
            if any(task.suspect for task in aboard) or (first.suspect and aboard):
                return None
        share = -(-len(order) // (2 * max(1, ready)))
        most = max(1, min(self.rules.batch_items, share))
        tasks = [heapq.heappop(order)[1]]
        tokens = first.item.tokens
        while order and len(tasks) < most and not first.alone and not first.suspect:
            task = order[0][1]
            tokens += task.item.tokens
            if task.item.batch_key != first.item.batch_key or task.alone or task.suspect:
                break
            if tokens > self.rules.batch_tokens:
                break
            tasks.append(heapq.heappop(order)[1])
        for task in tasks:
            task.attempt += 1
        self._number += 1
        return Batch(self._number, {task.item_id: task for task in tasks}, size=len(tasks))


def _flies_alone(replica: Replica) -> bool:
    return any(task.alone or task.suspect for batch in replica.batches.values() for task in batch.tasks.values())
