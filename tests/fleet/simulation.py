"""A fleet in a few lines: replicas that do what a script of random choices says. No time passes that is not counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.types import Item, Record, Request

REQUEST = Request("t2v", "p", "", 1, 64, 64, 17, 8.0, 4, 1.0, "euler")


def item(ordinal: int, shape: str = "a", priority: int = 0, flops: float = 1.0) -> Item:
    item_id = f"{ordinal:032x}"
    return Item(ordinal, item_id, str(ordinal), 0, REQUEST, "", "", shape, 1, flops, priority)


@dataclass
class Behaviour:
    """What goes wrong: items that always fail or always kill their replica, and the share of random mishaps. `needs`:
    the rung of the memory ladder that an item needs ("more": it fits on none). `sick`: a node whose storage always
    fails; `barren`: one on which no replica starts."""

    bad: set[int] = field(default_factory=set)
    killers: set[int] = field(default_factory=set)
    crash: float = 0.0
    lost_commit: float = 0.0
    node_loss: float = 0.0
    storage: float = 0.0
    nodes: int = 2
    drains: float = 0.0
    """A node that will go, and whose replicas are replaced on another; what runs there may come back unfinished."""
    stays: float = 0.0
    """A node that was to go stays after all."""
    rooms: float = 0.0
    """The cluster has room for another number of replicas."""
    needs: dict[int, str] = field(default_factory=dict)
    sick: str = ""
    barren: str = ""


class Simulation:
    """Drives a Dispatcher over `total` items until it finishes; asserts on the way that no item flies twice at once."""

    def __init__(
        self,
        total: int,
        behaviour: Behaviour,
        rules: Rules,
        replicas: int = 3,
        seed: int = 0,
        suspects: Collection[int] = (),
    ) -> None:
        self.random = random.Random(seed)
        self.behaviour, self.rules = behaviour, rules
        self.todo = [
            ev.Task(item(i, shape="ab"[i % 2], flops=1.0 + i % 2), suspect=i in suspects) for i in range(total)
        ]
        self.total = total
        self.committed: dict[str, Record] = {}
        self.evidence: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self.queues: dict[str, list[ev.Send]] = {}
        self.starting: list[str] = []
        self.now = 0.0
        self.steps = 0
        self.dispatcher = Dispatcher(rules, [*(f"r{i}" for i in range(replicas)), *rules.band_of])
        self.starting = list(self.dispatcher.replicas)
        self.place = {name: f"n{int(name[1:]) % behaviour.nodes}" for name in self.starting}
        self.said: list[str] = []
        self.climbed: list[ev.Evidence] = []
        self.killed: dict[str, list[str]] = {}
        self.on_node: Counter[str] = Counter()
        self.going: set[str] = set()
        self.leaving: set[str] = set()
        self.largest = 0
        self.queue: list[ev.Event] = []
        self.sends: list[ev.Send] = []

    def run(self, most_steps: int = 100_000) -> ev.Finish:
        self.feed(ev.Tick())
        while self.dispatcher.finished is None:
            self.steps += 1
            assert self.steps < most_steps, "the dispatcher does not come to an end"
            self.now += 0.1
            for event in self.something_happens():
                self.feed(event)
        return self.dispatcher.finished

    def feed(self, event: ev.Event) -> None:
        self.queue.append(event)
        while self.queue:
            for action in self.dispatcher.handle(self.queue.pop(0), self.now):
                self.do(action)

    def do(self, action: ev.Action) -> None:
        match action:
            case ev.Send():
                assert self.place[action.replica] not in self.going, "work for a node that goes"
                assert action.replica not in self.leaving, "work for a replica that was told to leave"
                flying = [w.item.item_id for sends in self.queues.values() for s in sends for w in s.works]
                for work in action.works:
                    assert work.item.item_id not in flying, "an item flies twice at once"
                    assert work.item.item_id not in self.committed, "a settled item is sent"
                assert len({w.item.batch_key for w in action.works}) == 1, "a batch of two shapes"
                assert len(action.works) == 1 or not any(w.rungs for w in action.works), "one on the ladder has company"
                self.largest = max(self.largest, len(action.works))
                self.queues.get(action.replica, []).append(action)  # lost with a replica whose death is not known yet
                self.sends.append(action)
            case ev.Look():
                self.queue.append(ev.Looked(action.item_id, self.committed.get(action.item_id)))
            case ev.Evidence():
                self.evidence[action.item_id] += action.count
                if action.next:
                    assert action.count == 0, "a rung counts"
                    self.climbed.append(action)
            case ev.Settle():
                assert action.task.item_id not in self.committed, "settled twice"
                self.committed[action.task.item_id] = self.record(action.task.item, action.status)
            case ev.Replace():
                assert not self.queues.pop(action.replica, []), "a replica with work is replaced"
                nodes = [f"n{i}" for i in range(self.behaviour.nodes)]
                if self.place[action.replica] in action.avoid:
                    self.place[action.replica] = next((n for n in nodes if n not in action.avoid), nodes[0])
                self.starting.append(action.replica)
            case ev.Refill():
                todo = self.todo if action.band == 0 else []
                given, todo[:] = todo[: action.items], todo[action.items :]
                self.queue.append(ev.Offered(tuple(given), not todo, action.band))
            case ev.Recall():
                self.leaving.add(action.replica)
                leaves = self.place[action.replica] in self.going and self.random.random() < 0.5
                kept = 0 if leaves else 1
                for send in self.queues.get(action.replica, [])[kept:]:
                    self.queue.append(ev.BatchReturned(action.replica, send.batch))
                self.queues[action.replica] = self.queues.get(action.replica, [])[:kept]
            case ev.Reclaim():
                for send in self.queues.get(action.replica, [])[1:]:
                    self.queue.append(ev.BatchReturned(action.replica, send.batch))
                self.queues[action.replica] = self.queues.get(action.replica, [])[:1]
            case ev.Enlist():
                self.place[action.replica] = f"n{int(action.replica[1:]) % self.behaviour.nodes}"
                self.starting.append(action.replica)
            case ev.Dismiss():
                assert not self.queues.pop(action.replica, []), "a replica with work is closed"
                self.starting = [name for name in self.starting if name != action.replica]
            case ev.Say():
                self.said.append(action.text)
            case ev.Finish():
                pass

    def record(self, it: Item, status: str = "done") -> Record:
        return Record(it.item_id, it.ordinal, status, 0, 1)

    def something_happens(self) -> list[ev.Event]:
        if self.random.random() < self.behaviour.rooms:
            return [ev.Room((self.random.randrange(6),))]
        if self.going and self.random.random() < self.behaviour.stays:
            node = self.random.choice(sorted(self.going))
            self.going.remove(node)
            return [ev.NodeStays(node)]
        if self.queues and self.random.random() < self.behaviour.drains:
            node = self.place[self.random.choice(sorted(self.queues))]
            self.going.add(node)
            return [ev.NodeDraining(node, self.random.choice([None, self.now + 30.0]))]
        if self.starting:
            name = self.starting.pop()
            while self.place[name] in self.going:
                self.place[name] += "'"
            node = self.place[name]
            if node == self.behaviour.barren:
                return [ev.ReplicaLost(name, "start", "no driver", node)]
            self.queues[name] = []
            self.leaving.discard(name)
            return [ev.ReplicaReady(name, node)]
        busy = sorted(name for name, sends in self.queues.items() if sends)
        if not busy:
            self.now += 10
            return [ev.Tick()]
        return self.work(self.random.choice(busy))

    def work(self, name: str) -> list[ev.Event]:
        """The replica takes its first batch: all goes well, or something happens on the way."""
        send = self.queues[name].pop(0)
        behaviour = self.behaviour
        happened: list[ev.Event] = []
        node = self.place[name]
        if any(not self.fits(work, name, send) for work in send.works):
            self.runs.update(work.item.item_id for work in send.works)
            failed = [ev.ItemFailed(name, w.item.item_id, "capacity", "out of memory", "oom") for w in send.works]
            return [*failed, ev.BatchGenerated(name, send.batch)]
        for work in send.works:
            self.runs[work.item.item_id] += 1
            self.on_node[node] += 1
            chance = self.random.random()
            if work.item.ordinal in behaviour.killers or chance < behaviour.crash:
                if self.random.random() < behaviour.lost_commit:
                    self.committed[work.item.item_id] = self.record(work.item)
                del self.queues[name]
                self.killed.setdefault(work.item.item_id, []).append(node)
                return [*happened, ev.ReplicaLost(name, "crash", "killed")]
            if chance < behaviour.crash + behaviour.node_loss:
                del self.queues[name]
                return [*happened, ev.ReplicaLost(name, "node", "gone")]
            if self.random.random() < behaviour.storage or node == behaviour.sick:
                happened.append(ev.ItemFailed(name, work.item.item_id, "infrastructure", "503", "503"))
            elif work.item.ordinal in behaviour.bad:
                happened.append(ev.ItemFailed(name, work.item.item_id, "item", "bad row", "bad row"))
            else:
                self.committed[work.item.item_id] = self.record(work.item)
                happened.append(ev.ItemDone(name, self.record(work.item)))
        return [*happened, ev.BatchGenerated(name, send.batch)]

    def fits(self, work: ev.Work, name: str, send: ev.Send) -> bool:
        """Whether an item fits into memory as it is run."""
        match self.behaviour.needs.get(work.item.ordinal, ""):
            case "":
                return True
            case "alone":
                return len(send.works) == 1
            case "gang":
                return self.rules.degree_of.get(name, 1) > 1
            case rung:
                return rung in work.rungs
