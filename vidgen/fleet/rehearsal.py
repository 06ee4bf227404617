"""A run's dispatching, rehearsed: the real Dispatcher against replicas that take as long as they are told.

No cluster and no time: a clock that jumps from one end of a batch to the next. Nothing fails and writing takes no time;
what it shows is the order of the work and its tail. Refuses to know what the seconds are of.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.types import Item, Record


@dataclass(slots=True)
class Rehearsed:
    """How it went. `seconds` until the last item was made; `busy` seconds of each replica; `changes` of shape on a
    replica, in all; `recalled` batches that went to another replica than they had been sent to."""

    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    changes: int = 0
    recalled: int = 0
    made: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Replica:
    queue: list[ev.Send] = field(default_factory=list)
    shape: str = ""


class Rehearsal:
    """`takes(item, replica)` is in seconds. `run()` returns once every item is made; `late` has replicas that nobody
    counted on, and when they come."""

    def __init__(
        self,
        items: Iterable[Item],
        replicas: Sequence[str],
        takes: Callable[[Item, str], float],
        rules: Rules | None = None,
        late: Iterable[tuple[float, str]] = (),
    ) -> None:
        self.items, self.takes = iter(items), takes
        coming = dict.fromkeys(replicas, 0.0) | {name: when for when, name in late}
        self.dispatcher = Dispatcher(rules or Rules(), list(replicas))
        self.replicas = {name: _Replica() for name in coming}
        self.found = Rehearsed(busy=dict.fromkeys(coming, 0.0))
        self.now = 0.0
        self._count = itertools.count()
        self._ahead: list[tuple[float, int, ev.Event]] = []
        for name, when in coming.items():
            self._later(when, ev.ReplicaReady(name, "node"))

    def run(self) -> Rehearsed:
        self._feed(ev.Tick())
        while self.dispatcher.finished is None:
            self.now, _, event = heapq.heappop(self._ahead)
            if isinstance(event, ev.BatchGenerated):
                self._made(event)
            self._feed(event)
        self.found.seconds = self.now
        return self.found

    def _later(self, when: float, event: ev.Event) -> None:
        heapq.heappush(self._ahead, (when, next(self._count), event))

    def _feed(self, event: ev.Event) -> None:
        queue = [event]
        while queue:
            for action in self.dispatcher.handle(queue.pop(0), self.now):
                match action:
                    case ev.Send():
                        replica = self.replicas[action.replica]
                        replica.queue.append(action)
                        if len(replica.queue) == 1:
                            self._begin(action)
                    case ev.Reclaim():
                        replica = self.replicas[action.replica]
                        queue += [ev.BatchReturned(action.replica, send.batch) for send in replica.queue[1:]]
                        self.found.recalled += len(replica.queue[1:])
                        replica.queue = replica.queue[:1]
                    case ev.Refill():
                        tasks = tuple(ev.Task(item) for item in itertools.islice(self.items, action.items))
                        queue.append(ev.Offered(tasks, len(tasks) < action.items, action.band))
                    case _:
                        pass

    def _begin(self, send: ev.Send) -> None:
        replica, shape = self.replicas[send.replica], send.works[0].item.batch_key
        self.found.changes += replica.shape not in ("", shape)
        replica.shape = shape
        took = sum(self.takes(work.item, send.replica) for work in send.works)
        self.found.busy[send.replica] += took
        self._later(self.now + took, ev.BatchGenerated(send.replica, send.batch))

    def _made(self, event: ev.BatchGenerated) -> None:
        replica = self.replicas[event.replica]
        send = replica.queue.pop(0)
        if replica.queue:
            self._begin(replica.queue[0])
        for work in send.works:
            item = work.item
            self.found.made.append(item.ordinal)
            record = Record(item.item_id, item.ordinal, "done", work.generation, work.attempt)
            self._feed(ev.ItemDone(event.replica, record))
