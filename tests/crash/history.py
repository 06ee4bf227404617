"""A small job on a local disk, the commands that its history is made of, and what must be true after each.

The job: rows that become videos, one that always fails, one that is refused; then a wider plan. Every command runs in a
fork of `tests.crash.server`; it can be killed at any fault point, in the driver or in one of its replicas.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.crash.server_environment import environment
from tests.fleet.inline import write_prompts
from vidgen import manifest
from vidgen.report.verify import verify
from vidgen.store import commits
from vidgen.store.local import TEMPORARY
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
ROWS = ["one", "two", "bad", "", "five", "six"]
FIRST, WIDER = 5, 6
"""Rows of the first plan and of the extended one."""
SECONDS = 120.0
"""How long a command may take before the test gives up: it never should."""


class Server:
    """The process that forks commands."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "server.sock")
        self.log = folder / "server.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.server", self.path],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment(ROOT),
                cwd=ROOT,
            )
        end = time.monotonic() + SECONDS
        while not os.path.exists(self.path):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class Life:
    """One command, from its start to its end."""

    def __init__(self, server: Server, request: dict[str, Any]) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.settimeout(SECONDS)
        self._line.connect(server.path)
        self._line.sendall(json.dumps(request).encode() + b"\n")
        self._words = self._line.makefile()
        self.number: int = request["life"]
        born = self._hear()
        self.pid: int = born["pid"]
        self.family: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):  # it may be over already
            self.family = psutil.Process(born["family"])
        self.code: int | None = None

    def wait(self) -> int:
        """The exit code of the command; -9 if it was killed. Its replicas may still be there."""
        if self.code is None:
            self.code = int(self._hear()["code"])
        return self.code

    def gone(self) -> int:
        """The same, once its replicas are gone too."""
        code = self.wait()
        if not self._words.closed:
            self._hear()
            self._words.close()
            self._line.close()
        return code

    def still(self) -> list[int]:
        """Its processes that stand still: the command's, or a replica's."""
        children = self.family.children() if self.family is not None else []
        return [child.pid for child in children if child.status() == psutil.STATUS_STOPPED]

    def end(self) -> None:
        """Whatever has happened, nothing of it stays."""
        with suppress(psutil.NoSuchProcess):
            for child in self.family.children() if self.family is not None else []:
                child.kill()

    def _hear(self) -> dict[str, Any]:
        line = self._words.readline()
        assert line, "the server's fork died"
        heard: dict[str, Any] = json.loads(line)
        return heard


@dataclass(frozen=True, slots=True)
class Fault:
    """Where a life ends: at the count-th time that its driver (or one of its replicas) reaches a point."""

    role: str
    point: str
    count: int = 1
    action: str = "kill"


@dataclass
class Job:
    """One run in a folder of its own, and the story of its lives."""

    server: Server
    folder: Path
    beat: float = 0.2
    more: int = 0
    """Rows that the dataset has besides, before the others."""
    lives: list[Life] = field(default_factory=list)
    superseded: int = 0
    since: int = 0
    """The first life of the story that is told now; earlier ones belong to another."""
    _armed: dict[int, tuple[Fault, ...]] = field(default_factory=dict)
    _committed: dict[int, set[tuple[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = [f"more {number}" for number in range(self.more)] + ROWS
        fails = ["item" if row == "bad" else "" for row in self.rows]
        dataset = write_prompts(self.folder / "p.parquet", self.rows, fails=fails)
        self.output = self.folder / "out"
        self.config = self.folder / "job.yaml"
        self.config.write_text(
            f"name: crash\nmodel: {{family: testcard}}\noutput: {{path: {self.output}, format: png}}\n"
            f"dataset: {{path: {dataset}, limit: {self.more + FIRST},"
            " columns: {prompt: prompt, params.fail: fails}}\n"
            "sampling: {height: 16, width: 16, num_frames: 2, num_inference_steps: 1}\n"
            f"parallel: {{replicas: 2}}\nrun: {{max_attempts: 2}}\n"
        )
        self.objects = Objects(str(self.output))

    # ---------------------------------------------------------------- lives

    def start(self, *arguments: str, faults: Sequence[Fault] = (), **options: Any) -> Life:
        """A command. `linger`: its replicas end what they have in hand when it dies. `watch`: it notes the points that
        it passes. `host`: as on another machine of that name, with a lease of `lease` seconds. `tint`: its replicas
        make other pixels, as other GPUs would."""
        number = len(self.lives)
        self._committed[number], self._armed[number] = self.commits(), tuple(faults)
        armed: dict[str, list[str]] = {}
        for index, fault in enumerate(faults):
            text = f"{fault.point}:{fault.count}:{fault.action}:{self._mark(number, index)}"
            armed.setdefault(fault.role, []).append(text)
        request = {
            "arguments": [*arguments],
            "life": number,
            "faults": {role: ",".join(texts) for role, texts in armed.items()},
            "beat": self.beat,
            "linger": False,
            "watch": False,
            "host": "",
            "lease": 60.0,
            "tint": False,
            **options,
            "log": str(self.folder / "log"),
            "trail": str(self.folder / "trail"),
        }
        life = Life(self.server, request)
        self.lives.append(life)
        return life

    def generate(self, *arguments: str, **options: Any) -> Life:
        """From the configuration, and once the plan is wider from the output alone."""
        source = self.output if self.extended() else self.config
        return self.start("generate", str(source), *arguments, **options)

    def retry(self, **options: Any) -> Life:
        return self.start("retry", str(self.output), **options)

    def extend(self, **options: Any) -> Life:
        return self.start("plan", str(self.config), "--extend", f"dataset.limit={self.more + WIDER}", **options)

    def gc(self, **options: Any) -> Life:
        return self.start("gc", str(self.output), "--older-than", "0s", **options)

    def fired(self) -> list[Fault]:
        """What has happened of what the lives were armed with."""
        return [
            fault
            for number in range(self.since, len(self.lives))
            for index, fault in enumerate(self._armed[number])
            if self._mark(number, index).exists()
        ]

    def _mark(self, life: int, index: int) -> Path:
        return self.folder / f"fired-{life}-{index}"

    # ---------------------------------------------------------------- what is there

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def extended(self) -> bool:
        return (self.output / "plan/1/PLAN.json").exists()

    def commits(self) -> set[tuple[str, int]]:
        """(item, generation) of every commit."""
        generations = (0, *commits.list_generations(self.objects))
        return {(item, number) for number in generations for item in commits.list_commits(self.objects, number)}

    def trail(self, kind: str) -> Iterator[list[str]]:
        path = self.folder / "trail"
        for line in path.read_text().splitlines() if path.exists() else ():
            first, life, *rest = line.split("\t")
            if first == kind and int(life) >= self.since:
                yield [life, *rest]

    def made(self, life: Life) -> int:
        """Items that this life has made and that are committed."""
        settled = {item for item, _ in self.commits()}
        return len({item for number, item, _ in self.trail("made") if int(number) == life.number and item in settled})

    def temporaries(self) -> list[Path]:
        return [*self.output.rglob(f"{TEMPORARY}*")]

    def snapshot(self, folder: Path) -> None:
        """Keeps the output as it is now."""
        self._copy(self.output, folder)

    def restore(self, folder: Path) -> None:
        """The output is again as it was, and a new story begins."""
        self._copy(folder, self.output)
        self.since = len(self.lives)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, target)

    # ---------------------------------------------------------------- to the end, and what must then be true

    def finish(self) -> None:
        """What a person does: the same command again; `retry` where kills alone used up a row's attempts; then `gc`."""
        self._ends(self.generate("--no-report"), 3)
        if any(state != self.wanted()[prompt] for prompt, state in self.states().items()):
            self._ends(self.retry(), 0)
            self._ends(self.generate("--no-report"), 3)
        for life in self.lives:
            life.gone()
        for path in self.temporaries():
            os.utime(path, (0, 0))
        self._ends(self.gc(), 0)
        assert not self.temporaries()

    def _ends(self, life: Life, wanted: int) -> None:
        assert life.gone() == wanted, f"exit {life.code}, not {wanted}\n{self.log()}"

    def states(self) -> dict[str, str]:
        rows = [row for table in manifest.read(self.objects) for row in table.to_pylist()]
        assert len(rows) == len({row["prompt"] for row in rows}), "a row stands in the manifest twice"
        return {row["prompt"]: row["status"] for row in rows}

    def wanted(self) -> dict[str, str]:
        """What becomes of each row."""
        own = {"bad": "failed", "": "rejected"}
        return {row: own.get(row, "done") for row in self.rows[: self.more + (WIDER if self.extended() else FIRST)]}

    def check_end(self) -> None:
        """manifest == plan, every video there and whole, nothing beside them; only the bad row failed."""
        verdict = verify(str(self.output), strict=True)
        assert verdict.ok, f"{verdict.problems}\n{self.log()}"
        assert self.states() == self.wanted(), self.log()
        self.check_work()

    def check_work(self) -> None:
        """Bounded: what was committed before a life began is not made by it; nothing is made more often than once and
        once more for each fault that fired and each driver that another one took the run from."""
        made: Counter[tuple[str, int]] = Counter()
        for life, item, generation in self.trail("made"):
            pair = (item, int(generation))
            made[pair] += 1
            assert pair not in self._committed[int(life)], f"{pair} was committed, and made again by life {life}"
        most = 1 + len(self.fired()) + self.superseded
        assert all(times <= most for times in made.values()), f"made {made}, faults {self.fired()}"


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must happen."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def ended(life: Life) -> Iterator[Life]:
    try:
        yield life
    finally:
        life.end()
