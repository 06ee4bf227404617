"""The processes of replicas: actors that wrap a Worker, or a Member of a gang.

Refuses to decide anything, and to know the other replicas; `vidgen.fleet.cluster` starts them and hears what they say.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from vidgen.errors import InfrastructureError, UserError
from vidgen.fleet.events import Work
from vidgen.fleet.gang import BROKEN, Ending, Entry, Member, Seat, enter
from vidgen.fleet.replica import Pulse, Settings, Worker
from vidgen.types import Request


class ReplicaActor:
    """A member of a replica in a process of its own: a Worker, or (in a gang, after the first) a Member. The control
    calls run in their own concurrency group, so they are answered while the model loads or generates."""

    def __init__(self, name: str, rank: int, settings: Settings, entry: Entry) -> None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is first imported: spinning starves neighbours
        if settings.model.threads:
            os.environ["OMP_NUM_THREADS"] = str(settings.model.threads)
        self.node, self.settings, self.entry = ray.get_runtime_context().get_node_id(), settings, entry
        self.gang: Any = None
        self.worker = Worker(name, self.node, settings, entry) if rank == 0 else None
        self.member = Member(f"{name}, rank {rank}", settings.model, entry) if rank else None

    def where(self) -> str:
        """The node it is on: the first thing that is asked of it, so that it is known if the two are lost together."""
        return self.node

    def sit(self) -> Place:
        """Ready to meet the others: what takes long to import is."""
        importlib.import_module("vidgen.parallel.gang")
        return Place(self.node, ray.util.get_node_ip_address(), self.entry.port())

    def join(self, seat: Seat) -> None:
        self.gang = enter(self.entry, seat, self.settings.model.device)

    def start(self, peers: Sequence[Any] = ()) -> str:
        try:
            if self.worker is not None:
                return self.worker.start(self.gang, RayPeers(peers) if peers else None)
            assert self.member is not None
            self.member.start(self.gang)
        except (UserError, InfrastructureError):
            raise
        except Exception as error:  # whatever it is, it is told with the node's name
            raise StartFailed(f"{type(error).__name__}: {error}", self.node) from error
        return self.node

    def take_part(self, requests: Sequence[Request]) -> Ending:
        assert self.member is not None, "rank 0 begins batches itself"
        return self.member.take_part(requests)

    def submit(self, batch: int, works: tuple[Work, ...]) -> None:
        assert self.worker is not None
        self.worker.submit(batch, works)

    def leave(self, within: float | None) -> None:
        assert self.worker is not None
        self.worker.leave(within)

    def reclaim(self) -> None:
        assert self.worker is not None
        self.worker.recall()

    def poll(self, timeout: float) -> Pulse | None:
        """A Worker's pulse; a Member shows with None that its process lives."""
        if self.worker is not None:
            return self.worker.poll(timeout)
        time.sleep(timeout)
        return None


class StartFailed(RuntimeError):
    """A replica could not load, on that node."""

    def __init__(self, error: str, node: str) -> None:
        super().__init__(error, node)
        self.error, self.node = error, node

    def __str__(self) -> str:
        return self.error


class RayPeers:
    """The other members of a gang, as actors. Implements `vidgen.fleet.gang.Peers`."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._round: list[Any] = []

    def begin(self, requests: Sequence[Request]) -> None:
        self._round = [actor.take_part.remote(requests) for actor in self._actors]

    def endings(self, timeout: float) -> list[Ending | None]:
        running = self._round
        done, _ = ray.wait(running, num_returns=len(running), timeout=timeout) if running else ([], [])
        found: list[Ending | None] = []
        for reference in running:
            try:
                found.append(ray.get(reference) if reference in done else None)
            except RayError as error:
                found.append(Ending(BROKEN, first_line(error)))
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member is, and what it offers if it is the first."""

    node: str
    address: str
    port: int


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"
