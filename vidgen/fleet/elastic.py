"""How many replicas there are to be while the cluster grows and shrinks: `parallel.replicas: auto` follows it.

A band whose number is given keeps it: what a lost node took waits for room, and so asks an autoscaler for a node. Any
other band has as many as there is room for and work for; room counts what an autoscaler may still bring, so the ones
that wait are its demand. An idle replica is closed once the queue has been shorter than the idle ones for a while, so
that its node may go. Pure arithmetic; refuses to know Ray, and what an item is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vidgen.fleet.formation import Band, Node, room_for


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica of a band: whether it has come up, and whether it has work."""

    name: str
    ready: bool
    busy: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What a band needs: so many replicas more, and these of no use any more."""

    more: int = 0
    fewer: tuple[str, ...] = ()


class Elastic:
    """`room`: replicas of each band that the cluster has room for; None where the number is given. Empty: nobody has
    said, and nothing changes. `idle_seconds`: how long a replica is idle before it is closed."""

    def __init__(self, idle_seconds: float) -> None:
        self.idle_seconds = idle_seconds
        self.room: tuple[int | None, ...] = ()
        self._idle_since: dict[str, float] = {}

    def follows(self, band: int) -> bool:
        return band < len(self.room) and self.room[band] is not None

    def replaces(self, band: int, others: int) -> bool:
        """Whether a replica that was lost is started again at once, beside `others` of its band."""
        room = self.room[band] if self.follows(band) else None
        return room is None or others < max(1, room)

    def change(self, band: int, replicas: Sequence[Standing], queued: int, more_to_come: bool, now: float) -> Change:
        """What to change in a band with `queued` items that nobody has yet, and perhaps `more_to_come`."""
        for one in replicas:
            if one.busy:
                self._idle_since.pop(one.name, None)
            else:
                self._idle_since.setdefault(one.name, now)
        if not self.follows(band):
            return Change()
        room = self.room[band] or 0
        busy = sum(one.busy for one in replicas)
        wanted = room if more_to_come else min(room, busy + queued)
        wanted = max(wanted, 1 if queued or more_to_come else 0)
        if len(replicas) <= wanted:
            return Change(more=wanted - len(replicas))
        surplus = len(replicas) - wanted
        waiting = [one.name for one in replicas if not one.ready]
        homeless = waiting[::-1][: max(0, len(replicas) - max(1, room))]
        patient = [one.name for one in replicas if not one.busy and one.name not in homeless]
        tired = [name for name in patient if now - self._idle_since[name] >= self.idle_seconds]
        chosen = [*homeless, *tired[::-1]][:surplus]
        for name in chosen:
            self._idle_since.pop(name, None)
        return Change(fewer=tuple(chosen))


def rooms(bands: Sequence[Band], share: float | None, nodes: Sequence[Node]) -> tuple[int | None, ...]:
    """Replicas of each band that these nodes hold, None where the configuration gives their number. A member takes a
    GPU, or that `share` of the CPUs. A band of which the plan has no items needs none."""
    free = [node.gpus if share is None else int(node.cpus / share + 1e-6) for node in nodes]
    counts = room_for(bands, free)
    return tuple(None if band.replicas is not None else count for band, count in zip(bands, counts, strict=True))


def next_name(known: Mapping[str, int], band: int, taken: Collection[str]) -> tuple[str, str]:
    """(A name for one replica more of a band, one that the band has had): one that is free again, or the next number.
    `known` says the band of every name there ever was."""
    own = [name for name, of in known.items() if of == band]
    free = [name for name in own if name not in taken]
    if free:
        return free[0], free[0]
    letter = own[0][0]
    last = max(int(name[1:]) for name in known if name[0] == letter)
    return f"{letter}{last + 1}", own[0]
