"""Nodes that will go: nothing new for their replicas, what runs there is finished or saved, and then they are closed.

A node that is to stay after all is used again, by new replicas: one that was told to leave it leaves.

Pure; refuses to know who says that a node will go, and what a replica does to leave (`vidgen.fleet.saving`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vidgen.fleet.events import Action, NodeDraining, NodeStays, Recall


class Resident(Protocol):
    """A replica, as far as it matters here: where it is, whether it has work, and whether it was told to leave."""

    name: str
    node: str
    ready: bool
    leaving: bool

    @property
    def busy(self) -> bool: ...


class Draining:
    """The nodes that are known to go."""

    def __init__(self) -> None:
        self._deadlines: dict[str, float | None] = {}

    def __contains__(self, node: str) -> bool:
        return node in self._deadlines

    def takes_work(self, replica: Resident) -> bool:
        return replica.ready and not replica.leaving and replica.node not in self

    def notice(self, event: NodeDraining | NodeStays, replicas: Iterable[Resident], now: float) -> list[Action]:
        """Replicas there are asked to leave, once for each deadline that is told."""
        if isinstance(event, NodeStays):
            self._deadlines.pop(event.node, None)
            return []
        if event.node in self._deadlines and self._deadlines[event.node] == event.deadline:
            return []
        self._deadlines[event.node] = event.deadline
        within = None if event.deadline is None else max(0.0, event.deadline - now)
        asked = [replica for replica in replicas if replica.node == event.node and replica.busy]
        for replica in asked:
            replica.leaving = True
        return [Recall(replica.name, within) for replica in asked]

    def left(self, replicas: Iterable[Resident]) -> list[str]:
        """Replicas that are to leave and have nothing any more."""
        return [one.name for one in replicas if one.ready and not self.takes_work(one) and not one.busy]
