"""The command lines of `cluster/`, run for real: a Ray head that has nothing to give, workers beside it, a token.

What a cluster has and a test has not is replaced: the GPU model by test cards, buckets by folders, Slurm by `srun` and
`scontrol` of three lines each.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster.deployment import CLUSTER, IMAGE, ROOT, Entry, entries
from tests.cluster.test_image import lay_out
from tests.fleet.inline import write_prompts
from vidgen.report.verify import verify
from vidgen.store import commits, epochs
from vidgen.store.objects import Objects

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SLOW = ["sampling.params.step_seconds=0.5", "engine.batch_tokens=1"]
"""Two seconds an item, one at a time: there is something to interrupt."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ENTRIES = {entry.name: entry for entry in entries()}
INTERRUPTED = 130


def until(condition: Callable[[], bool], most: float = 120) -> None:
    end = time.monotonic() + most
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class RayNodes:
    """A head and workers on this machine, started as KubeRay starts them."""

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        token = secrets.token_hex(16)
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for name in ("RAY_ADDRESS", "PYTHONPATH"):
            self.environment.pop(name, None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, *options: str, drain: float = 0) -> subprocess.Popen[bytes]:
        """`ray start` in a shell that it replaces, as in a pod; returns the process that gets a pod's SIGTERM."""
        # The agent takes jobs in; its port is otherwise the same for every cluster of a machine.
        agent = f"--dashboard-agent-listen-port={free_port()}"
        command = " ".join([*RAY, "start", "--block", "--disable-usage-stats", agent, *options])
        environment = {**self.environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain)}
        with open(self.folder / f"node{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", "--", f"ulimit -n 4096; {command}"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def head(self) -> None:
        temporary = f"--temp-dir={self.folder}"
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
        self.start("--head", "--num-cpus=0", "--object-store-memory=100000000", temporary, *ports)
        until(lambda: self.run(*RAY, "job", "list", "--address", self.url).returncode == 0)

    def worker(self, drain: float = 0) -> subprocess.Popen[bytes]:
        """A node with one CPU, once it is part of the cluster; another one if Ray gives up, as an operator would."""
        for _ in range(4):
            address, log = f"--address=127.0.0.1:{self.port}", self.folder / f"node{len(self.processes)}.log"
            process = self.start(address, "--num-cpus=1", "--object-store-memory=100000000", drain=drain)
            until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text())  # noqa: B023
            if process.poll() is None:
                return process
        raise AssertionError(log.read_text())

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)

    def submit(self, *words: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit`; again while the head is still coming up."""
        hold = [] if wait else ["--no-wait"]
        for _ in range(30):
            done = self.run(*RAY, "job", "submit", "--address", self.url, *hold, "--", *words)
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        return done

    def close(self) -> None:
        for process in reversed(self.processes):
            for one in [process, *_descendants(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    one.kill()
            process.wait(30)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image has at /opt/vidgen."""
    return lay_out(tmp_path_factory.mktemp("image"))


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    started = RayNodes(tmp_path_factory.mktemp("ray"))
    try:
        started.head()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """One head and two workers, for tests that leave them as they are."""
    started = RayNodes(tmp_path_factory.mktemp("ray"))
    try:
        started.head()
        started.worker()
        started.worker()
        yield started
    finally:
        started.close()


def as_here(entry: Entry, image: Path, folder: Path, items: int = 4) -> tuple[list[str], Path]:
    """An entry's words with the test's places in them, and its output: everything else stays."""
    words, output = [], folder / "out"
    for word in entry.words:
        key, _, value = word.partition("=")
        if word == "python":
            word = sys.executable
        elif word.startswith(IMAGE) and "/configs/" in word:
            word = str(image / "configs" / "testcard.yaml")
        elif key == "dataset.path" and "://" in value:
            word = f"{key}={write_prompts(folder / 'prompts.parquet', items)}"
        elif key == "output.path":
            word = f"{key}={output}"
        word = word.replace(IMAGE, str(image)).replace("=/cache", f"={folder}/cache")
        words.append(word)
    return words, output


@pytest.mark.parametrize("name", ENTRIES)
def test_a_command_line_makes_every_video(name: str, cluster: RayNodes, image: Path, tmp_path: Path) -> None:
    words, output = as_here(ENTRIES[name], image, tmp_path)
    done = cluster.submit(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = output / "runs" / "0" if "scheduled.py" in words[1] else output
    verdict = verify(str(run))
    assert verdict.ok and verdict.items > 0, done.stdout + done.stderr
    assert cluster.environment["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_without_the_token_nothing_is_submitted(cluster: RayNodes) -> None:
    done = subprocess.run(
        [*RAY, "job", "submit", "--address", cluster.url, "--", "true"],
        env={**cluster.environment, "RAY_AUTH_TOKEN": "another"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0


def committed(output: Path) -> int:
    return sum(1 for _ in commits.list_commits(Objects(str(output)), 0)) if output.exists() else 0


def released(output: Path) -> bool:
    objects = Objects(str(output))
    epoch = epochs.current(objects)
    assert epoch is not None
    return bool(epochs.read_beat(objects, epoch).get("released"))


def test_before_a_head_goes_its_drivers_flush_and_the_job_counts_as_failed(
    cluster: RayNodes, image: Path, tmp_path: Path
) -> None:
    """FAILED, which a RayJob tries again, and not STOPPED, which it takes for the end; and the same command resumes."""
    words, output = as_here(ENTRIES["rayjob-RayJob"], image, tmp_path, items=24)
    submission = cluster.submit(*words, *SLOW, wait=False)
    assert submission.returncode == 0, submission.stderr
    until(lambda: committed(output) > 0)
    done = cluster.run(sys.executable, str(image / "cluster" / "stop_drivers.py"), cluster.url)
    assert done.returncode == 0 and "1 drivers asked to stop, 0 still there" in done.stdout, done.stdout + done.stderr
    assert released(output), "its successor need not wait for a lease"
    until(lambda: "FAILED" in cluster.run(*RAY, "job", "list", "--address", cluster.url).stdout)
    assert f"driver_exit_code={INTERRUPTED}" in cluster.run(*RAY, "job", "list", "--address", cluster.url).stdout
    assert not verify(str(output)).ok
    again = cluster.submit(*words, *SLOW)
    assert again.returncode == 0 and verify(str(output)).ok, again.stdout + again.stderr


def test_a_worker_pod_that_gets_sigterm_drains_and_the_job_loses_nothing(
    nodes: RayNodes, image: Path, tmp_path: Path
) -> None:
    """It is not gone at once: what it has in hand may be finished. It is gone within the time that its pod has."""
    words, output = as_here(ENTRIES["rayjob-RayJob"], image, tmp_path, items=24)
    leaving, drain = nodes.worker(drain=4), 4
    nodes.worker()
    assert nodes.submit(*words, *SLOW, wait=False).returncode == 0
    until(lambda: committed(output) > 0)
    began = time.monotonic()
    leaving.send_signal(signal.SIGTERM)
    leaving.wait(drain + 10)
    assert time.monotonic() - began > 1, "Ray killed its processes at once"
    until(lambda: verify(str(output)).ok)


SRUN = """#!/usr/bin/env bash
nodes=1
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
for ((i = 0; i < nodes; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
trap 'kill "${pids[@]}"; wait' TERM
wait
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >>"$CALLS"\n'


@dataclass
class Allocation:
    """Two nodes of a Slurm cluster, as far as the batch script sees them."""

    folder: Path

    def __post_init__(self) -> None:
        binaries = self.folder / "bin"
        binaries.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        self.calls = self.folder / "calls"
        self.number = 20000 + free_port() % 10000
        self.private = self.folder / "shared"
        self.private.mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": str(self.number),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_TMPDIR": str(self.folder),
            "VIDGEN_SHARED_DIR": str(self.private),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        command = ["bash", str(CLUSTER / "slurm" / "generate.sbatch"), str(ROOT / "configs" / "testcard.yaml"), *words]
        with open(self.folder / "job.log", "ab") as log:
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def left_over(self) -> list[psutil.Process]:
        """Processes of Ray that outlived their allocation."""
        mark = f"/tmp/ray-{self.number}"
        return [
            process for process in psutil.process_iter(["cmdline"]) if mark in " ".join(process.info["cmdline"] or ())
        ]


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    made = Allocation(tmp_path)
    try:
        yield made
    finally:
        for process in made.left_over():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(f"/tmp/ray-{made.number}", ignore_errors=True)


@pytest.mark.skipif(not shutil.which("vidgen", path=str(Path(sys.executable).parent)), reason="vidgen is not installed")
def test_a_slurm_job_is_put_back_when_its_time_is_up_and_resumes(allocation: Allocation, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [f"dataset.path={write_prompts(tmp_path / 'prompts.parquet', 16)}", f"output.path={output}"]
    words += SLOW
    job = allocation.start(*words)
    until(lambda: committed(output) > 0 or job.poll() is not None)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == INTERRUPTED, (tmp_path / "job.log").read_text()
    assert allocation.calls.read_text() == f"requeue {allocation.number}\n"
    assert 0 < committed(output) < 16 and released(output)
    assert not list(allocation.private.iterdir()), "the token is gone"
    until(lambda: not allocation.left_over(), 30)
    assert allocation.start(*words).wait(200) == 0, (tmp_path / "job.log").read_text()
    assert verify(str(output)).ok
    assert "2 replicas" in (tmp_path / "job.log").read_text(), "one on each node"
    assert allocation.calls.read_text().count("requeue") == 1
