"""Imports the package once and forks a process for each command and each replica of the crash tests.

`python -m tests.crash.server SOCKET`: each connection is one command line of vidgen, run in a fork that leaves by
os._exit. It is told the pid, then the exit status, then that its replicas are gone too. The server has one thread, so
that what is forked is whole.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from tests.crash import fleet

for name in ("cluster", "nodes", "exporter"):  # the files that import ray
    sys.modules[f"vidgen.fleet.{name}"] = fleet
    setattr(importlib.import_module("vidgen.fleet"), name, fleet)

from jobs import scheduled  # noqa: E402
from vidgen import cli, faults  # noqa: E402
from vidgen import config as configuration  # noqa: E402
from vidgen.fleet import driver as driving  # noqa: E402
from vidgen.fleet import replica as working  # noqa: E402
from vidgen.models.testcard import backend  # noqa: E402
from vidgen.store import epochs  # noqa: E402
from vidgen.store.objects import Objects  # noqa: E402

WARM = (
    *("vidgen.fleet.run", "vidgen.plan.build", "vidgen.report.gallery"),
    *("vidgen.report.planned", "vidgen.report.repair", "vidgen.report.status", "vidgen.report.verify"),
    *("fsspec.implementations.memory", "numpy.random", "pandas", "pyarrow.dataset"),
)
"""What a command would otherwise import by itself, each time."""


def main(path: str) -> None:
    for name in WARM:
        importlib.import_module(name)
    Image.init()
    configuration.from_dict({"dataset": {"path": "p"}, "output": {"path": "o"}}, "warm", [])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote; only a machine does
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)  # the tests are gone
        line, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _family(line)
        line.close()


def _family(line: socket.socket) -> None:
    """One command and the replicas that it asks for."""
    request = json.loads(line.makefile().readline())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = os.fork()
    if command == 0:
        line.close()
        ours.close()
        _command(request, theirs)
    theirs.close()
    _say(line, pid=command, family=os.getpid())
    replicas = []
    while name := ours.recv(256).decode():
        mine, its = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for inherited in (line, ours, mine):
                inherited.close()
            _replica(name, request, its)
        its.close()
        socket.send_fds(ours, [b"!"], [mine.fileno()])
        mine.close()
        replicas.append(pid)
    _, code = os.waitpid(command, 0)
    _say(line, code=os.waitstatus_to_exitcode(code))
    for pid in replicas:
        os.waitpid(pid, 0)
    spent = os.times()
    _say(line, gone=True, cpu=spent.children_user + spent.children_system)
    os._exit(0)


def _say(line: socket.socket, **what: Any) -> None:
    with contextlib.suppress(OSError):
        line.sendall(json.dumps(what).encode() + b"\n")


def _command(request: dict[str, Any], control: socket.socket) -> None:
    _dress(request, "driver")
    fleet.control = control
    driving.BEAT_SECONDS, driving.LEDGER_RECORDS, driving.POLL_SECONDS = request["beat"], 2, 0.01
    epochs.BEAT_SECONDS = request["beat"]
    if request["host"]:
        _elsewhere(request["host"], request["lease"])
    code = 70
    try:
        command, *rest = request["arguments"]
        code = scheduled.main(rest) if command == "scheduled" else cli.main([command, *rest])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _replica(name: str, request: dict[str, Any], line: socket.socket) -> None:
    _dress(request, "replica")
    working.GATHER_SECONDS = 0.002
    encode = working.Worker._encode
    if request["tint"]:
        backend.BARS = tuple((red ^ 1, green, blue) for red, green, blue in backend.BARS)

    def noted(self: working.Worker, work: Any, *rest: Any) -> Any:
        _note(request["trail"], "made", request["life"], work.item.item_id, work.generation)
        return encode(self, work, *rest)

    working.Worker._encode = noted  # type: ignore[method-assign]
    fleet.replica(name, Connection(line.detach()), request["linger"])


def _dress(request: dict[str, Any], role: str) -> None:
    """What sets this process apart: its output, its faults, and where it says which points it passed."""
    log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[faults.VARIABLE] = request["faults"].get(role, "")
    if request["watch"]:
        os.environ[faults.VARIABLE] = os.environ[faults.VARIABLE] or "none:1:kill"
        _watch(request, role)


def _watch(request: dict[str, Any], role: str) -> None:
    """Each point is noted as it is reached, and again once it is passed."""
    act = faults._count

    def noted(point: str, armed: str) -> None:
        _note(request["trail"], "point", request["life"], role, point)
        act(point, armed)
        _note(request["trail"], "passed", request["life"], role, point)

    faults._count = noted


def _elsewhere(host: str, lease: float) -> None:
    """As on another machine, whose processes nobody here can see, and with a lease that a test can wait for."""
    acquire = epochs.acquire
    epochs._boot_id = lambda: host

    def hasty(objects: Objects, **options: Any) -> epochs.Lease:
        return acquire(objects, **{**options, "lease": lease}, sleep=lambda seconds: time.sleep(seconds / 20))

    epochs.acquire = hasty


def _note(path: str, *words: Any) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, ("\t".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
