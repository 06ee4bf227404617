"""A gang: several processes that work on the same batches, of which the first is a replica and the others take part.

The first one (rank 0) is a `vidgen.fleet.replica.Worker`: it gets batches, writes and commits. It tells the others what
it begins, and they run the same requests through the same engine; whatever they must agree on inside a batch goes
through the gang's own collectives. Refuses to know Ray, and which machine a member is on.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vidgen.errors import Cancelled, GangError, GenerationError, InfrastructureError
from vidgen.parallel.layout import Layout
from vidgen.types import Hooks, ModelSettings, Request

if TYPE_CHECKING:
    from vidgen.parallel.gang import Gang

RENDEZVOUS_SECONDS = 60.0
"""How long members wait for each other when a gang comes together; all are there, with torch imported, when it starts.
"""
IN_STEP_SECONDS = 20.0
"""How long after rank 0 ended a batch with an error the others may take to end it in the same way."""

DONE, CANCELLED, BROKEN = "done", "cancelled", "broken"
"""Ends of a batch beside the failure classes of `vidgen.errors`. Broken: an error that is none of ours, or a rank that
does not answer."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A member's place: rank 0 listens at `address`:`port`. `token` is the gang's, new at each attempt: one that meets
    members of another gang there knows it."""

    rank: int
    layout: Layout
    address: str
    port: int
    token: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a member's batch ended: done, cancelled, broken, or a failure class; and the error."""

    how: str
    error: str = ""


class Peers(Protocol):
    """The other members, as rank 0 sees them."""

    def begin(self, requests: Sequence[Request]) -> None:
        """They run these too, after what they were given before."""

    def endings(self, timeout: float) -> list[Ending | None]:
        """How each ended its last batch, waiting up to `timeout` seconds; None for one that is still at it."""


class Entry:
    """How a process becomes a member and gets its engine. Tests put in what goes wrong."""

    def port(self) -> int:
        """A port that is free on this machine now; another may take it before it is used."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            found: int = probe.getsockname()[1]
            return found

    def join(self, seat: Seat, device: str) -> Gang:
        """Meets the others; GangError if not all came, or the port is another's."""
        from vidgen.parallel.gang import join

        place = (seat.rank, seat.layout, seat.address, seat.port)
        return join(*place, device=device, timeout=RENDEZVOUS_SECONDS)

    def load(self, settings: ModelSettings, gang: Gang | None) -> Any:
        """The engine, of a gang's member or of one process that is alone."""
        from vidgen import engine

        return engine.load_model(settings, gang)


def enter(entry: Entry, seat: Seat, device: str) -> Gang:
    """A seat taken: the gang, once every member has shown that it is of this one. GangError otherwise."""
    gang = entry.join(seat, device)
    found = gang.agree(lambda: seat.token)
    if found != seat.token:
        gang.close()
        raise GangError(f"rank {seat.rank} met another gang at {seat.address}:{seat.port}")
    return gang


class Member:
    """A rank that is not the first: an engine that runs what rank 0 says, and whose frames nobody reads."""

    def __init__(self, name: str, settings: ModelSettings, entry: Entry) -> None:
        self.name, self.settings, self.entry = name, settings, entry
        self.stage, self.step, self.steps = "idle", 0, 0
        self._engine: Any = None

    def start(self, gang: Gang) -> None:
        """Loads this rank's part of the model."""
        self.stage = "load"
        self._engine = self.entry.load(self.settings, gang)
        self.stage = "idle"

    def take_part(self, requests: Sequence[Request]) -> Ending:
        """One batch, as rank 0 runs it; every error is an ending."""
        try:
            for video in self._engine.generate(requests, Hooks(progress=self._progress)):
                for _ in video.chunks:
                    pass
        except Exception as error:  # rank 0 hears of it, whatever it is
            return Ending(ending(error), f"{self.name}: {type(error).__name__}: {' '.join(str(error).split())}"[:2000])
        finally:
            self.stage = "idle"
        return Ending(DONE)

    def _progress(self, stage: str, step: int, steps: int) -> None:
        self.stage, self.step, self.steps = stage, step, steps


def ending(error: BaseException) -> str:
    """What an error ends a batch as. Trouble with a file or a connection is rank 0's reading of media or saving of a
    state, of which all ranks hear; between ranks it is a GangError."""
    if isinstance(error, Cancelled):
        return CANCELLED
    if isinstance(error, GangError):
        return BROKEN
    if isinstance(error, OSError):
        return InfrastructureError.error_class
    return error.error_class if isinstance(error, GenerationError) else BROKEN


def in_step(peers: Peers, error: BaseException) -> bool:
    """Whether the gang can go on after rank 0 ended a batch with `error`: every other member ended it in the same way.
    Otherwise messages of this batch may still be on their way, and would be taken for the next one's."""
    how = ending(error)
    if how == BROKEN:
        return False
    return all(other is not None and other.how == how for other in peers.endings(IN_STEP_SECONDS))


class Watch:
    """Notices, between polls, that a member ended a batch with an error while rank 0 is still in it: it waits for a
    message that will never come."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._since: float | None = None

    def begin(self, requests: Sequence[Request]) -> None:
        self._since = None
        self._peers.begin(requests)

    def failed(self) -> Ending | None:
        """The first bad ending, once it is IN_STEP_SECONDS old."""
        bad = [end for end in self._peers.endings(0.0) if end is not None and end.how not in (DONE, CANCELLED)]
        if not bad:
            return None
        now = time.monotonic()
        self._since = self._since if self._since is not None else now
        return bad[0] if now - self._since > IN_STEP_SECONDS else None
