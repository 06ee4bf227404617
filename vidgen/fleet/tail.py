"""The end of a run: nobody waits for what lies behind another's work.

What is prefetched is bound to a replica before it is known who is free first. So nothing is prefetched that would make
its replica the last to end, and once nothing more is to come, what still waits behind a running batch is asked back for
a replica that has nothing to do. Pure; FLOPs stand for seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from vidgen.fleet.aboard import Replica
from vidgen.fleet.events import Task

ROUNDING = 1 + 1e-9


def share(waiting: float, replicas: Sequence[Replica]) -> float:
    """FLOPs of all that is known, waiting or sent, for each of the replicas that make it, ready or not."""
    return (waiting + sum(replica.load() for replica in replicas)) / max(1, len(replicas))


def is_fair(replica: Replica, task: Task | None, share: float) -> bool:
    """Whether the item may wait behind what the replica has: it then has no more than its share."""
    return task is not None and replica.load() + task.item.flops <= share * ROUNDING


def laden(replicas: Sequence[Replica], free: int) -> list[Replica]:
    """Who is to give back what it has not begun, for `free` replicas that have nothing to do: those with the most, less
    what is on its way back already. A batch is asked back once: it may have begun meanwhile."""
    behind = {replica.name: replica.unmade()[1:] for replica in replicas}
    free -= sum(batch.recalled for batches in behind.values() for batch in batches)
    giving = [replica for replica in replicas if any(not batch.recalled for batch in behind[replica.name])]
    chosen = sorted(giving, key=Replica.load, reverse=True)[: max(0, free)]
    for replica in chosen:
        for batch in behind[replica.name]:
            batch.recalled = True
    return chosen
