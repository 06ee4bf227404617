"""How the replicas of a run come up: when one that failed to start is started again, and when none ever will.

Pure; refuses to know why a start failed, and on which node.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from vidgen.fleet.aboard import Replica
from vidgen.fleet.events import Finish, ReplicaLost

START_FAILURES = 3
RESTART_FAILURES = 10
"""Starts of a band's replicas that may fail, with none of them ready, before the run stops: 3 if none ever was ready,
else 10. As long as one of them has not failed yet, so many for each of them."""
NODES_LOST = 10
NODES_LOST_EACH = 2
"""Nodes that may go while a band's replicas load there, with none of them ready, before the run stops: 10, or 2 for
each of the replicas. Nodes of a spot market do go; but a model may also be what takes them down."""
RESTART_BACKOFF = 2.0
MAX_RESTART_BACKOFF = 60.0
"""Seconds before a replica that failed to start twice is started again, doubled with each further failure."""


@dataclass(slots=True)
class _Band:
    """Starts that failed since a replica of the band was ready, by replica; `nodes`: those lost with their node."""

    failures: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    ever_ready: bool = False


class Starts:
    """The starts of a run with so many bands."""

    def __init__(self, bands: int) -> None:
        self._bands = [_Band() for _ in range(bands)]
        self._again: list[tuple[float, str]] = []

    def ready(self, band: int) -> None:
        """A replica of the band is up: nothing that failed before counts any more."""
        self._bands[band].ever_ready = True
        self._bands[band].failures.clear()
        self._bands[band].nodes.clear()

    def failed(self, event: ReplicaLost, band: int, mates: Collection[Replica], now: float) -> Finish | None:
        """A replica did not come up: it is `due` again, at once or after a while, or this is the end of the run.
        `mates` are the replicas of its band, itself too."""
        starts = self._bands[band]
        failures = starts.nodes if event.cause == "node" else starts.failures
        failures[event.replica] += 1
        times = failures[event.replica]
        hopeless = event.cause == "late" and not starts.ever_ready
        enough = hopeless or failures.total() >= _allowed(starts, event.cause, [mate.name for mate in mates])
        if enough and not any(mate.ready for mate in mates):
            again = " again" if starts.ever_ready else ""
            lost = f"{failures.total()} nodes went while it loaded there; the last: " if event.cause == "node" else ""
            return Finish(4, f"no replica became ready{again}: {lost}{event.error}")
        delay = min(MAX_RESTART_BACKOFF, RESTART_BACKOFF ** (times - 1)) if times > 1 else 0.0
        heapq.heappush(self._again, (now + delay, event.replica))
        return None

    def due(self, now: float) -> list[str]:
        """Replicas whose turn it is to be started again; each is told once."""
        names = []
        while self._again and self._again[0][0] <= now:
            names.append(heapq.heappop(self._again)[1])
        return names

    def forget(self, name: str) -> None:
        """That replica is not started again."""
        self._again = [(when, other) for when, other in self._again if other != name]
        heapq.heapify(self._again)


def _allowed(starts: _Band, cause: str, mates: Collection[str]) -> int:
    """How many failures of that kind a band may have with none of its replicas ready."""
    if cause == "node":
        return max(NODES_LOST, NODES_LOST_EACH * len(mates))
    allowed = RESTART_FAILURES if starts.ever_ready else START_FAILURES
    return allowed * len(mates) if any(mate not in starts.failures for mate in mates) else allowed
