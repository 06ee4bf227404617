"""Real runs on real Ray, in processes of their own, killed and raced as life does it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fleet.inline import write_prompts
from vidgen import manifest
from vidgen.report.verify import verify
from vidgen.store import commits, epochs
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


class Job:
    """A `vidgen generate` of its own process group; log in `<output>.log`."""

    def __init__(self, dataset: str, output: Path, *overrides: str) -> None:
        self.output = output
        config = output.with_suffix(".yaml")
        if not config.exists():
            config.write_text(
                f"name: test\nmodel: {{family: testcard}}\ndataset: {{path: {dataset}}}\n"
                f"sampling: {{num_frames: 5, num_inference_steps: 4}}\noutput: {{path: {output}}}\n"
            )
        self.command = [sys.executable, "-m", "vidgen.cli", "generate", str(config), "--no-report", *overrides]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        with open(self.output.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.output.parent
            )

    def finish(self, most: float = 300) -> int:
        return self.start().wait(most)

    def log(self) -> str:
        return self.output.with_suffix(".log").read_text()


def committed(output: Path) -> int:
    return sum(1 for _ in commits.list_commits(Objects(str(output)), 0))


def until(condition: Callable[[], bool], most: float = 240) -> None:
    end = time.monotonic() + most
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def replica_processes(driver: int) -> list[psutil.Process]:
    """Replica actors of the Ray cluster that this driver started."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if "ReplicaActor" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_nothing_and_repeat_little(tmp_path: Path) -> None:
    """Half of the moments are counted from the start of the command (planning, cluster and replicas coming up), half
    from its first commit, so that a slow machine is not only killed while it starts."""
    items, chance = 120, random.Random(20)
    prompts = write_prompts(tmp_path / "p.parquet", items)
    job = Job(prompts, tmp_path / "out", "sampling.params.step_seconds=0.2", "engine.batch_tokens=1")
    settled = []
    for kill in range(10):
        before, process = committed(job.output), job.start()
        if kill % 2:
            until(lambda before=before: committed(job.output) > before)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 3.0) if kill % 2 else chance.uniform(0.0, 12.0))
        assert process.poll() is None, job.log()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        settled.append(committed(job.output))
    assert job.finish() == 0, job.log()
    assert verify(str(job.output)).ok
    print(f"\n10 kills; items committed after each: {settled}, then {items} of {items}")
    assert settled == sorted(settled) and settled[-1] > 0
    videos = sum(1 for _ in Objects(str(job.output)).list("data"))
    in_hand = 2 * (1 + 1 + 2)  # replicas x (running + prefetched + written behind)
    assert items <= videos <= items + 10 * in_hand, "more was repeated than the replicas could have had in hand"


def test_two_drivers_at_once_plan_once_and_one_of_them_drives(tmp_path: Path) -> None:
    job = Job(write_prompts(tmp_path / "p.parquet", 12), tmp_path / "out", "sampling.params.step_seconds=0.1")
    codes = sorted(process.wait(240) for process in (job.start(), job.start()))
    assert codes == [0, 75], job.log()
    assert verify(str(job.output), strict=True).ok


def test_a_replica_killed_in_the_middle_of_an_item_is_replaced_and_the_item_made(tmp_path: Path) -> None:
    job = Job(write_prompts(tmp_path / "p.parquet", 16), tmp_path / "out", "sampling.params.step_seconds=0.3")
    process = job.start()
    until(lambda: committed(job.output) >= 2)
    victim = replica_processes(process.pid)[0]
    victim.kill()
    assert process.wait(240) == 0, job.log()
    assert verify(str(job.output)).ok


def test_a_row_that_kills_its_replica_is_given_up_and_the_others_are_made(tmp_path: Path) -> None:
    fails = ["crash" if i == 2 else "" for i in range(8)]
    dataset = write_prompts(tmp_path / "p.parquet", 8, fails=fails)
    job = Job(dataset, tmp_path / "out", "dataset.columns={prompt: prompt, params.fail: fails}", "run.max_attempts=1")
    assert job.finish() == 3, job.log()
    verdict = verify(str(job.output))
    assert verdict.ok and (verdict.done, verdict.not_done) == (7, 1), verdict.problems


def test_a_row_that_hangs_its_replica_is_given_up_and_the_others_are_made(tmp_path: Path) -> None:
    fails = ["hang" if i == 1 else "" for i in range(6)]
    dataset = write_prompts(tmp_path / "p.parquet", 6, fails=fails)
    columns = "dataset.columns={prompt: prompt, params.fail: fails}"
    job = Job(dataset, tmp_path / "out", columns, "run.max_attempts=1", "run.hang_seconds=4")
    assert job.finish() == 3, job.log()
    assert "no sign of life" in job.log()
    verdict = verify(str(job.output))
    assert verdict.ok and (verdict.done, verdict.not_done) == (5, 1), verdict.problems


def test_a_starter_beside_a_live_driver_leaves_at_once_and_beside_a_dead_one_takes_over(tmp_path: Path) -> None:
    job = Job(write_prompts(tmp_path / "p.parquet", 20), tmp_path / "out", "sampling.params.step_seconds=0.2")
    first = job.start()
    objects = Objects(str(job.output))
    until(lambda: epochs.current(objects) == 0 and bool(epochs.read_beat(objects, 0)))
    assert job.finish(60) == 75
    assert "drives this run" in job.log()
    until(lambda: committed(job.output) >= 1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert job.finish() == 0, job.log()
    assert epochs.current(objects) == 1
    assert verify(str(job.output)).ok


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order_and_the_next_start_finishes_it(tmp_path: Path, number: int) -> None:
    job = Job(write_prompts(tmp_path / "p.parquet", 20), tmp_path / "out", "sampling.params.step_seconds=0.3")
    process = job.start()
    until(lambda: committed(job.output) >= 1)
    os.kill(process.pid, number)
    assert process.wait(60) == 130, job.log()
    objects = Objects(str(job.output))
    assert epochs.read_beat(objects, 0)["released"]
    assert list(objects.list("ledger"))
    assert job.finish() == 0, job.log()
    assert verify(str(job.output)).ok


def test_an_output_that_replicas_cannot_see_is_refused_with_the_reason(tmp_path: Path) -> None:
    job = Job(write_prompts(tmp_path / "p.parquet", 2), tmp_path / "out", "output.path=memory://nobody-else-sees-this")
    assert job.finish() == 2
    assert "does not see what the driver wrote" in job.log()


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A Ray head of its own ports; yields the environment to talk to it. Another one if Ray gives up, as on a machine
    where other clusters of other tests take ports at the same moment."""
    for _ in range(4):
        dashboard, agent, client = (_free_port() for _ in range(3))
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        environment.pop("RAY_ADDRESS", None)
        folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short name: Ray's sockets lie below it
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--port=0",
            "--num-cpus=2",
        ]
        command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--ray-client-server-port={client}", "--disable-usage-stats", f"--temp-dir={folder}"]
        with open(folder / "head.log", "wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        until(lambda: process.poll() is not None or _answers(dashboard))  # noqa: B023
        if process.poll() is None:
            break
    else:
        raise AssertionError((folder / "head.log").read_text())
    yield environment
    process.terminate()
    try:
        process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def submit(folder: Path, environment: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of the main job in `folder`; again while the head is still coming up."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(folder), "--"]
    command += [sys.executable, "jobs/generate.py", "job.yaml", *overrides]
    for _ in range(60):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done


@pytest.mark.slow
def test_ray_job_submit_runs_the_main_job_from_its_working_directory(tmp_path: Path, head: dict[str, str]) -> None:
    """As `--working-dir .` in a checkout does it: what runs is the copy, whether vidgen is installed there or not."""
    folder, output = tmp_path / "project", tmp_path / "out"
    folder.mkdir()
    for part in ("jobs", "vidgen"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    version = folder / "vidgen" / "__init__.py"
    version.write_text(version.read_text().replace('VERSION = "', 'VERSION = "copy of '))
    write_prompts(folder / "prompts.parquet", 6)
    (folder / "job.yaml").write_text(
        "name: submitted\nmodel: {family: testcard}\ndataset: {path: prompts.parquet}\n"
        "sampling: {num_frames: 5, num_inference_steps: 2}\noutput: {path: outputs/here}\n"
    )
    relative = submit(folder, head)
    assert relative.returncode != 0
    assert "is relative" in relative.stdout + relative.stderr
    done = submit(folder, head, f"output.path={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(str(output)).ok
    (table,) = manifest.read(Objects(str(output)))
    assert all(made.startswith("copy of ") for made in table.column("vidgen_version").to_pylist())
