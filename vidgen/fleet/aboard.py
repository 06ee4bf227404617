"""What each replica has aboard. Decides nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from vidgen.fleet.events import Machine, Task
from vidgen.fleet.order import Barred


@dataclass(slots=True)
class Batch:
    """What a replica was sent at once. `generated`: all its frames are made; `size`, `flops`: of how many items it was,
    and what they cost; `recalled`: it was asked back for another replica."""

    number: int
    tasks: dict[str, Task]
    generated: bool = False
    size: int = 0
    flops: float = 0.0
    recalled: bool = False


@dataclass(slots=True)
class Replica:
    """A replica as the dispatcher knows it: where it is, and what it has. `leaving`: it was told to leave its node, and
    takes nothing new."""

    name: str
    band: int = 0
    node: str = ""
    host: str = ""
    ready: bool = False
    leaving: bool = False
    batches: dict[int, Batch] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        return self.node, self.host

    @property
    def busy(self) -> bool:
        return bool(self.batches)

    def waiting(self) -> int:
        """Batches whose frames are not made yet."""
        count = 0
        for batch in self.batches.values():  # asked of every replica at every event
            count += not batch.generated
        return count

    def unmade(self) -> list[Batch]:
        """Those batches; the first is in the making."""
        return [batch for batch in self.batches.values() if not batch.generated]

    def aboard(self) -> list[Task]:
        """All items that it was sent and that are neither settled nor back."""
        return [task for batch in self.batches.values() for task in batch.tasks.values()]

    def generated(self, number: int) -> None:
        """All frames of a batch are made; it stays until its last item is written."""
        if (batch := self.batches.get(number)) is not None:
            batch.generated = True
            self._forget_if_empty(batch)

    def give_back(self, number: int, items: Collection[str]) -> list[Task]:
        """Removes these items of a batch, or all where none is named; what is left of it is being written."""
        batch = self.batches.get(number)
        if batch is None:
            return []
        tasks = [batch.tasks.pop(item_id) for item_id in items or tuple(batch.tasks) if item_id in batch.tasks]
        self.generated(number)
        return tasks

    def take(self, item_id: str) -> tuple[Task | None, Batch | None]:
        """Removes an item from the batch it flies in; None twice if it is not here."""
        for batch in self.batches.values():
            if item_id in batch.tasks:
                task = batch.tasks.pop(item_id)
                self._forget_if_empty(batch)
                return task, batch
        return None, None

    def _forget_if_empty(self, batch: Batch) -> None:
        if batch.generated and not batch.tasks:
            del self.batches[batch.number]

    def load(self) -> float:
        """FLOPs of those batches."""
        return sum(batch.flops for batch in self.batches.values() if not batch.generated)


def barred(replica: Replica, machines: set[Machine]) -> Barred:
    """Which items a replica may not have: those that killed one on its machine, while another has not had them."""
    return lambda task: task.killed(replica.machine) and not all(map(task.killed, machines))


def flies_alone(replica: Replica) -> bool:
    """Whether it has an item that must have no company."""
    return any(task.alone or task.suspect for task in replica.aboard())
