"""Replicas as Ray actors. The only file that imports ray.

It starts actors, hands them work and turns what becomes of them into events. Refuses to decide anything: who gets what,
what a death counts and whether a replacement is wanted is the dispatcher's business. Ray never retries for us.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayError, RayTaskError

from vidgen.errors import ConfigError, UserError
from vidgen.fleet.events import Event, ReplicaLost, ReplicaReady, Work
from vidgen.fleet.replica import Pulse, Settings, Worker

POLL_SECONDS = 1.0
"""How long a replica may hold a poll open when it has nothing to say."""
FEWEST_HANG_SECONDS = 300.0
LOCAL_OBJECT_STORE_BYTES = 128 * 2**20
"""Frames and tensors never cross Ray, so a local cluster need not take a third of the memory for its object store."""
HANG_STEPS = 10
"""Without run.hang_seconds: a replica hangs that shows nothing for max(300 s, 10 x its longest silence so far)."""


class ReplicaActor:
    """A Worker in a process of its own. The control calls run in their own concurrency group, so they are answered
    while the model loads or generates."""

    def __init__(self, name: str, settings: Settings) -> None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is first imported: spinning starves neighbours
        if settings.model.threads:
            os.environ["OMP_NUM_THREADS"] = str(settings.model.threads)
        context = ray.get_runtime_context()
        self.worker = Worker(name, context.get_node_id(), settings)

    def start(self) -> str:
        return self.worker.start()

    def submit(self, batch: int, works: tuple[Work, ...]) -> None:
        self.worker.submit(batch, works)

    def recall(self, abandon: bool) -> None:
        self.worker.recall(abandon)

    def poll(self, timeout: float) -> Pulse:
        return self.worker.poll(timeout)


@dataclass(slots=True)
class Handle:
    actor: Any
    started: Any
    poll: Any = None
    node: str = ""
    pulse: Pulse | None = None
    heard: float = 0.0
    longest_silence: float = 0.0


@dataclass(frozen=True, slots=True)
class Resources:
    """What one replica takes, and how many there are."""

    replicas: int
    cpus: float
    gpus: float


class RayFleet:
    """The actors of one run. `poll` is the only call that waits."""

    def __init__(self, settings: Settings, resources: Resources, hang_seconds: float | None) -> None:
        self.settings, self.resources, self.hang_seconds = settings, resources, hang_seconds
        self.handles: dict[str, Handle] = {}

    def start(self, name: str) -> None:
        """Starts (or starts again) the replica of that name."""
        options: dict[str, Any] = {
            "num_cpus": self.resources.cpus,
            "num_gpus": self.resources.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"control": 4},
        }
        remote: Any = ray.remote(**options)(ReplicaActor)
        actor = remote.remote(name, self.settings)
        self.handles[name] = Handle(actor, actor.start.remote(), heard=time.monotonic())

    def send(self, name: str, batch: int, works: tuple[Work, ...]) -> None:
        handle = self.handles.get(name)
        if handle is None:
            return  # it was lost a moment ago; the event that says so is on its way and brings the batch back
        handle.actor.submit.options(concurrency_group="control").remote(batch, works)

    def recall(self, name: str, abandon: bool = False) -> None:
        handle = self.handles.get(name)
        if handle is not None:
            handle.actor.recall.options(concurrency_group="control").remote(abandon)

    def pulses(self) -> dict[str, Pulse | None]:
        """The last sign of life of each replica; None while it starts."""
        return {name: handle.pulse for name, handle in self.handles.items()}

    def poll(self, timeout: float) -> list[Event]:
        """Waits up to `timeout` seconds for any replica to say something; returns what was said, and who was lost."""
        waiting = {(handle.poll or handle.started): name for name, handle in self.handles.items()}
        if not waiting:
            time.sleep(timeout)
            return []
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        events: list[Event] = []
        for reference in done:
            self._hear(waiting[reference], reference, events)
        for name in list(self.handles):
            self._notice_silence(name, events)
        return events

    def close(self) -> None:
        """Kills all replicas."""
        for handle in self.handles.values():
            with contextlib.suppress(RayError):
                ray.kill(handle.actor)
        self.handles.clear()

    def _hear(self, name: str, reference: Any, events: list[Event]) -> None:
        handle = self.handles[name]
        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            refused = isinstance(error.cause, UserError)
            self._lose(name, "refused" if refused else "start", _cause(error), events)
            return
        except ActorUnschedulableError as error:
            self._lose(name, "start", str(error), events)
            return
        except RayError as error:
            started = bool(handle.node)
            cause = ("crash" if self._node_lives(handle.node) else "node") if started else "start"
            self._lose(name, cause, _first_line(error), events)
            return
        handle.heard = time.monotonic()
        if handle.poll is None:
            handle.node = answer
            events.append(ReplicaReady(name, answer))
        else:
            handle.pulse = answer
            events.extend(answer.events)
            handle.longest_silence = max(handle.longest_silence, answer.silent)
        handle.poll = handle.actor.poll.options(concurrency_group="control").remote(POLL_SECONDS)

    def _notice_silence(self, name: str, events: list[Event]) -> None:
        handle = self.handles[name]
        if not handle.node:
            return
        unheard = time.monotonic() - handle.heard
        silent = max(unheard, handle.pulse.silent if handle.pulse else 0.0)
        allowed = self.hang_seconds or max(FEWEST_HANG_SECONDS, HANG_STEPS * handle.longest_silence)
        if silent > allowed:
            self._lose(name, "hang", f"no sign of life for {allowed:.0f} s", events)

    def _lose(self, name: str, cause: str, error: str, events: list[Event]) -> None:
        handle = self.handles.pop(name)
        with contextlib.suppress(RayError):
            ray.kill(handle.actor)
        events.append(ReplicaLost(name, cause, error))

    @staticmethod
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


def cluster_resources() -> tuple[int, int, int]:
    """(CPUs, GPUs, bytes of memory) of the cluster as it is now."""
    total = ray.cluster_resources()
    return int(total.get("CPU", 1)), int(total.get("GPU", 0)), int(total.get("memory", 0))


def disconnect() -> None:
    with contextlib.suppress(RayError, GetTimeoutError):
        ray.shutdown()
