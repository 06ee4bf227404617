"""Replicas as Ray actors. Beside `exporter.py` the only file that imports ray.

It starts actors, hands them work and turns what becomes of them into events. A gang is several actors that are placed,
started and lost together: to everybody else it is one replica. Refuses to decide anything: who gets what, what a death
counts and whether a replacement is wanted is the dispatcher's business. Ray never retries for us.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vidgen.errors import ConfigError, GangError, UserError
from vidgen.fleet.events import Event, ReplicaLost, ReplicaReady, Work
from vidgen.fleet.formation import Formation, Node
from vidgen.fleet.gang import BROKEN, Ending, Entry, Member, Seat, enter
from vidgen.fleet.replica import Pulse, Settings, Worker
from vidgen.store.objects import new_token
from vidgen.types import Request

POLL_SECONDS = 1.0
"""How long a replica may hold a poll open when it has nothing to say."""
FEWEST_HANG_SECONDS = 300.0
LOCAL_OBJECT_STORE_BYTES = 128 * 2**20
"""Frames and tensors never cross Ray, so a local cluster need not take a third of the memory for its object store."""
HANG_STEPS = 10
"""Without run.hang_seconds: a replica hangs that shows nothing for max(300 s, 10 x its longest silence so far)."""
FEWEST_GANG_HANG_SECONDS = 60.0
"""A gang between two steps hangs after max(60 s, 10 x the median step of the batch)."""
RENDEZVOUS_ATTEMPTS = 3
UNREACHABLE_SECONDS = 45.0
"""How long a process may be unreachable before it counts as lost with its machine. Ray needs about 15 s to know that a
machine is gone, and says so; a process that died alone is told at once."""
BROKEN_SECONDS = 5.0
"""How long after a gang fell out of step the death of a member may be noticed as its reason."""


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

    def sit(self) -> Place:
        """Ready to meet the others: what takes long to import is."""
        importlib.import_module("vidgen.parallel.gang")
        return Place(self.node, ray.util.get_node_ip_address(), self.entry.port())

    def join(self, seat: Seat) -> None:
        self.gang = enter(self.entry, seat, self.settings.model.device)

    def start(self, peers: Sequence[Any] = ()) -> str:
        if self.worker is not None:
            return self.worker.start(self.gang, RayPeers(peers) if peers else None)
        assert self.member is not None
        self.member.start(self.gang)
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

    def poll(self, timeout: float) -> Pulse | None:
        """A Worker's pulse; a Member shows with None that its process lives."""
        if self.worker is not None:
            return self.worker.poll(timeout)
        time.sleep(timeout)
        return None


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
                found.append(Ending(BROKEN, _first_line(error)))
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member is, and what it offers if it is the first."""

    node: str
    address: str
    port: int


@dataclass(slots=True)
class Process:
    """One actor: `call` is what it was told to do to come in, None once it has; `poll` its next sign of life. `heard`:
    when the last one came; `unreachable`: since when its connection is broken, for a reason not known yet."""

    actor: Any
    call: Any
    poll: Any
    node: str = ""
    heard: float | None = None
    unreachable: float | None = None


@dataclass(slots=True)
class Handle:
    """One replica. `stage` is what all members are being told: sit, join, start; then ready."""

    members: list[Process]
    group: Any = None
    stage: str = "start"
    answers: dict[int, Any] = field(default_factory=dict)
    attempt: int = 1
    pulse: Pulse | None = None
    longest_silence: float = 0.0
    broken_at: float | None = None


class RayFleet:
    """The actors of one run. `poll` is the only call that waits."""

    def __init__(
        self, settings: Settings, formation: Formation, hang_seconds: float | None, entry: Entry | None = None
    ) -> None:
        self.settings, self.formation, self.hang_seconds = settings, formation, hang_seconds
        self.entry = entry or Entry()
        self.handles: dict[str, Handle] = {}

    def start(self, name: str) -> None:
        """Starts (or starts again) the replica of that name. The members of a gang get a placement group: all of them
        or none."""
        kind = self.formation.kind(name)
        group = None
        if kind.layout.size > 1:
            bundle = {"CPU": self.formation.cpus, "GPU": self.formation.gpus}
            bundle = {resource: amount for resource, amount in bundle.items() if amount}
            group = placement_group([bundle] * kind.layout.size, strategy="STRICT_PACK" if kind.strict else "PACK")
        self.handles[name] = Handle([], group)
        self._man(name)

    def send(self, name: str, batch: int, works: tuple[Work, ...]) -> None:
        handle = self.handles.get(name)
        if handle is None:
            return  # it was lost a moment ago; the event that says so is on its way and brings the batch back
        handle.members[0].actor.submit.options(concurrency_group="control").remote(batch, works)

    def recall(self, name: str, within: float | None = None) -> None:
        handle = self.handles.get(name)
        if handle is not None:
            handle.members[0].actor.leave.options(concurrency_group="control").remote(within)

    def pulses(self) -> dict[str, Pulse | None]:
        """The last sign of life of each replica; None while it starts."""
        return {name: handle.pulse if handle.stage == "ready" else None for name, handle in self.handles.items()}

    def poll(self, timeout: float) -> list[Event]:
        """Waits up to `timeout` seconds for any member to say something; returns what was said, and who was lost."""
        waiting = {
            reference: (name, rank)
            for name, handle in self.handles.items()
            for rank, process in enumerate(handle.members)
            for reference in (process.call, process.poll)
            if reference is not None
        }
        if not waiting:
            time.sleep(timeout)
            return []
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        events: list[Event] = []
        for reference in done:
            self._hear(*waiting[reference], reference, events)
        for name in list(self.handles):
            self._notice_silence(name, events)
        return events

    def close(self) -> None:
        """Kills all replicas."""
        for handle in self.handles.values():
            self._kill(handle)
        self.handles.clear()

    # ---------------------------------------------------------------- coming up

    def _man(self, name: str) -> None:
        """Puts a process on each place of a replica. A gang's first sit, then meet, then load."""
        handle, size = self.handles[name], self.formation.kind(name).layout.size
        handle.stage, handle.answers, handle.members = "sit" if size > 1 else "start", {}, []
        for rank in range(size):
            options: dict[str, Any] = {
                "num_cpus": self.formation.cpus,
                "num_gpus": self.formation.gpus,
                "max_restarts": 0,
                "max_task_retries": 0,
                "concurrency_groups": {"control": 4},
            }
            if handle.group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(handle.group, rank)
            remote: Any = ray.remote(**options)(ReplicaActor)
            actor = remote.remote(name, rank, self.settings, self.entry)
            call = actor.sit.remote() if size > 1 else actor.start.remote()
            poll = actor.poll.options(concurrency_group="control").remote(POLL_SECONDS)
            handle.members.append(Process(actor, call, poll))

    def _answered(self, name: str, rank: int, answer: Any, events: list[Event]) -> None:
        """One member did what it was told; once all have, they are told what comes next."""
        handle = self.handles[name]
        handle.members[rank].call = None
        handle.answers[rank] = answer
        if len(handle.answers) < len(handle.members):
            return
        answers, handle.answers = handle.answers, {}
        if handle.stage == "sit":
            handle.stage, token = "join", new_token()
            layout = self.formation.kind(name).layout
            for number, process in enumerate(handle.members):
                process.node = answers[number].node
                seat = Seat(number, layout, answers[0].address, answers[0].port, token)
                process.call = process.actor.join.remote(seat)
        elif handle.stage == "join":
            handle.stage = "start"
            others = [process.actor for process in handle.members[1:]]
            for number, process in enumerate(handle.members):
                process.call = process.actor.start.remote(others if number == 0 else ())
        else:
            handle.stage = "ready"
            for number, process in enumerate(handle.members):
                process.node = answers[number]
            events.append(ReplicaReady(name, answers[0]))

    def _meet_again(self, name: str) -> bool:
        """A gang that did not come together (a port taken by another, a member that met strangers) tries again in the
        same places, with new processes and another port: the old ones may still be waiting for each other."""
        handle = self.handles[name]
        if handle.stage != "join" or handle.attempt >= RENDEZVOUS_ATTEMPTS:
            return False
        handle.attempt += 1
        _end(handle)
        self._man(name)
        return True

    # ---------------------------------------------------------------- what is heard, and what is not

    def _hear(self, name: str, rank: int, reference: Any, events: list[Event]) -> None:
        handle = self.handles.get(name)
        if handle is None or rank >= len(handle.members):
            return  # lost a moment ago, by what another of its members said
        process = handle.members[rank]
        if reference not in (process.call, process.poll):
            return
        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, GangError) and self._meet_again(name):
                return
            refused = isinstance(error.cause, UserError)
            self._lose(name, "refused" if refused else "start", _cause(error), events)
            return
        except ActorUnschedulableError as error:
            self._lose(name, "start", str(error), events)
            return
        except ActorUnavailableError as error:
            self._doubt(name, rank, _first_line(error), events)
            return
        except RayError as error:
            cause = "start" if handle.stage != "ready" else "crash" if _node_lives(process.node) else "node"
            self._lose(name, cause, f"{_member(handle, rank)}{_first_line(error)}", events)
            return
        if process.unreachable is not None:
            self._lose(name, "node", f"{_member(handle, rank)}what it said while it was unreachable is lost", events)
            return
        if reference is process.call:
            self._answered(name, rank, answer, events)
            return
        process.heard = time.monotonic()
        process.poll = process.actor.poll.options(concurrency_group="control").remote(POLL_SECONDS)
        if answer is not None:
            handle.pulse = answer
            events.extend(answer.events)
            handle.longest_silence = max(handle.longest_silence, answer.silent)
            if answer.broken and handle.broken_at is None:
                handle.broken_at = time.monotonic()

    def _doubt(self, name: str, rank: int, error: str, events: list[Event]) -> None:
        """A connection broke. Asked again, Ray tells in the end whether the process or its whole machine is gone."""
        handle, now = self.handles[name], time.monotonic()
        process = handle.members[rank]
        process.unreachable = process.unreachable or now
        if handle.stage != "ready" or now - process.unreachable > UNREACHABLE_SECONDS:
            self._lose(name, "node" if handle.stage == "ready" else "start", f"{_member(handle, rank)}{error}", events)
        else:
            process.poll = process.actor.poll.options(concurrency_group="control").remote(POLL_SECONDS)

    def _notice_silence(self, name: str, events: list[Event]) -> None:
        """A replica hangs whose process does not answer, or whose engine shows nothing for too long. A gang that broke
        is given a moment: if one of its members died, that is what is told."""
        handle, now = self.handles[name], time.monotonic()
        if handle.broken_at is not None and all(process.unreachable is None for process in handle.members):
            if handle.pulse is not None and now - handle.broken_at > BROKEN_SECONDS:
                self._lose(name, "gang", handle.pulse.broken, events)
            return
        ready = handle.stage == "ready"
        allowed = self._allowed(handle)
        unheard = [(now - process.heard, rank) for rank, process in enumerate(handle.members) if process.heard]
        silent, rank = max(unheard, default=(0.0, 0))
        if ready and handle.pulse is not None and handle.pulse.silent > silent:
            silent, rank = handle.pulse.silent, 0
        if silent > allowed:
            gone = next((p.node for p in handle.members if ready and not _node_lives(p.node)), None)
            cause = "start" if not ready else "hang" if gone is None else "node"
            self._lose(name, cause, f"{_member(handle, rank)}no sign of life for {allowed:.0f} s", events)

    def _allowed(self, handle: Handle) -> float:
        """Seconds without a sign of life. A gang that steps is judged by its own steps: one member that stands still
        holds all of them."""
        least = max(FEWEST_HANG_SECONDS, HANG_STEPS * handle.longest_silence)
        if handle.stage != "ready":
            return least
        if self.hang_seconds is not None:
            return self.hang_seconds
        pace = handle.pulse.pace if handle.pulse is not None and len(handle.members) > 1 else 0.0
        return max(FEWEST_GANG_HANG_SECONDS, HANG_STEPS * pace) if pace else least

    def _lose(self, name: str, cause: str, error: str, events: list[Event]) -> None:
        self._kill(self.handles.pop(name))
        events.append(ReplicaLost(name, cause, error))

    @staticmethod
    def _kill(handle: Handle) -> None:
        _end(handle)
        if handle.group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(handle.group)


def _end(handle: Handle) -> None:
    for process in handle.members:
        with contextlib.suppress(RayError):
            ray.kill(process.actor)


def _member(handle: Handle, rank: int) -> str:
    return f"rank {rank}: " if len(handle.members) > 1 else ""


def _node_lives(node: str) -> bool:
    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


def _cause(error: RayTaskError) -> str:
    cause = error.cause
    if isinstance(cause, UserError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


# ---------------------------------------------------------------- joining a cluster


def connect(address: str | None, log: Callable[[str], None]) -> None:
    """Joins the cluster at `address` (or RAY_ADDRESS), or starts a local one."""
    if ray.is_initialized():
        return
    wanted = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
        # "local": None would join whatever cluster `ray start` left on this machine.
        address, options = (wanted, {}) if wanted else ("local", own)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RayError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {wanted!r}: {_first_line(error)}") from error
    log(f"joined the Ray cluster at {wanted}" if wanted else "started a local Ray cluster")


def own_node() -> str:
    """Id of the node this process runs on."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def cluster_nodes() -> tuple[list[Node], int]:
    """The machines of the cluster as it is now, and their bytes of memory in all."""
    living = [entry["Resources"] for entry in ray.nodes() if entry["Alive"]]
    nodes = [Node(float(found.get("CPU", 0)), int(found.get("GPU", 0))) for found in living]
    return nodes, int(sum(found.get("memory", 0) for found in living))


def disconnect() -> None:
    with contextlib.suppress(RayError, GetTimeoutError):
        ray.shutdown()
