"""What a failure counts, and what becomes of its item: tried again, perhaps more sparingly, or given up.

Failures are judged by class: an item's own failure counts 1, a crash of the replica that ran it alone 0.5, lost nodes
and storage trouble nothing. Counted failures are withheld while nothing succeeds, so that a bad configuration trips the
breaker instead of burning the dataset. An item that does not fit into memory climbs LADDER, one rung a failure, and
counts only at its end. What is learned of a shape lives as long as the driver: the next one may have other GPUs, and a
rung that it does not need would slow all that is left. Pure; refuses to know replicas, and when an item runs again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vidgen.fleet.events import Action, Evidence, Say, Settle, Task
from vidgen.fleet.rules import Rules

CRASH_COUNT = 0.5
INFRASTRUCTURE_BACKOFF = 2.0
"""Seconds before an item that met storage or node trouble is tried again, doubled with each event of the streak."""
MAX_BACKOFF = 60.0
QUARANTINE_NODES = 2
"""Different nodes on which an item must have killed a replica to be quarantined."""
LADDER = ("alone", "caches", "offload", "gang")
"""What is tried in turn for an item that does not fit: a batch of its own; an engine that keeps nothing from one batch
to the next; one whose components are on the GPU only while they work; a gang of more GPUs. None changes pixels."""
ENGINE_RUNGS = ("caches", "offload")
"""Rungs that an engine may or may not have; the others are the driver's."""
ALIKE = 2
"""Items of one shape that fitted on a rung only, after which the others of that shape begin on it."""


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
        self._fitted: dict[str, list[Task]] = {}
        self._begins: dict[str, Task] = {}

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
        actions.append(_evidence(held, 0.0))
        self.withheld[task.item_id] = held
        return []

    def broken(self) -> str:
        """Why the run must stop, "" if it need not."""
        worst = max(self.streak.items(), key=lambda pair: pair[1], default=("", 0))
        if worst[1] < self.rules.breaker_failures:
            return ""
        return f"{worst[1]} failures in a row without a success: {worst[0]}"

    # ---------------------------------------------------------------- the memory ladder

    def climbs(self, held: Withheld, size: int, actions: list[Action]) -> bool:
        """Takes an item that did not fit, in a batch of `size`, to the next rung there is; False at the top."""
        task = held.task
        rung = self._next_rung(task, size)
        if not rung:
            return False
        evidence = _evidence(held, 0.0, rung)
        actions.append(evidence)
        task.rungs = (*task.rungs, rung)
        task.alone = True
        if rung == "gang":
            task.band = self.rules.wider(self._band(task))
        return True

    def fitted(self, task: Task, actions: list[Action]) -> bool:
        """Takes note of a finished item; True if from now on the others of its shape begin on its rungs (`ease`)."""
        key = task.item.batch_key
        if not task.rungs or key in self._begins:
            return False
        alike = self._fitted.setdefault(key, [])
        alike.append(task)
        if len(alike) < ALIKE:
            return False
        lowest = min(alike, key=lambda one: len(one.rungs))
        self._begins[key] = lowest
        request = task.item.request
        shape = f"{request.num_frames} frames of {request.width} x {request.height}"
        text = f"{shape} fit only with {', '.join(lowest.rungs)} of the memory ladder: all of them begin there"
        actions.append(Say(text, f"ladder {key}"))
        return True

    def ease(self, task: Task) -> None:
        """Puts an item on the rungs that its shape is known to need."""
        known = self._begins.get(task.item.batch_key)
        if known is not None and len(task.rungs) < len(known.rungs):
            task.rungs, task.alone, task.band = known.rungs, True, known.band

    def _band(self, task: Task) -> int:
        return self.rules.band(task.item.tokens) if task.band is None else task.band

    def _next_rung(self, task: Task, size: int) -> str:
        climbed = max((LADDER.index(rung) for rung in task.rungs), default=-1)
        for place, rung in enumerate(LADDER):
            if rung == "gang":
                there = self.rules.wider(self._band(task)) is not None
            else:
                there = place > climbed and (size > 1 if rung == "alone" else rung in self.rules.rungs)
            if there:
                return rung
        return ""

    # ---------------------------------------------------------------- counting

    def _count_all(self, actions: list[Action]) -> list[Task]:
        again = [task for held in list(self.withheld.values()) for task in self._count(held, actions)]
        self.withheld.clear()
        return again

    def _count(self, held: Withheld, actions: list[Action]) -> list[Task]:
        """A withheld failure becomes a counted one: the item is tried again or given up."""
        task = held.task
        actions.append(_evidence(held, held.count))
        if len(task.killed_on) >= QUARANTINE_NODES:
            actions.append(Settle(task, "quarantined", held.error_class, held.error, held.node))
        elif task.count >= self.rules.max_attempts:
            actions.append(Settle(task, "failed", held.error_class, held.error, held.node))
        else:
            return [task]
        return []


def _evidence(held: Withheld, count: float, next: str = "") -> Evidence:
    task = held.task
    who = (task.item_id, task.generation, held.error_class)
    return Evidence(*who, count, held.error, held.node, task.rungs, next)
