"""Stands where the files of `vidgen.fleet` that import ray stand: replicas are forks of the server, behind a socket.

Each is a process of its own, so a driver and a replica die apart; nothing of Ray is imported, so a fork is cheap.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from vidgen.errors import UserError
from vidgen.fleet import events as ev
from vidgen.fleet.formation import Coming, Formation, Node
from vidgen.fleet.gang import Entry
from vidgen.fleet.metrics import NoSink
from vidgen.fleet.replica import Pulse, Settings, Worker
from vidgen.models.testcard import backend
from vidgen.types import ModelSettings

NODE = "here"
control: socket.socket | None = None
"""To the process that forks replicas; set in a driver."""


def connect(address: str | None, log: Callable[[str], None]) -> None:
    pass


def disconnect() -> None:
    pass


def cluster_nodes() -> tuple[list[Node], int]:
    return [Node(2.0, 0)], 8 << 30


def present() -> list[Node]:
    return cluster_nodes()[0]


present_and_to_come = present


def coming(here: Sequence[Node]) -> Coming:
    return Coming()


def draining() -> dict[str, float | None]:
    return {}


def own_node() -> str:
    return NODE


class RaySink(NoSink):
    """Where metrics go."""

    def __init__(self, run: str, output: str) -> None:
        pass


class RayFleet:
    """The fleet that a driver sees."""

    def __init__(self, settings: Settings, formation: Formation, *rest: Any, **options: Any) -> None:
        self.settings = settings
        self.lines: dict[str, Connection] = {}
        self.last: dict[str, Pulse | None] = {}
        self.waiting: list[ev.Event] = []

    def start(self, name: str, avoid: Sequence[str] = ()) -> None:
        assert control is not None
        control.send(name.encode())
        _, (line, *_), _, _ = socket.recv_fds(control, 1, 1)
        self.lines[name], self.last[name] = Connection(line), None
        try:
            self.waiting.append(ev.ReplicaReady(name, self._ask(name, "start", self.settings)))
        except (EOFError, OSError):
            self._lose(name, "start", "it died while it started")
        except UserError as error:
            self._lose(name, "refused", str(error))
        except Exception as error:  # as an actor's: whatever its start raises
            self._lose(name, "start", f"{type(error).__name__}: {error}")

    def send(self, name: str, batch: int, works: tuple[ev.Work, ...]) -> None:
        self._tell(name, "submit", batch, works)

    def recall(self, name: str, within: float | None = None) -> None:
        self._tell(name, "leave", within)

    def reclaim(self, name: str) -> None:
        self._tell(name, "recall")

    def enlist(self, name: str, band: int, avoid: Sequence[str] = ()) -> None:
        self.start(name)

    def dismiss(self, name: str) -> None:
        self.lines.pop(name).close()
        del self.last[name]

    def pulses(self) -> dict[str, Pulse | None]:
        return dict(self.last)

    def poll(self, timeout: float) -> list[ev.Event]:
        events, self.waiting = self.waiting, []
        if not self.lines:
            time.sleep(0.01)
        for name in list(self.lines):
            try:
                pulse = self.last[name] = self._ask(name, "poll", 0.005)
                events += pulse.events
            except (EOFError, OSError):
                self._lose(name, "crash", "its process died")
        return events

    def close(self) -> None:
        for name in list(self.lines):
            self.lines.pop(name).close()

    def _lose(self, name: str, cause: str, error: str) -> None:
        self.lines.pop(name).close()
        self.last.pop(name, None)
        self.waiting.append(ev.ReplicaLost(name, cause, error))

    def _tell(self, name: str, *call: Any) -> None:
        try:
            self._ask(name, *call)
        except (EOFError, OSError):  # noticed by the next poll
            pass
        except KeyError:
            pass

    def _ask(self, name: str, *call: Any) -> Any:
        line = self.lines[name]
        line.send(call)
        answer = line.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class TestCards(Entry):
    """The engine of the smallest backend, without the import of torch that every other one needs."""

    def load(self, settings: ModelSettings, gang: Any) -> Any:
        return backend.load(settings)


def replica(name: str, line: Connection, linger: bool) -> None:
    """The life of one replica; it ends when nobody is at the other end any more, with `linger` only after what it has
    in hand: a zombie, whose commits come after its driver's death."""
    worker: Worker | None = None
    while True:
        try:
            method, *arguments = line.recv()
            if method == "start":
                worker = Worker(name, NODE, *arguments, TestCards())
                answer = worker.start()
            else:
                assert worker is not None
                answer = getattr(worker, method)(*arguments)
        except (EOFError, OSError):
            if worker is not None and linger:
                worker.close()
            os._exit(0)
        except Exception as error:
            answer = error
        line.send(answer)
