"""`python jobs/scheduled.py`: arguments, exit codes, what it prints, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.scheduled.schedule import Runs, values, write
from vidgen import config as configuration
from vidgen.fleet.driver import Outcome
from vidgen.store import epochs
from vidgen.store.objects import Objects

ROOT = Path(__file__).parent.parent
JOB = ROOT / "jobs" / "scheduled.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scheduled_job", JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def handler() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path) -> str:
    write(tmp_path / "source/1.parquet", {"a": "a ball", "b": "a cube"})
    rooms: dict[str, dict[str, Any]] = {"dataset": {"id_column": "id"}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "source", tmp_path / "out", rooms)))
    return str(path)


def ends(code: int) -> Any:
    return lambda source, overrides: Outcome(code, "test", {}, 0.0)


def test_a_tick_says_what_it_did(job: ModuleType, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([config], drive=Runs()) == 0
    assert "run 0: 2 items; 2 rows new, 0 seen before, 0 gone" in capsys.readouterr().out
    assert job.main([config, "--json", "run.max_attempts=2"], drive=Runs()) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["exit"], found["rows"]["same"], found["counts"]["done"]) == (None, 0, 2, 2)


def test_a_ticks_log_can_be_json_lines_and_its_result_is_not_among_them(
    job: ModuleType, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main([config, "--log", "json", "--json"], drive=Runs()) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["run"] == 0
    lines = [json.loads(text) for text in said.err.splitlines()]
    assert lines and all({"time", "level", "message", "item", "replica", "attempt"} <= set(line) for line in lines)
    assert job.main([config, "--log", "json", "sampling.heigth=3"], drive=Runs()) == 2
    (line,) = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert line["level"] == "error" and "sampling.heigth" in line["message"]


@pytest.mark.parametrize("code", [0, 3, 4, 5, 130])
def test_a_tick_ends_with_the_code_of_its_runs(job: ModuleType, config: str, code: int) -> None:
    assert job.main([config], drive=ends(code)) == code
    assert job.main([config, "--ok-exit", f"{code},2"], drive=ends(code)) == 0


def test_mistakes_end_with_2_and_one_readable_line(
    job: ModuleType, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main([config, "sampling.heigth=3"], drive=Runs()) == 2
    assert "sampling.heigth: unknown key" in capsys.readouterr().err
    assert job.main([config, "--json", "dataset.path=nowhere"], drive=Runs()) == 2
    assert json.loads(capsys.readouterr().out)["exit"] == 2
    for wrong in (["--every", "often"], ["--every", "0.1s"], ["--on-change", "maybe"], ["--what"]):
        with pytest.raises(SystemExit) as raised:
            job.main([config, *wrong], drive=Runs())
        assert raised.value.code == 2
    assert job.main([config, "stray"], drive=Runs()) == 2


def test_another_ticks_turn_ends_with_75(job: ModuleType, config: str, tmp_path: Path) -> None:
    lease = epochs.acquire(Objects(str(tmp_path / "out")), lease=60)
    assert job.main([config], drive=Runs()) == 75
    assert job.main([config, "--ok-exit=75"], drive=Runs()) == 0
    assert job.main([config, "--overlap", "join"], drive=Runs()) == 0
    lease.release()


def test_the_policies_reach_the_tick(job: ModuleType, config: str, tmp_path: Path) -> None:
    assert job.main([config], drive=Runs()) == 0
    write(tmp_path / "source/1.parquet", {"a": "a cone", "b": "a cube"})
    assert job.main([config, "--on-change", "error"], drive=Runs()) == 2
    assert job.main([config, "--on-change", "regenerate"], drive=Runs()) == 0
    assert job.main([config, "--on-spec-change", "regenerate", "sampling.seed=4"], drive=Runs()) == 0
    assert sorted(path.name for path in (tmp_path / "out/runs").iterdir()) == ["0", "1", "2"]


LONG = """
import importlib.util, sys
from tests.scheduled.schedule import Runs
spec = importlib.util.spec_from_file_location("scheduled_job", sys.argv[1])
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)
sys.exit(job.main(sys.argv[2:], drive=Runs()))
"""


def test_a_long_lived_process_takes_up_new_files_survives_a_broken_one_and_ends_in_order_on_sigterm(
    config: str, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", LONG, str(JOB), config, "--every", "1s", "--json"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = (json.loads(line) for line in process.stdout)
    assert next(lines)["items"] == 2
    write(tmp_path / "source/2.parquet", {"c": "a cat"})
    made = next(found for found in lines if found["run"] is not None)
    assert (made["run"], made["items"]) == (1, 1)
    (tmp_path / "source/3.parquet").write_bytes(b"half a file")
    assert process.stderr is not None
    said = ""
    while "failure 1 in a row" not in said:
        said += process.stderr.readline()
        assert process.poll() is None
    assert "3.parquet: not a Parquet file" in said
    time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=10) == 130
    assert epochs.read_beat(root := Objects(str(tmp_path / "out")), epochs.current(root) or 0)["released"]


def test_the_nightly_configuration_is_valid() -> None:
    found = configuration.load(str(ROOT / "configs/nightly.yaml"))
    assert found.run.deadline is not None and found.run.max_gpu_hours is not None
