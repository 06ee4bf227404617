"""What a failure counts, and what becomes of its item: tried again, or given up.

Failures are judged by class: an item's own failure counts 1, a crash of the replica that ran it alone 0.5, lost nodes
and storage trouble nothing. Counted failures are withheld while nothing succeeds, so that a bad configuration trips the
breaker instead of burning the dataset. Pure; refuses to know replicas, and when an item runs again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vidgen.fleet.events import Action, Evidence, Settle, Task
from vidgen.fleet.rules import Rules

CRASH_COUNT = 0.5
INFRASTRUCTURE_BACKOFF = 2.0
"""Seconds before an item that met storage or node trouble is tried again, doubled with each event of the streak."""
MAX_BACKOFF = 60.0


@dataclass(slots=True)
class Withheld:
    """A counted failure that waits for a success, or for the end of everything else."""

    task: Task
    error_class: str
    error: str
    node: str
    count: float


class Judge:
    """`withheld`: failures that wait. `streak`: failures since the last success, by signature. `final`: nothing else is
    pending, so failures count at once. What its methods return is to be tried again."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.withheld: dict[str, Withheld] = {}
        self.streak: Counter[str] = Counter()
        self.final = False

    def admits(self, task: Task, actions: list[Action]) -> bool:
        """An item whose earlier attempts used up its allowance is settled, not run again."""
        if task.count < self.rules.max_attempts:
            return True
        actions.append(Settle(task, "failed", "replica", f"gave up after attempts that weigh {task.count:g}"))
        return False

    def mark(self, signature: str) -> None:
        """One more failure of the streak, of whatever class."""
        self.streak[signature] += 1

    def backoff(self, signature: str) -> float:
        """Seconds to wait after the latest of the streak's failures of that signature."""
        return min(MAX_BACKOFF, INFRASTRUCTURE_BACKOFF * float(2 ** min(self.streak[signature] - 1, 10)))

    def success(self, actions: list[Action]) -> list[Task]:
        """Something works: the streak ends, and what was withheld counts."""
        self.streak.clear()
        return self._count_all(actions)

    def end(self, actions: list[Action]) -> list[Task]:
        """Nothing else is pending: what was withheld is counted, tried as often as it may be, and settled."""
        self.final = True
        return self.success(actions)

    def failed(self, held: Withheld, signature: str, actions: list[Action]) -> list[Task]:
        """A failure that counts, now or once something succeeds."""
        task = held.task
        task.count += held.count
        if self.final:
            return self._count(held, actions)
        self.mark(signature)
        actions.append(Evidence(task.item_id, task.generation, held.error_class, 0.0, held.error, held.node))
        self.withheld[task.item_id] = held
        return []

    def broken(self) -> str:
        """Why the run must stop, "" if it need not."""
        worst = max(self.streak.items(), key=lambda pair: pair[1], default=("", 0))
        if worst[1] < self.rules.breaker_failures:
            return ""
        return f"{worst[1]} failures in a row without a success: {worst[0]}"

    def _count_all(self, actions: list[Action]) -> list[Task]:
        again = [task for held in list(self.withheld.values()) for task in self._count(held, actions)]
        self.withheld.clear()
        return again

    def _count(self, held: Withheld, actions: list[Action]) -> list[Task]:
        """A withheld failure becomes a counted one: the item is tried again or given up."""
        task = held.task
        actions.append(Evidence(task.item_id, task.generation, held.error_class, held.count, held.error, held.node))
        if len(task.killed_on) >= 2:
            actions.append(Settle(task, "quarantined", held.error_class, held.error))
        elif task.count >= self.rules.max_attempts:
            actions.append(Settle(task, "failed", held.error_class, held.error))
        else:
            return [task]
        return []
