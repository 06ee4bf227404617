"""Nodes that will go: nothing new for their replicas, what runs there is finished or saved, and then they are closed.

Pure; refuses to know who says that a node will go, and what a replica does to leave (`vidgen.fleet.saving`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vidgen.fleet.events import Action, NodeDraining, Recall


class Resident(Protocol):
    """A replica, as far as it matters here: where it is, and whether it has work."""

    name: str
    node: str
    ready: bool

    @property
    def busy(self) -> bool: ...


class Draining:
    """The nodes that are known to go."""

    def __init__(self) -> None:
        self._deadlines: dict[str, float | None] = {}

    def __contains__(self, node: str) -> bool:
        return node in self._deadlines

    def notice(self, event: NodeDraining, replicas: Iterable[Resident], now: float) -> list[Action]:
        """Replicas there are asked to leave, once for each deadline that is told."""
        if event.node in self._deadlines and self._deadlines[event.node] == event.deadline:
            return []
        self._deadlines[event.node] = event.deadline
        within = None if event.deadline is None else max(0.0, event.deadline - now)
        return [Recall(replica.name, within) for replica in replicas if replica.node == event.node and replica.busy]

    def left(self, replicas: Iterable[Resident]) -> list[str]:
        """Replicas on such nodes that have nothing any more."""
        return [replica.name for replica in replicas if replica.ready and replica.node in self and not replica.busy]
