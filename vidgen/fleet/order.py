"""Which item goes next: what waits, by band, and which of it make a batch.

Pure; refuses to know replicas (it is told which items the one that asks may not have) and what became of earlier
attempts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vidgen.fleet.events import Task
from vidgen.fleet.rules import Rules

Waiting = list[tuple[tuple[object, ...], Task]]
Barred = Callable[[Task], bool]


@dataclass(slots=True)
class Band:
    """What waits for the replicas of one band, and its FLOPs. `asked`: more of the plan is on its way; `exhausted`:
    there is none."""

    waiting: Waiting = field(default_factory=list)
    flops: float = 0.0
    asked: bool = False
    exhausted: bool = False


class Order:
    """Everything that is known and waits. `later` holds what waits for its time too."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.bands = [Band() for _ in range(1 + len(rules.bands))]
        self._later: list[tuple[float, int, Task]] = []

    def band(self, task: Task) -> int:
        return self.rules.band(task.item.tokens) if task.band is None else task.band

    def add(self, task: Task) -> None:
        # Suspects last; then by priority; then as the run's order has it; then longest first, equal shapes together.
        item = task.item
        key = (task.suspect, -item.priority, task.place, -item.flops, item.batch_key, item.ordinal)
        band = self.bands[self.band(task)]
        heapq.heappush(band.waiting, (key, task))
        band.flops += item.flops

    def add_later(self, task: Task, when: float) -> None:
        """Adds it once `release` is called at that time or after it."""
        heapq.heappush(self._later, (when, task.item.ordinal, task))

    def release(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            self.add(heapq.heappop(self._later)[2])

    def again(self, change: Callable[[Task], None]) -> None:
        """Changes all that waits for a replica, and puts it in order again."""
        tasks = [task for band in self.bands for _, task in band.waiting]
        for band in self.bands:
            band.waiting.clear()
            band.flops = 0.0
        for task in tasks:
            change(task)
            self.add(task)

    def pending(self) -> int:
        return sum(len(band.waiting) for band in self.bands) + len(self._later)

    def later(self) -> int:
        """How many wait for their time."""
        return len(self._later)

    def exhausted(self) -> bool:
        """Whether all of the plan has been offered."""
        return all(band.exhausted for band in self.bands)

    def room(self, number: int) -> int:
        """How many items of a band to ask for now; 0: none."""
        band = self.bands[number]
        room = self.rules.window - len(band.waiting) - len(self._later)
        return room if not band.exhausted and not band.asked and room >= max(1, self.rules.window // 2) else 0

    def first(self, band: int, barred: Barred) -> Task | None:
        """What goes next in a band, of what is not barred."""
        waiting = self.bands[band].waiting
        with _without(waiting, barred):
            return waiting[0][1] if waiting else None

    def take(self, band: int, ready: int, barred: Barred) -> list[Task]:
        """The next batch of a band: one shape, as many as fit, and no more than leaves something for each of the
        `ready` replicas. Who must fly alone does."""
        waiting = self.bands[band].waiting
        share = -(-len(waiting) // (2 * max(1, ready)))
        most = max(1, min(self.rules.batch_items, share))
        with _without(waiting, barred):
            first = heapq.heappop(waiting)[1]
            tasks, tokens = [first], first.item.tokens
            while waiting and len(tasks) < most and not first.alone and not first.suspect:
                task = waiting[0][1]
                tokens += task.item.tokens
                if task.item.batch_key != first.item.batch_key or task.alone or task.suspect:
                    break
                if tokens > self.rules.batch_tokens:
                    break
                tasks.append(heapq.heappop(waiting)[1])
        left = self.bands[band].flops - sum(task.item.flops for task in tasks)
        self.bands[band].flops = left if waiting else 0.0
        return tasks


@contextmanager
def _without(waiting: Waiting, barred: Barred) -> Iterator[None]:
    """Takes what is barred from the head while something is done with what comes after it."""
    aside = []
    while waiting and barred(waiting[0][1]):
        aside.append(heapq.heappop(waiting))
    try:
        yield
    finally:
        for entry in aside:
            heapq.heappush(waiting, entry)
