"""Who drives a run: epochs, beats, leases, and the request to stop.

epochs/{n}.json is create-only; its holder rewrites epochs/{n}.beat while it lives. Two drivers can waste GPU time but
never work: everything durable is create-only. Refuses to know what the driver does.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vidgen import faults
from vidgen.errors import InfrastructureError
from vidgen.store.objects import Objects, new_token

BEAT_SECONDS = 15.0
_EPOCH = re.compile(r"epochs/(?P<number>\d+)\.json")


class Held(Exception):
    """Another driver holds the run, or took it. Exit code 75."""


@dataclass(frozen=True, slots=True)
class Process:
    """Where a driver runs: enough to tell, on the same host, whether it is still alive."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_time: str

    @classmethod
    def current(cls) -> Process:
        return cls(socket.gethostname(), _boot_id(), _pid_namespace(), os.getpid(), start_time(os.getpid()))

    def same_host(self, other: Process) -> bool:
        """True where a process id of one means the same process to the other."""
        known = bool(self.boot_id and self.pid_namespace)
        return known and (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)

    def alive(self) -> bool:
        """Whether the process still runs; only meaningful on its own host."""
        return bool(self.start_time) and start_time(self.pid) == self.start_time


class Lease:
    """The epoch this driver holds. Made by `acquire`."""

    def __init__(
        self,
        objects: Objects,
        epoch: int,
        token: str,
        unclean: bool,
        before: dict[str, Any],
        *,
        seconds: float = 60.0,
        begun: tuple[float, float] | None = None,
    ) -> None:
        self.objects, self.epoch, self.token, self.seconds = objects, epoch, token, seconds
        self.unclean = unclean
        """True if the driver before us did not end cleanly."""
        self.before = before
        """Its last beat: suspects (items in flight on its host) and GPU-seconds spent, ours among them once we beat."""
        self._heard = begun or _clocks()

    @property
    def last_beat(self) -> float:
        """When the last beat was begun, on the monotonic clock."""
        return self._heard[0]

    def beat(self, **facts: Any) -> None:
        """Rewrites the beat; `facts` are in-flight items by host, GPU-seconds spent, counts."""
        self.awake()
        begun = _clocks()
        body = {"epoch": self.epoch, "token": self.token, "at": begun[1], **facts}
        with faults.around("release" if facts.get("released") else "beat"):
            self.objects.put(f"epochs/{self.epoch}.beat", json.dumps(body).encode())
        if "gpu_seconds" in facts:
            self.before = {**self.before, "gpu_seconds": facts["gpu_seconds"]}
        self._heard = begun  # not the end: this process may have stood still on the way

    def inherited(self) -> dict[str, Any]:
        """What the driver before us left and nobody has dealt with yet: GPU-seconds spent, items that were in flight
        on its host when it died (none after a clean end), the epoch in which one of them was a suspect and alone. Who
        holds the lease without driving passes it on."""
        known = {"gpu_seconds": 0.0, "in_flight": [], "lone_suspect": None}
        return {key: self.before.get(key, none) for key, none in known.items()}

    def release(self, **facts: Any) -> None:
        """The last beat of a clean end: a successor need not wait."""
        self.beat(released=True, **facts)

    def check(self) -> None:
        """Raises Held if a later epoch exists. Called immediately before each durable act of the driver's own."""
        if self.objects.exists(f"epochs/{self.epoch + 1}.json"):
            raise Held(f"epoch {self.epoch + 1} took over this run from epoch {self.epoch}")

    def awake(self) -> None:
        """Raises Held if a later epoch exists and a lease has passed since our last beat: a process that stood still
        so long asks before it does anything else. Costs nothing otherwise."""
        if any(now - heard > self.seconds for now, heard in zip(_clocks(), self._heard, strict=True)):
            self.check()

    def stop_requested(self) -> bool:
        return self.objects.exists(f"epochs/{self.epoch}.stop")


@contextmanager
def beating(lease: Lease, **facts: Any) -> Iterator[None]:
    """While a holder does something long that is not driving (it reads a run's state, plans, writes a manifest), a
    thread beats for it, with these facts or else with what it inherited. A holder that drives beats itself, so that a
    beat says that it gets on."""
    said, over = facts or lease.inherited(), threading.Event()

    def beats() -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                lease.beat(**said)
            except (InfrastructureError, OSError):
                continue  # the next one tries again
            except Held:
                return  # the holder learns it before its next durable act

    thread = threading.Thread(target=beats, name="beats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def current(objects: Objects) -> int | None:
    """The highest epoch, or None before the first."""
    found = (_EPOCH.fullmatch(entry.path) for entry in objects.list("epochs"))
    return max((int(one["number"]) for one in found if one is not None), default=None)


def read_beat(objects: Objects, epoch: int) -> dict[str, Any]:
    """The last beat of an epoch; {} if it never beat."""
    try:
        beat = json.loads(objects.read(f"epochs/{epoch}.beat"))
    except (FileNotFoundError, ValueError):
        return {}
    return beat if isinstance(beat, dict) else {}


def _last_beat(objects: Objects, epoch: int) -> dict[str, Any]:
    """The last beat of an epoch as it is now, or, where it never beat, of the one before: a driver that was killed so
    early had begun nothing, and what was left to it is left to the next."""
    beats = (read_beat(objects, number) for number in range(epoch, -1, -1))
    return next((beat for beat in beats if beat), {})


def request_stop(objects: Objects) -> int:
    """Asks the driver of the highest epoch to stop gracefully; returns that epoch, raises Held if nobody drives."""
    epoch = current(objects)
    if epoch is None or read_beat(objects, epoch).get("released"):
        raise Held(f"{objects.url}: no driver is running there, so there is none to stop")
    with faults.around("stop"):
        objects.put(f"epochs/{epoch}.stop", json.dumps({"at": time.time()}).encode())
    return epoch


def acquire(
    objects: Objects,
    *,
    lease: float,
    takeover: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Lease:
    """Becomes the driver, or raises Held.

    A holder on the same host is judged by its process at once; one elsewhere by whether its beat changes within `lease`
    seconds. `takeover` supersedes a live holder. In a `single_writer` store only provable death or takeover will do.
    """
    me = Process.current()
    while True:
        begun = _clocks()
        epoch = current(objects)
        before: dict[str, Any] = {}
        unclean = False
        if epoch is not None:
            before = read_beat(objects, epoch)
            if not before.get("released"):
                if not takeover:
                    holder = _holder(objects, epoch)
                    _wait_for_silence(objects, epoch, holder, me, lease, sleep, clock)
                before = _last_beat(objects, epoch)
            unclean = not before.get("released", False)
        token = new_token()
        number = 0 if epoch is None else epoch + 1
        body = {**asdict(me), "token": token, "started_at": time.time()}
        with faults.around("epoch"):
            ours = objects.create(f"epochs/{number}.json", json.dumps(body).encode(), token)
        if ours:
            held = Lease(objects, number, token, unclean, before, seconds=lease, begun=begun)
            held.beat(**held.inherited())
            return held
        if not takeover:
            raise Held(f"another driver took epoch {number} at the same moment")


def _wait_for_silence(
    objects: Objects,
    epoch: int,
    holder: Process | None,
    me: Process,
    lease: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    if holder is not None and holder.same_host(me):
        if holder.alive():
            raise Held(f"process {holder.pid} on this host drives this run (epoch {epoch})")
        return
    where = f"{holder.host}, process {holder.pid}" if holder else "an unknown host"
    if objects.single_writer:
        raise Held(f"a driver on {where} did not end cleanly (epoch {epoch}); --takeover asserts that it is gone")
    first, start = read_beat(objects, epoch), clock()
    while clock() - start < lease:
        sleep(min(1.0, lease))
        beat = read_beat(objects, epoch)
        if beat.get("released"):
            return
        if beat != first or current(objects) != epoch:
            raise Held(f"a driver on {where} holds this run (epoch {epoch}, beating)")


def _holder(objects: Objects, epoch: int) -> Process | None:
    try:
        body = json.loads(objects.read(f"epochs/{epoch}.json"))
        return Process(**{key: body[key] for key in ("host", "boot_id", "pid_namespace", "pid", "start_time")})
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _clocks() -> tuple[float, float]:
    """Monotonic and wall clock: the first stands still while a virtual machine is suspended, the second may be set."""
    return time.monotonic(), time.time()


def start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot, "" if there is none (or it is a zombie) or /proc is absent."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return ""
    return "" if after_name[0] in ("Z", "X") else after_name[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
