"""What is known of a replica's processes, and what it means when one of them is silent, unreachable or dead.

A process lost with its machine is nobody's fault (`node`); one that went alone is: a start that failed (`start`,
`late`), a `crash`, a `hang`, a `gang` out of step. Pure: time and which nodes live are given. Refuses to know Ray, to
which alone an actor and what it is asked mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vidgen.fleet.replica import Pulse

FEWEST_HANG_SECONDS = 300.0
HANG_STEPS = 10
"""Without run.hang_seconds: a replica hangs that shows nothing for max(300 s, 10 x its longest silence so far)."""
FEWEST_GANG_HANG_SECONDS = 60.0
"""A gang between two steps hangs after max(60 s, 10 x the median step of the batch)."""
UNREACHABLE_SECONDS = 45.0
"""How long a process may be unreachable before it counts as lost with its machine. Ray needs about 15 s to know that a
machine is gone, and says so; a process that died alone is told at once."""
BROKEN_SECONDS = 5.0
"""How long after a gang failed or fell out of step the death of a member may be noticed as its reason."""

Lives = Callable[[str], bool]
"""Whether the node of that id is there."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a replica is lost: a cause of `events.ReplicaLost`, the error, and the node that is to blame if one is."""

    cause: str
    error: str
    node: str = ""


@dataclass(slots=True)
class Process:
    """One actor: `call` is what it was told to do to come in, None once it has; `poll` its next sign of life, of which
    the first says its `node`. `heard`: when the last one came; `unreachable`: since when its connection is broken, for
    a reason not known yet."""

    actor: Any
    call: Any
    poll: Any
    node: str = ""
    heard: float | None = None
    unreachable: float | None = None


@dataclass(slots=True)
class Handle:
    """One replica. `stage` is what all members are being told: sit, join, start; then ready. `placed_at`: since when
    all its processes run. `broken_at`: since when it is of no use, for the reason `broken`, or a better one."""

    members: list[Process]
    group: Any = None
    stage: str = "start"
    answers: dict[int, Any] = field(default_factory=dict)
    attempt: int = 1
    pulse: Pulse | None = None
    longest_silence: float = 0.0
    broken: Loss | None = None
    broken_at: float | None = None
    placed_at: float | None = None

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    @property
    def placed(self) -> bool:
        """Whether all its processes have shown. The cluster has no room yet for one that has not, or is starting it."""
        return self.ready or all(process.heard is not None for process in self.members)

    @property
    def reachable(self) -> bool:
        return all(process.unreachable is None for process in self.members)

    def says(self, rank: int, error: str) -> str:
        """An error, with whose it is in a gang."""
        return f"rank {rank}: {error}" if len(self.members) > 1 else error


def breaks(handle: Handle, loss: Loss, now: float) -> None:
    """It is of no use any more; unless a better reason shows in a moment, this is why."""
    if handle.broken is None:
        handle.broken, handle.broken_at = loss, now


def died(handle: Handle, rank: int, error: str, lives: Lives) -> Loss:
    """A process is gone, alone or with its node."""
    node = handle.members[rank].node
    if node and not lives(node):
        return Loss("node", handle.says(rank, error))
    return Loss("crash", handle.says(rank, error)) if handle.ready else Loss("start", handle.says(rank, error), node)


def unreachable(handle: Handle, rank: int, error: str, now: float) -> Loss | None:
    """A connection broke, and what the process was told is lost with it. Asked again, Ray tells in the end whether the
    process or its machine is gone; None as long as it may."""
    process = handle.members[rank]
    process.unreachable = process.unreachable or now
    if now - process.unreachable > UNREACHABLE_SECONDS:
        return Loss("node", handle.says(rank, error))
    return None


def overdue(handle: Handle, now: float, start_seconds: float, hang_seconds: float | None, lives: Lives) -> Loss | None:
    """A replica is lost that is not ready in time, whose process does not answer, or whose engine shows nothing for too
    long. A gang that broke is given a moment: if one of its members died, that is what is told."""
    if handle.broken is not None and handle.broken_at is not None and handle.reachable:
        return handle.broken if now - handle.broken_at > BROKEN_SECONDS else None
    if _late(handle, now, start_seconds):
        return _unfinished(handle, f"it was not ready {start_seconds:.0f} s after it started")
    most = allowed(handle, hang_seconds)
    unheard = [(now - process.heard, rank) for rank, process in enumerate(handle.members) if process.heard]
    silent, rank = max(unheard, default=(0.0, 0))
    if handle.ready and handle.pulse is not None and handle.pulse.silent > silent:
        silent, rank = handle.pulse.silent, 0
    if silent <= most:
        return None
    error = handle.says(rank, f"no sign of life for {most:.0f} s")
    if any(process.node and not lives(process.node) for process in handle.members):
        return Loss("node", error)
    return Loss("hang", error) if handle.ready else Loss("start", error, handle.members[rank].node)


def _late(handle: Handle, now: float, start_seconds: float) -> bool:
    """Whether a replica has used up its time to become ready, which begins when all its processes run."""
    if handle.ready:
        return False
    if handle.placed_at is None and handle.placed:
        handle.placed_at = now
    return handle.placed_at is not None and now - handle.placed_at > start_seconds


def _unfinished(handle: Handle, error: str) -> Loss:
    """A start that is late, with whose node it is: that of the members which have not done yet what all were told, if
    it is one node. Where they wait for each other on several, nobody's."""
    ranks = [rank for rank in range(len(handle.members)) if rank not in handle.answers]
    places = {handle.members[rank].node for rank in ranks}
    node = places.pop() if len(places) == 1 else ""
    return Loss("late", handle.says(ranks[0], error) if len(ranks) == 1 else error, node)


def allowed(handle: Handle, hang_seconds: float | None) -> float:
    """Seconds without a sign of life. A gang that steps is judged by its own steps: one member that stands still holds
    all of them."""
    least = max(FEWEST_HANG_SECONDS, HANG_STEPS * handle.longest_silence)
    if not handle.ready:
        return least
    if hang_seconds is not None:
        return hang_seconds
    pace = handle.pulse.pace if handle.pulse is not None and len(handle.members) > 1 else 0.0
    return max(FEWEST_GANG_HANG_SECONDS, HANG_STEPS * pace) if pace else least
