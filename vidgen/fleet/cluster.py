"""Replicas as Ray actors.

It starts actors, hands them work and turns what becomes of them into events. A gang is several actors that are placed,
started and lost together: to everybody else it is one replica. Refuses to decide anything: who gets what, what a death
counts and whether a replacement is wanted is the dispatcher's business. Ray never retries for us.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn, PlacementGroupSchedulingStrategy

from vidgen.errors import ConfigError, GangError, UserError
from vidgen.fleet import nodes, silence
from vidgen.fleet.actors import ReplicaActor, StartFailed, first_line
from vidgen.fleet.events import Event, ReplicaLost, ReplicaReady, Work
from vidgen.fleet.formation import Formation
from vidgen.fleet.gang import Entry, Seat
from vidgen.fleet.replica import Pulse, Settings
from vidgen.fleet.silence import Handle, Loss, Process
from vidgen.fleet.watch import Watch
from vidgen.store.objects import new_token

POLL_SECONDS = 1.0
"""How long a replica may hold a poll open when it has nothing to say."""
LOCAL_OBJECT_STORE_BYTES = 128 * 2**20
"""Frames and tensors never cross Ray, so a local cluster need not take a third of the memory for its object store."""
RENDEZVOUS_ATTEMPTS = 3
FEWEST_START_SECONDS = 900.0
LOAD_BYTES_PER_SECOND = 10e6
"""A replica whose processes run is late when it is not ready after 900 s and the time to read its weights at 10 MB/s.
Waiting for resources is not starting: that may take as long as another job holds them."""
NODE_LABEL = "ray.io/node-id"
AWAITED_SECONDS = 5.0
"""How often the cluster is asked what it has free, while a replica waits."""


class RayFleet:
    """The actors of one run. `poll` is the only call that waits; with a `watch` it tells of the cluster too."""

    def __init__(
        self,
        settings: Settings,
        formation: Formation,
        hang_seconds: float | None,
        entry: Entry | None = None,
        weight_bytes: int = 0,
    ) -> None:
        self.settings, self.formation, self.hang_seconds = settings, formation, hang_seconds
        self.entry = entry or Entry()
        self.handles: dict[str, Handle] = {}
        self.watch: Watch | None = None
        self.start_seconds = FEWEST_START_SECONDS + weight_bytes / LOAD_BYTES_PER_SECOND
        self._awaited = ""
        self._asked_at = 0.0

    def start(self, name: str, avoid: Sequence[str] = ()) -> None:
        """Starts (or starts again) the replica of that name, on a node that is not one of `avoid` if another has room.
        The members of a gang get a placement group: all of them or none, wherever there is room."""
        if name in self.handles:
            self._kill(self.handles.pop(name))
        kind = self.formation.kind(name)
        group = None
        if kind.layout.size > 1:
            bundle = {"CPU": self.formation.cpus, "GPU": self.formation.gpus}
            bundle = {resource: amount for resource, amount in bundle.items() if amount}
            group = placement_group([bundle] * kind.layout.size, strategy="STRICT_PACK" if kind.strict else "PACK")
        self.handles[name] = Handle([], group)
        self._man(name, avoid)

    def enlist(self, name: str, band: int, avoid: Sequence[str] = ()) -> None:
        """Starts a replica that the formation did not have."""
        if name not in self.formation.band_of:
            self.formation = self.formation.with_one(name, band)
        self.start(name, avoid)

    def dismiss(self, name: str) -> None:
        """Kills one replica, without an event."""
        if (handle := self.handles.pop(name, None)) is not None:
            self._kill(handle)

    def send(self, name: str, batch: int, works: tuple[Work, ...]) -> None:
        handle = self.handles.get(name)
        if handle is None:
            return  # it was lost a moment ago; the event that says so is on its way and brings the batch back
        handle.members[0].actor.submit.options(concurrency_group="control").remote(batch, works)

    def recall(self, name: str, within: float | None = None) -> None:
        handle = self.handles.get(name)
        if handle is not None:
            handle.members[0].actor.leave.options(concurrency_group="control").remote(within)

    def reclaim(self, name: str) -> None:
        handle = self.handles.get(name)
        if handle is not None:
            handle.members[0].actor.reclaim.options(concurrency_group="control").remote()

    def pulses(self) -> dict[str, Pulse | None]:
        """The last sign of life of each replica; None while it starts, or what it waits for as its stage."""
        waiting = {name for name, handle in self.handles.items() if not handle.placed}
        awaited = self._free() if waiting else ""
        return {
            name: handle.pulse if handle.ready else self._waits(name, awaited) if name in waiting else None
            for name, handle in self.handles.items()
        }

    def poll(self, timeout: float) -> list[Event]:
        """Waits up to `timeout` seconds for any member to say something; returns what was said, and who was lost."""
        waiting = {
            reference: (name, rank)
            for name, handle in self.handles.items()
            for rank, process in enumerate(handle.members)
            for reference in (process.call, process.poll)
            if reference is not None
        }
        events: list[Event] = self.watch.look(time.monotonic()) if self.watch is not None else []
        if not waiting:
            time.sleep(timeout)
            return events
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=0 if events else timeout)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for reference in done:
            self._hear(*waiting[reference], reference, events)
        for name in list(self.handles):
            handle, now = self.handles[name], time.monotonic()
            if loss := silence.overdue(handle, now, self.start_seconds, self.hang_seconds, nodes.lives):
                self._lose(name, loss, events)
        return events

    def close(self) -> None:
        """Kills all replicas."""
        for handle in self.handles.values():
            self._kill(handle)
        self.handles.clear()

    # ---------------------------------------------------------------- coming up

    def _man(self, name: str, avoid: Sequence[str] = ()) -> None:
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
            elif avoid:
                elsewhere: dict[str, Any] = {NODE_LABEL: NotIn(*avoid)}
                options["scheduling_strategy"] = NodeLabelSchedulingStrategy(hard={}, soft=elsewhere)
            remote: Any = ray.remote(**options)(ReplicaActor)
            actor = remote.remote(name, rank, self.settings, self.entry)
            call = actor.sit.remote() if size > 1 else actor.start.remote()
            first = actor.where.options(concurrency_group="control").remote()
            handle.members.append(Process(actor, call, first))

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
            events.append(ReplicaReady(name, answers[0], _host(answers[0])))

    def _meet_again(self, name: str) -> bool:
        """A gang that did not come together (a port taken by another, a member that met strangers) tries again in the
        same places, with new processes and another port: the old ones may still be waiting for each other."""
        handle = self.handles[name]
        hopeless = handle.broken is not None or not handle.reachable
        if handle.stage != "join" or handle.attempt >= RENDEZVOUS_ATTEMPTS or hopeless:
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
            process.call, process.poll = (
                other if other is not reference else None for other in (process.call, process.poll)
            )
            self._refused(name, error, events)
            return
        except ActorUnschedulableError as error:
            self._lose(name, Loss("start", str(error)), events)
            return
        except ActorUnavailableError as error:
            loss = silence.unreachable(handle, rank, first_line(error), time.monotonic())
            if loss is not None:
                self._lose(name, loss, events)
            elif reference is process.call:
                process.call = None
            else:
                self._poll(process)
            return
        except RayError as error:
            process.node = process.node or nodes.of_actor(error)
            self._lose(name, silence.died(handle, rank, first_line(error), nodes.lives), events)
            return
        if process.unreachable is not None:
            said = handle.says(rank, "what it said while it was unreachable is lost")
            self._lose(name, Loss("node", said), events)
            return
        if reference is process.call:
            self._answered(name, rank, answer, events)
            return
        process.heard = time.monotonic()
        self._poll(process)
        if isinstance(answer, str):
            process.node = answer
        elif answer is not None:
            handle.pulse = answer
            events.extend(answer.events)
            handle.longest_silence = max(handle.longest_silence, answer.silent)
            if answer.broken:
                silence.breaks(handle, Loss("gang", answer.broken), time.monotonic())

    def _refused(self, name: str, error: RayTaskError, events: list[Event]) -> None:
        """A member could not do what it was told. In a gang that may be because another is gone, which shows soon."""
        handle = self.handles[name]
        if isinstance(error.cause, GangError) and self._meet_again(name):
            return
        cause = "refused" if isinstance(error.cause, UserError) else "start"
        loss = Loss(cause, _cause(error), getattr(error.cause, "node", ""))
        if cause == "refused" or len(handle.members) == 1:
            self._lose(name, loss, events)
            return
        silence.breaks(handle, loss, time.monotonic())

    @staticmethod
    def _poll(process: Process) -> None:
        process.poll = process.actor.poll.options(concurrency_group="control").remote(POLL_SECONDS)

    def _waits(self, name: str, free: str) -> Pulse:
        """What a replica waits for that has no place yet, in the place of a stage."""
        size = self.formation.kind(name).layout.size
        gpus, cpus = size * self.formation.gpus, size * self.formation.cpus
        wanted = f"{gpus:g} GPU{'' if gpus == 1 else 's'}" if gpus else f"{cpus:g} CPU{'' if cpus == 1 else 's'}"
        where = " on one node" if size > 1 and self.formation.kind(name).strict else ""
        return Pulse((), f"waiting for {wanted}{where} ({free})", 0, 0, 0.0, 0.0, "")

    def _free(self) -> str:
        """What the cluster has free now, asked every few seconds."""
        now = time.monotonic()
        if not self._awaited or now - self._asked_at > AWAITED_SECONDS:
            resource = "GPU" if self.formation.gpus else "CPU"
            free, there = ray.available_resources().get(resource, 0), ray.cluster_resources().get(resource, 0)
            self._awaited, self._asked_at = f"{free:g} of {there:g} free", now
        return self._awaited

    def _lose(self, name: str, loss: Loss, events: list[Event]) -> None:
        self._kill(self.handles.pop(name))
        events.append(ReplicaLost(name, loss.cause, loss.error, loss.node))

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


def _host(node: str) -> str:
    return next((str(entry["NodeManagerHostname"]) for entry in ray.nodes() if entry["NodeID"] == node), node)


def _cause(error: RayTaskError) -> str:
    cause = error.cause
    if isinstance(cause, (UserError, StartFailed)):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"


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
        raise ConfigError(f"no Ray cluster at {wanted!r}: {first_line(error)}") from error
    log(f"joined the Ray cluster at {wanted}" if wanted else "started a local Ray cluster")


def disconnect() -> None:
    with contextlib.suppress(RayError, GetTimeoutError):
        ray.shutdown()
