"""The same points on a real Ray cluster: one head for all, a driver in a process of its own, replicas as actors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.history import ROOT, Job, Server
from tests.crash.test_points import watched
from tests.fleet.inline import write_prompts
from tests.fleet.test_ray import until
from tests.store.servers import free_port
from vidgen import faults
from vidgen.report import repair
from vidgen.report.verify import verify
from vidgen.store import commits
from vidgen.store.objects import Objects

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a driver's job gives to its actors, as `ray job submit` says it."""
SECONDS = 300
ROWS = 30
FAIL = (3, 9, 15)
"""Rows that always fail: the driver's own commits and evidence."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head: its address, and the environment to talk to it."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    for name in ("RAY_ADDRESS", SUBMITTED):
        environment.pop(name, None)
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--temp-dir={tmp_path_factory.mktemp('ray')}"]
    log = tmp_path_factory.mktemp("log") / "head.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text())
    assert process.poll() is None, log.read_text()
    yield f"127.0.0.1:{port}", environment
    process.terminate()
    try:
        process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Run:
    """One run on that head, started as often as it is killed."""

    def __init__(self, folder: Path, head: tuple[str, dict[str, str]]) -> None:
        self.address, self.environment = head
        self.folder, self.output = folder, folder / "out"
        fails = ["item" if row in FAIL else "" for row in range(ROWS)]
        dataset = write_prompts(folder / "p.parquet", ROWS, fails=fails)
        self.config = folder / "job.yaml"
        self.config.write_text(
            f"name: crash\nmodel: {{family: testcard}}\noutput: {{path: {self.output}, format: png}}\n"
            f"dataset: {{path: {dataset}, columns: {{prompt: prompt, params.fail: fails}}}}\n"
            "sampling: {height: 16, width: 16, num_frames: 2, num_inference_steps: 1, params: {step_seconds: 0.05}}\n"
            "run: {max_attempts: 2}\nengine: {batch_tokens: 1}\n"
        )
        self.objects = Objects(str(self.output))

    def generate(self, driver: str = "", replica: str = "") -> int:
        environment = {**self.environment, faults.VARIABLE: driver}
        if replica:
            environment[SUBMITTED] = json.dumps({"runtime_env": {"env_vars": {faults.VARIABLE: replica}}})
        command = [sys.executable, "-m", "vidgen.cli", "generate", str(self.config), "--no-report"]
        with open(self.folder / "log", "ab") as log:
            return subprocess.run(
                [*command, "--address", self.address],
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                timeout=SECONDS,
                check=False,
            ).returncode

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def fired(self, *points: str) -> list[str]:
        return [point for point in points if self.mark(point).exists()]

    def mark(self, point: str) -> Path:
        return self.folder / f"fired {point}"

    def armed(self, point: str) -> str:
        return f"{point}:1:kill:{self.mark(point)}"

    def check(self) -> None:
        """Whole, nothing beside it; kills alone may have used up a row's attempts, which `retry` gives back."""
        failed = {record.ordinal for record in self.records() if record.status != "done"}
        if failed != set(FAIL):
            repair.retry(str(self.output))
            assert self.generate() == 3, self.log()
            failed = {record.ordinal for record in self.records() if record.status != "done"}
        assert failed == set(FAIL), self.log()
        repair.collect(str(self.output), older_than=0)
        verdict = verify(str(self.output), strict=True)
        assert verdict.ok and (verdict.done, verdict.not_done) == (ROWS - len(FAIL), len(FAIL)), verdict.problems

    def records(self) -> list[commits.Record]:
        """The commit that counts of each item."""
        highest = commits.read_generations(self.objects)
        numbers = (0, *commits.list_generations(self.objects))
        found = [
            commits.read_commit(self.objects, number, item)
            for number in numbers
            for item in commits.list_commits(self.objects, number)
            if highest.get(item, 0) == number
        ]
        return [record for record in found if record is not None]


@pytest.fixture
def passed(server: Server, tmp_path: Path) -> list[tuple[str, str]]:
    """(role, point) that a run passes from its plan to its end."""
    folder = tmp_path / "watched"
    return sorted(watched(Job(server, folder / "job"), folder / "kept", steps=1))


def test_replicas_die_once_at_each_point_and_the_run_ends_whole(
    head: tuple[str, dict[str, str]], passed: list[tuple[str, str]], tmp_path: Path, hits: Counter[str]
) -> None:
    run = Run(tmp_path, head)
    points = [point for role, point in passed if role == "replica"]
    assert run.generate(replica=",".join(run.armed(point) for point in points)) == 3, run.log()
    assert run.fired(*points) == points, run.log()
    hits.update(f"replica: {point}" for point in points)
    run.check()


def test_drivers_die_once_at_each_point_one_after_another_and_the_run_ends_whole(
    head: tuple[str, dict[str, str]], passed: list[tuple[str, str]], tmp_path: Path, hits: Counter[str]
) -> None:
    """Each start is killed at the next point; the last ones are those of the run's end."""
    run = Run(tmp_path, head)
    known = [point for role, point in passed if role == "driver" and not point.startswith(("report ", "poster"))]
    points = sorted(known, key=lambda point: (_place(point.split(".")[0]), point.endswith(".after")))
    for point in points:
        code = run.generate(driver=run.armed(point))
        assert code == -9, f"{point}: exit {code}\n{run.log()}"
        hits[f"driver: {point}"] += 1
    assert run.generate() == 3, run.log()
    run.check()


def _place(name: str) -> int:
    """Where in a run an act comes; what is not named here comes in between."""
    first = [
        "probe",
        "plan part",
        "plan",
        "estimate",
        "epoch",
        "read-back probe",
        "evidence",
        "commit",
        "beat",
        "progress",
    ]
    last = ["manifest part", "success", "release"]
    return first.index(name) if name in first else 100 + last.index(name) if name in last else len(first)
