"""Looks at the cluster now and then, and tells what changed: nodes that will go or stay after all, and room for
replicas.

The edge at which a test puts another cluster: whom it asks is given (`vidgen.fleet.nodes` asks Ray). Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vidgen.fleet.events import Event, NodeDraining, NodeStays, Room
from vidgen.fleet.formation import Node

SECONDS = 2.0
"""Between two looks. A spot notice is 30 s at the least; each look is two small questions to the head."""
SAME_DEADLINE = 2.0
"""Seconds within which two deadlines of a node are one, told at two moments."""

Notices = Callable[[], Mapping[str, float | None]]
"""Node id -> seconds until it goes, None where it is not said when; of every node that will."""
Rooms = Callable[[Sequence[Node]], tuple[int | None, ...]]
"""Replicas of each band that some nodes have room for; None where the number is given."""


class Watch:
    """Asks `draining` and `nodes`; `rooms` None: the number of replicas is given, whatever the cluster is."""

    def __init__(self, draining: Notices, nodes: Callable[[], Sequence[Node]], rooms: Rooms | None = None) -> None:
        self._draining, self._nodes, self._rooms = draining, nodes, rooms
        self._looked: float | None = None
        self._deadlines: dict[str, float | None] = {}
        self._room: tuple[int | None, ...] = ()

    def look(self, now: float) -> list[Event]:
        """What changed since the last look that found something; nothing if that was a moment ago."""
        if self._looked is not None and now - self._looked < SECONDS:
            return []
        self._looked = now
        going = self._draining()
        return [*self._growth(going), *self._reprieves(going), *self._notices(going, now)]

    def _growth(self, going: Mapping[str, float | None]) -> list[Event]:
        if self._rooms is None:
            return []
        room = self._rooms([node for node in self._nodes() if node.id not in going])
        changed, self._room = room != self._room, room
        return [Room(room)] if changed else []

    def _reprieves(self, going: Mapping[str, float | None]) -> list[Event]:
        """Nodes that are no longer among those that go, and are still there."""
        missing = self._deadlines.keys() - going.keys()
        if not missing:
            return []
        for node in missing:
            del self._deadlines[node]
        return [NodeStays(node.id) for node in self._nodes() if node.id in missing]

    def _notices(self, going: Mapping[str, float | None], now: float) -> list[Event]:
        events: list[Event] = []
        for node, seconds in going.items():
            deadline = None if seconds is None else now + seconds
            if node in self._deadlines and _same(self._deadlines[node], deadline):
                continue
            self._deadlines[node] = deadline
            events.append(NodeDraining(node, deadline))
        return events


def _same(before: float | None, now: float | None) -> bool:
    if before is None or now is None:
        return before is now
    return abs(before - now) < SAME_DEADLINE
