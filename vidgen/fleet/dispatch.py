"""The driver's decisions as a pure state machine: events in, actions out.

No ray, no clock, no storage: time comes with each event, and what must be done comes out as values. It decides which
replica gets work, what is looked up when one dies, and when the run must stop; `judgement` what a failure counts,
`order` which item goes next, `health` which node is avoided, `starts` when a start is tried again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from vidgen.fleet import tail
from vidgen.fleet.aboard import Batch, Replica, barred, flies_alone
from vidgen.fleet.drain import Draining
from vidgen.fleet.elastic import Elastic, Standing, next_name
from vidgen.fleet.events import (
    Action,
    BatchGenerated,
    BatchReturned,
    Dismiss,
    Enlist,
    Event,
    Finish,
    ItemDone,
    ItemFailed,
    Look,
    Looked,
    Machine,
    NodeDraining,
    NodeStays,
    Offered,
    Recall,
    Reclaim,
    Refill,
    Replace,
    ReplicaLost,
    ReplicaReady,
    Room,
    Say,
    Send,
    StopAsked,
    Task,
    Tick,
    Work,
)
from vidgen.fleet.health import PAROLE_SECONDS, Health
from vidgen.fleet.judgement import CRASH_COUNT, Judge, Withheld
from vidgen.fleet.order import Barred, Order
from vidgen.fleet.rules import Rules as Rules
from vidgen.fleet.starts import Starts


class Dispatcher:
    """One run's decisions. `handle(event, now)` returns the actions in the order in which they must be done."""

    def __init__(self, rules: Rules, replicas: list[str]) -> None:
        bands = {name: rules.band_of.get(name, 0) for name in replicas}
        self.rules = replace(rules, band_of={**rules.band_of, **bands})
        self.replicas = {name: self._replica(name) for name in replicas}
        self.order, self.judge, self.health = Order(rules), Judge(rules), Health()
        self.draining, self.elastic = Draining(), Elastic(rules.idle_seconds)
        self.starts = Starts(len(self.order.bands))
        self._served = {replica.band for replica in self.replicas.values()}
        self.looking: dict[str, tuple[Task, ReplicaLost, bool, Machine]] = {}
        self.stopping: StopAsked | None = None
        self.finished: Finish | None = None
        self._number = 0
        self._hosts: dict[str, str] = {}
        self._moved: set[str] = set()

    # ---------------------------------------------------------------- what is where

    def _replica(self, name: str) -> Replica:
        return Replica(name, self.rules.band_of.get(name, 0))

    def in_flight(self) -> dict[str, str]:
        """Item id -> node, of everything a replica has."""
        return {task.item_id: replica.node for replica in self.replicas.values() for task in replica.aboard()}

    def _flying(self) -> bool:
        return any(batch.tasks for replica in self.replicas.values() for batch in replica.batches.values())

    def _aboard(self, node: str) -> list[Task]:
        return [task for replica in self.replicas.values() if replica.node == node for task in replica.aboard()]

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
                replica.ready, replica.node, replica.host = True, event.node, event.host or event.node
                self._hosts[event.node] = replica.host
                self.starts.ready(replica.band)
            case ReplicaLost():
                self._lost(event, now, actions)
            case BatchGenerated():
                if (made_by := self.replicas.get(event.replica)) is not None:
                    made_by.generated(event.batch)
            case BatchReturned():
                self._returned(event)
            case ItemDone():
                self._done(event, actions)
            case ItemFailed():
                self._failed(event, now, actions)
            case Looked():
                self._looked(event, now, actions)
            case NodeDraining() | NodeStays():
                actions += self.draining.notice(event, self.replicas.values(), now)
            case Room():
                self.elastic.room = event.replicas
            case StopAsked():
                if self.stopping is None:
                    self.stopping = event
                    actions += [Recall(name) for name, r in self.replicas.items() if r.ready and r.batches]
            case Tick():
                pass
        self._decide(now, actions)
        return actions

    def _returned(self, event: BatchReturned) -> None:
        replica = self.replicas.get(event.replica)
        for task in replica.give_back(event.batch, event.items) if replica is not None else ():
            task.attempt -= not event.items  # of a batch as a whole nothing was started
            self.order.add(task)

    def _take(self, replica: str, item_id: str) -> tuple[Task | None, Batch | None]:
        """Removes an item from the batch it flies in."""
        return self.replicas[replica].take(item_id) if replica in self.replicas else (None, None)

    def _admit(self, task: Task, actions: list[Action]) -> None:
        if self.rules.band(task.item.tokens) not in self._served and self.finished is None:
            self.finished = Finish(2, f"no replica is for items of {task.item.tokens:,} tokens")
            actions.append(self.finished)
        if self.judge.admits(task, actions):
            self.judge.ease(task)
            self.order.add(task)

    def _queue(self, tasks: list[Task]) -> None:
        for task in tasks:
            self.order.add(task)

    def _node(self, replica: str) -> str:
        return self.replicas[replica].node if replica in self.replicas else ""

    def _host(self, node: str) -> str:
        return self._hosts.get(node, node)

    def _done(self, event: ItemDone, actions: list[Action]) -> None:
        self.health.success(self._node(event.replica))
        task, _ = self._take(event.replica, event.record.item_id)
        self._queue(self.judge.success(actions))
        if task is not None and self.judge.fitted(task, actions):
            self.order.again(self.judge.ease)

    def _failed(self, event: ItemFailed, now: float, actions: list[Action]) -> None:
        node = self._node(event.replica)
        task, batch = self._take(event.replica, event.item_id)
        if task is None or batch is None:
            return
        held = Withheld(task, event.error_class, event.error, self._host(node), 1.0)
        if event.error_class == "capacity" and self.judge.climbs(held, batch.size, actions):
            self.judge.mark(event.signature)
            self.order.add(task)
        elif event.error_class in ("item", "capacity") and batch.size > 1:
            # Whose fault it was cannot be told from a batch: its items run one by one.
            self.judge.mark(event.signature)
            task.alone = True
            self.order.add(task)
        elif event.error_class == "infrastructure":
            self.judge.mark(event.signature)
            self.order.add_later(task, now + self.judge.backoff(event.signature))
            self._trouble(node, {self.replicas[event.replica].band}, now, actions)
        else:
            self._queue(self.judge.failed(held, event.signature, actions))

    def _lost(self, event: ReplicaLost, now: float, actions: list[Action]) -> None:
        replica = self.replicas.pop(event.replica, None)
        if replica is None:
            return
        if event.cause == "refused":
            self.finished = Finish(2, event.error)
            actions.append(self.finished)
            return
        aboard = replica.aboard()
        if (not aboard and event.cause not in ("start", "late", "node")) or event.cause == "gang":
            self.judge.mark(event.cause)
        guilty = event.cause in ("crash", "hang") and len(aboard) == 1
        for task in aboard:
            # Who killed a replica with several items aboard cannot be told: each flies alone from now on.
            task.alone = task.alone or event.cause in ("crash", "hang")
            self.looking[task.item_id] = (task, event, guilty, replica.machine)
            actions.append(Look(task.item_id, task.generation))
        if event.cause in ("start", "late"):
            self._trouble(event.node, {replica.band}, now, actions)
        elif event.cause != "node" and not any(task.killed_on - {*replica.machine} for task in aboard):
            self._trouble(replica.node, {replica.band}, now, actions)
        if self._is_replaced(replica.band):
            self.replicas[event.replica] = self._replica(event.replica)
            self._restart(event, replica, now, actions)

    def _restart(self, event: ReplicaLost, lost: Replica, now: float, actions: list[Action]) -> None:
        """A replacement, at once or after a while; or the end of the run, if none of the band comes up."""
        failed = event.cause in ("start", "late") or (event.cause == "node" and not lost.ready)
        if not failed:
            actions.append(Replace(event.replica, self._avoided()))
        elif (end := self.starts.failed(event, lost.band, self._makers(lost.band), now)) is not None:
            self.finished = end
            actions.append(end)

    def _looked(self, event: Looked, now: float, actions: list[Action]) -> None:
        task, lost, blamed, machine = self.looking.pop(event.item_id)
        if event.record is not None:
            self._queue(self.judge.success(actions))
        elif blamed:
            task.blame(machine)
            error = f"the replica was lost ({lost.cause}): {lost.error}"
            held = Withheld(task, "replica", error, machine[1], CRASH_COUNT)
            self._queue(self.judge.failed(held, lost.cause, actions))
        else:
            self.order.add(task)

    # ---------------------------------------------------------------- nodes

    def _trouble(self, node: str, bands: set[int], now: float, actions: list[Action]) -> None:
        """A trouble of a node, which may be avoided from now on: if replicas of every band it serves are ready on
        others."""
        self.health.trouble(node)
        bands = bands | {replica.band for replica in self.replicas.values() if replica.node == node}
        avoided = self.health.avoided() | {node, ""}
        others = [replica for replica in self.replicas.values() if replica.ready and replica.node not in avoided]
        if not node or not bands <= {replica.band for replica in others}:
            return
        if why := self.health.judge(node, {replica.node for replica in others}, now):
            text = f"node {self._host(node)} gets no new items for {PAROLE_SECONDS / 60:.0f} minutes: {why}"
            actions.append(Say(text, f"node {node}"))

    def _usable(self) -> list[Replica]:
        """Replicas that are ready, those on avoided nodes only where no other of their band is."""
        ready = [r for r in self.replicas.values() if self.draining.takes_work(r)]
        avoided = self.health.avoided()
        served = {replica.band for replica in ready if replica.node not in avoided}
        return [replica for replica in ready if replica.node not in avoided or replica.band not in served]

    def _move(self, now: float, actions: list[Action]) -> None:
        """Replicas that have nothing to do on an avoided node are started again, elsewhere if there is room, once."""
        for node in self.health.release(now):
            self._moved.clear()
            actions.append(Say(f"node {self._host(node)} is tried again"))
            actions.append(Say("", f"node {node}"))
        avoided = self.health.avoided()
        usable = {replica.name for replica in self._usable()} if avoided else set()
        for name, replica in list(self.replicas.items()):
            idle = replica.ready and replica.node in avoided and name not in usable and not replica.batches
            if idle and name not in self._moved and self.rules.degree_of.get(name, 1) == 1:
                self._moved.add(name)
                self.replicas[name] = self._replica(name)
                actions.append(Replace(name, tuple(sorted(avoided))))

    # ---------------------------------------------------------------- how many replicas

    def _avoided(self) -> tuple[str, ...]:
        return tuple(sorted(self.health.avoided()))

    def _is_replaced(self, band: int) -> bool:
        """Whether a replica that is gone gets a successor."""
        others = sum(other.band == band for other in self.replicas.values())
        return self.stopping is None and self.elastic.replaces(band, others)

    def _resize(self, now: float, actions: list[Action]) -> None:
        """Closes what has left a node that goes, and follows the cluster where the number of replicas does."""
        for name in self.draining.left(self.replicas.values()):
            if self._is_replaced(self._dismiss(name, actions)):
                self.replicas[name] = self._replica(name)
                actions.append(Replace(name, self._avoided()))
        unsettled = self.order.later() + len(self.looking) + len(self.judge.withheld)
        for number, band in enumerate(self.order.bands):
            if number not in self._served or not self.elastic.follows(number):
                continue
            standing = [Standing(r.name, r.ready, r.busy) for r in self.replicas.values() if r.band == number]
            change = self.elastic.change(number, standing, len(band.waiting) + unsettled, not band.exhausted, now)
            for name in change.fewer:
                self._dismiss(name, actions)
            for _ in range(change.more):
                self._enlist(number, actions)

    def _dismiss(self, name: str, actions: list[Action]) -> int:
        """Closes a replica; returns its band."""
        self.starts.forget(name)
        actions.append(Dismiss(name))
        return self.replicas.pop(name).band

    def _enlist(self, band: int, actions: list[Action]) -> None:
        known = self.rules.band_of
        name, like = next_name(known, band, self.replicas)
        degrees = {**self.rules.degree_of, name: self.rules.degree_of.get(like, 1)}
        self.rules = replace(self.rules, band_of={**known, name: band}, degree_of=degrees)
        self.replicas[name] = self._replica(name)
        actions.append(Enlist(name, band, self._avoided()))

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
            self._move(now, actions)
            actions += [Replace(name, self._avoided()) for name in self.starts.due(now)]
            self._assign(actions)
            self._share_out(actions)
            self._resize(now, actions)
            for number, band in enumerate(self.order.bands):
                if room := self.order.room(number):
                    band.asked = True
                    actions.append(Refill(room, number))
        idle = not self.looking and not self._flying()
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
        if not self._flying() and not self.order.pending():
            self.finished = Finish(None, "every item is terminal")
            actions.append(self.finished)

    def _assign(self, actions: list[Action]) -> None:
        if not any(band.waiting for band in self.order.bands):
            return
        ready = self._usable()
        with_room = [replica for replica in ready if replica.waiting() <= self.rules.prefetch]
        if not with_room:
            return  # as it mostly is: of thousands of replicas one has ended something
        count = Counter(replica.band for replica in ready)
        machines = {band: {replica.machine for replica in ready if replica.band == band} for band in count}
        share = {band: tail.share(self.order.bands[band].flops, self._makers(band)) for band in count}
        for depth in range(1 + self.rules.prefetch):
            for replica in sorted(with_room, key=lambda replica: (replica.waiting(), replica.load())):
                unfit = barred(replica, machines[replica.band])
                first = self.order.first(replica.band, unfit) if depth and replica.waiting() == depth else None
                if not replica.waiting() or tail.is_fair(replica, first, share[replica.band]):
                    batch = self._next_batch(replica, count[replica.band], unfit)
                    if batch is not None:
                        replica.batches[batch.number] = batch
                        works = tuple(
                            Work(t.item, t.generation, t.attempt, rungs=t.rungs) for t in batch.tasks.values()
                        )
                        actions.append(Send(replica.name, batch.number, works))

    def _makers(self, band: int) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.band == band]

    def _share_out(self, actions: list[Action]) -> None:
        for number, band in enumerate(self.order.bands):
            if band.exhausted and not band.waiting:
                usable = [replica for replica in self._usable() if replica.band == number]
                free = sum(self._is_free(replica) for replica in usable)
                actions += [Reclaim(replica.name) for replica in tail.laden(usable, free)]

    def _is_free(self, replica: Replica) -> bool:
        """Whether it has nothing to make, and may take what need not fly alone."""
        here = replica.node == self.rules.own_node and any(task.suspect for task in self._aboard(replica.node))
        return not replica.waiting() and not flies_alone(replica) and not here

    def _next_batch(self, replica: Replica, ready: int, unfit: Barred) -> Batch | None:
        """The next items for a replica. An item that must fly alone has a replica to itself, nothing prefetched behind
        it, so that a crash has one suspect; one from a driver that died, the driver's whole machine. One that killed a
        replica goes to another node, if there is one."""
        first = self.order.first(replica.band, unfit)
        if first is None or (replica.batches and (first.alone or first.suspect or flies_alone(replica))):
            return None
        if replica.node == self.rules.own_node:
            aboard = self._aboard(replica.node)
            if any(task.suspect for task in aboard) or (first.suspect and aboard):
                return None
        tasks = self.order.take(replica.band, ready, unfit)
        for task in tasks:
            task.attempt += 1
        self._number += 1
        flops = sum(task.item.flops for task in tasks)
        return Batch(self._number, {task.item_id: task for task in tasks}, size=len(tasks), flops=flops)
