"""Four processes that stand for GPUs: started once a session, they form whatever gang a test asks for, over gloo.

A test names a function of a module of this folder; each rank of the gang calls it with its `Gang` (None for a gang of
one) and the test's arguments, and the results come back in the order of the ranks.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from vidgen.parallel.layout import Layout

RANKS = 4
PATIENCE = 60.0
"""Seconds that a test waits for a rank: a gang that hangs is a failure, not a hung session."""


class Failed(AssertionError):
    """A rank's exception, with its traceback."""


class Workers:
    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # What every worker needs is imported once and shared.
        context.set_forkserver_preload(["vidgen.engine", "transformers", "vidgen.text.t5", "vidgen.parallel.gang"])
        self._pipes: list[Connection] = []
        self._processes = []
        self._met: tuple[Layout, int] | None = None
        for _ in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, layout: Layout, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(gang, *args)` returns on each rank."""
        results = self.outcomes(layout, function, *args)
        for rank, (fine, result) in enumerate(results):
            if not fine:
                raise Failed(f"rank {rank}: {result}")
        return [result for _, result in results]

    def outcomes(self, layout: Layout, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """(True, result) or (False, traceback) of each rank."""
        if self._met is None or self._met[0] != layout:
            self._met = layout, free_port()
        port = self._met[1]
        for rank, pipe in enumerate(self._pipes[: layout.size]):
            pipe.send((rank, layout, port, function.__module__, function.__qualname__, args))
        results = []
        for rank, pipe in enumerate(self._pipes[: layout.size]):
            if not pipe.poll(PATIENCE):
                self.close()
                raise Failed(f"rank {rank} of {layout} has not answered within {PATIENCE:g} s")
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(pipe: Connection) -> None:
    """A worker's life: joins the gang that is asked for, unless it is in it, and calls the function."""
    import torch

    from vidgen.parallel.gang import Gang, join

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    gang: Gang | None = None
    met = 0
    while True:
        try:
            rank, layout, port, module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if port != met:
                if gang is not None:
                    gang.close()
                gang, met = None, port
                if layout.size > 1:
                    gang = join(rank, layout, "127.0.0.1", port, device="cpu", timeout=30)
            result = getattr(importlib.import_module(module), name)(gang, *args)
            pipe.send((True, result))
        except Exception:
            pipe.send((False, traceback.format_exc()))
