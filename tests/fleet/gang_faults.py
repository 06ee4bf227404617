"""Gangs that draw test cards in step, and what can be done to them: a signal to a chosen rank at a chosen moment, once.

The collectives are the real ones (gloo); only the model is none. A fault is told to a member through its Entry, strikes
where a file says that it has not struck yet, and never again.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.errors import GangError
from vidgen.fleet.gang import Entry, Seat
from vidgen.models.testcard import backend
from vidgen.types import Hooks, ModelSettings, Request, Video

STAGES = ("rendezvous", "load", "encode", "denoise", "decode", "write")


@dataclass(frozen=True)
class Fault:
    """`signal` to `rank` when it reaches `stage` for the first time anywhere. `marker` is the file that says it has."""

    stage: str
    rank: int
    marker: str
    signal: int = signal.SIGKILL

    def strike(self, stage: str, rank: int) -> None:
        if (stage, rank) != (self.stage, self.rank):
            return
        try:
            with open(self.marker, "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return
        os.kill(os.getpid(), self.signal)

    @property
    def struck(self) -> int:
        """The process that was hit."""
        return int(Path(self.marker).read_text())


@dataclass(frozen=True)
class Cards(Entry):
    """Members whose engine draws test cards, in step with the others."""

    fault: Fault | None = None

    def join(self, seat: Seat, device: str) -> Any:
        if self.fault is not None:
            self.fault.strike("rendezvous", seat.rank)
        return super().join(seat, device)

    def load(self, settings: ModelSettings, gang: Any) -> Any:
        if gang is None:
            return backend.load(settings)
        if self.fault is not None:
            self.fault.strike("load", gang.rank)
            if gang.first and self.fault.stage == "write":
                _strike_before_commit(self.fault)
        return Deck(gang, self.fault)


class Deck:
    """The test card's backend as a gang: each rank draws all, and all agree at every step."""

    gpu = ""

    def __init__(self, gang: Any, fault: Fault | None) -> None:
        self.gang, self.fault, self.backend = gang, fault, backend.load()

    def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
        def progress(stage: str, step: int, steps: int) -> None:
            if self.fault is not None and (stage != "denoise" or step == 2):
                self.fault.strike(stage, self.gang.rank)
            if self.gang.agree(lambda: (stage, step)) != (stage, step):
                raise AssertionError("the ranks are not at the same step")
            hooks.progress(stage, step, steps)

        def cancelled() -> bool:
            return bool(self.gang.agree(hooks.cancelled))

        for video in self.backend.generate(requests, Hooks(progress=progress, cancelled=cancelled)):
            video.context = self.gang.layout.context
            yield video
        if self.fault is not None and self.fault.stage == "write" and not self.gang.first:
            threading.Timer(0.02, self.fault.strike, ("write", self.gang.rank)).start()


def _strike_before_commit(fault: Fault) -> None:
    """Rank 0 is hit between the put of its video and the commit."""
    from vidgen.store import commits

    commit = commits.commit

    def struck(*arguments: Any) -> Any:
        fault.strike("write", 0)
        return commit(*arguments)

    commits.commit = struck  # type: ignore[assignment]


@dataclass(frozen=True)
class Raced(Cards):
    """The first port that rank 0 offers was taken a moment ago: `taken` listens there."""

    taken: int = 0
    marker: str = ""

    def port(self) -> int:
        try:
            with open(self.marker, "x"):
                return self.taken
        except FileExistsError:
            return super().port()


@dataclass(frozen=True)
class Crossed(Cards):
    """The first members to meet have seats in different gangs."""

    marker: str = ""

    def join(self, seat: Seat, device: str) -> Any:
        gang = super().join(seat, device)
        if gang.first and not Path(self.marker).exists():
            Path(self.marker).touch()
            gang.agree(lambda: "the token of another gang")
            raise GangError("this was another gang's rank 0")
        return gang


def taken_port() -> socket.socket:
    """A socket that listens and never answers, as another program's would."""
    listening = socket.socket()
    listening.bind(("", 0))
    listening.listen()
    return listening
