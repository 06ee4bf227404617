"""Which item goes next: what waits, by band, and which of it make a batch.

Pure; refuses to know replicas (it is told of the machine that asks) and what became of earlier attempts.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from vidgen.fleet.events import Task
from vidgen.fleet.rules import Rules


@dataclass(slots=True)
class Band:
    """What waits for the replicas of one band. `asked`: more of the plan is on its way; `exhausted`: there is none."""

    waiting: list[tuple[tuple[object, ...], Task]] = field(default_factory=list)
    asked: bool = False
    exhausted: bool = False


class Order:
    """Everything that is known and waits. `later` holds what waits for its time too."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.bands = [Band() for _ in range(1 + len(rules.bands))]
        self._later: list[tuple[float, int, Task]] = []

    def add(self, task: Task) -> None:
        # Suspects last; then by priority; then longest first, equal shapes together.
        item = task.item
        key = (task.suspect, -item.priority, -item.flops, item.batch_key, item.ordinal)
        heapq.heappush(self.bands[self.rules.band(item.tokens)].waiting, (key, task))

    def add_later(self, task: Task, when: float) -> None:
        """Adds it once `release` is called at that time or after it."""
        task.not_before = when
        heapq.heappush(self._later, (when, task.item.ordinal, task))

    def release(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            self.add(heapq.heappop(self._later)[2])

    def pending(self) -> int:
        return sum(len(band.waiting) for band in self.bands) + len(self._later)

    def exhausted(self) -> bool:
        """Whether all of the plan has been offered."""
        return all(band.exhausted for band in self.bands)

    def room(self, number: int) -> int:
        """How many items of a band to ask for now; 0: none."""
        band = self.bands[number]
        room = self.rules.window - len(band.waiting) - len(self._later)
        return room if not band.exhausted and not band.asked and room >= max(1, self.rules.window // 2) else 0

    def first(self, band: int) -> Task | None:
        """What goes next in a band."""
        waiting = self.bands[band].waiting
        return waiting[0][1] if waiting else None

    def take(self, band: int, ready: int) -> list[Task]:
        """The next batch of a band: one shape, as many as fit, and no more than leaves something for each of the
        `ready` replicas. Who must fly alone does."""
        waiting = self.bands[band].waiting
        share = -(-len(waiting) // (2 * max(1, ready)))
        most = max(1, min(self.rules.batch_items, share))
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
        return tasks
