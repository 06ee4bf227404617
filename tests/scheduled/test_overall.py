"""`status`, `verify`, `retry` and `gc`, given the folder of a schedule, speak of all its runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.scheduled.schedule import Scheduled, write
from vidgen.cli import main
from vidgen.fleet.driver import Outcome
from vidgen.scheduled import overall
from vidgen.store import epochs
from vidgen.store.objects import Objects


@pytest.fixture
def job(tmp_path: Path) -> Scheduled:
    """Run 0: two rows done. Run 1: one done, one failed. Run 2: planned, not driven."""
    made = Scheduled(tmp_path)
    made.dataset["columns"] = {"prompt": "prompt", "params.fail": "fail"}
    write(made.source / "1.parquet", {"a": "a ball", "b": "a box"}, fail=["", ""])
    made.tick()
    write(made.source / "2.parquet", {"c": "a cat", "d": "a dog"}, fail=["", "item"])
    made.tick(run={"max_attempts": 1})
    write(made.source / "3.parquet", {"e": "an eel"}, fail=[""])
    made.tick(drive=lambda source, overrides: Outcome(5, "", {}, 0.0))
    return made


def told(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, Any]:
    code = main([*command, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_status_of_a_schedule_sums_its_runs_and_says_which_are_unfinished_and_how_to_retry_what_failed(
    job: Scheduled, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(job.output)
    code, found = told(capsys, "status", output)
    assert code == 0
    assert [found[name] for name in ("total", "done", "failed", "pending", "tick")] == [5, 3, 1, 1, "stopped"]
    assert [(run["total"], run["finished"]) for run in found["runs"]] == [(2, True), (2, True), (1, False)]
    assert main(["status", output]) == 0
    text = capsys.readouterr().out
    assert "a schedule of 3 runs" in text and "3/5 done, 1 pending, 1 failed" in text
    assert "run 2: 0/1 done" in text and "run 0" not in text
    assert f"vidgen retry {output}/runs/1 --where" in text and "/runs/0" not in text


def test_a_watch_of_a_schedule_lasts_as_long_as_its_tick(job: Scheduled) -> None:
    lease = epochs.acquire(Objects(str(job.output)), lease=60)

    def sleep(seconds: float) -> None:
        lease.release()
        job.tick()

    first, last = overall.watch(str(job.output), sleep=sleep)
    assert (first.tick, first.pending) == ("running", 1)
    assert (last.tick, last.pending, last.done) == ("stopped", 0, 4)


def test_verify_of_a_schedule_proves_each_run_and_the_manifest_over_all(
    job: Scheduled, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(job.output)
    code, found = told(capsys, "verify", output)
    assert code == 1 and len(found["problems"]) == 2
    assert all(text.startswith("run 2: ") for text in found["problems"])
    job.tick()
    code, found = told(capsys, "verify", output)
    assert code == 0
    assert [found[name] for name in ("items", "done", "not_done", "checked")] == [5, 4, 1, 4]
    video = job.output / pq.read_table(job.output / "manifest/run-000000-000000.parquet").column("video")[0].as_py()
    whole = video.read_bytes()
    video.write_bytes(whole[:-1] + b"?")
    (problem,) = told(capsys, "verify", output)[1]["problems"]
    assert problem.startswith("run 0: item ")
    video.write_bytes(whole)
    part = job.output / "manifest/run-000001-000000.parquet"
    part.write_bytes(part.read_bytes() + b"?")
    code, found = told(capsys, "verify", output)
    assert code == 1 and found["problems"] == [f"manifest/{part.name} is not {overall.view.OTHERWISE}"]
    (job.output / "manifest/_VIEW.json").unlink()
    job.tick()
    assert told(capsys, "verify", output)[0] == 0


def test_retry_of_a_schedule_names_the_runs_with_failed_items_and_opens_none(
    job: Scheduled, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retry", str(job.output)]) == 2
    said = capsys.readouterr().err
    assert f"vidgen retry {job.output}/runs/1   (1 items)" in said and "runs/2" not in said
    assert not list(job.output.glob("runs/*/generations/*"))


def test_gc_of_a_schedule_sweeps_every_run_and_spares_what_their_commits_name(
    job: Scheduled, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = sorted(job.output.glob("runs/*/data/*/*.mp4"))
    orphans = [path.with_name(path.name.replace("-", "-0000")) for path in (videos[0], videos[-1])]
    for orphan in orphans:
        orphan.write_bytes(b"made beside another")
        os.utime(orphan, (time.time() - 90_000, time.time() - 90_000))
    code, found = told(capsys, "gc", str(job.output), "--dry-run")
    assert (code, found["removed"], found["seen"]) == (0, 2, 5) and all(path.exists() for path in orphans)
    assert told(capsys, "gc", str(job.output))[1]["removed"] == 2
    assert sorted(job.output.glob("runs/*/data/*/*.mp4")) == videos


def test_gc_of_the_young_waits_for_no_tick_and_no_driver(job: Scheduled, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gc", str(job.output), "--older-than", "1h"]
    for place in ("", "/runs/1"):
        lease = epochs.acquire(Objects(f"{job.output}{place}"), lease=60)
        assert main(command) == 75
        lease.release()
    capsys.readouterr()
    assert main(command) == 0


@pytest.mark.parametrize(
    "command", [["generate"], ["report"], ["retry"], ["gc"], ["status"], ["pack", "--format", "folder"]]
)
def test_a_folder_without_a_run_or_a_schedule_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    name, *rest = command
    place = [str(tmp_path / "pack")] if name == "pack" else []
    assert main([name, str(tmp_path / "empty"), *place, *rest]) == 2
    assert "no plan/0/PLAN.json, so there is no run here" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


def test_a_command_of_one_run_says_that_a_schedule_has_several(
    job: Scheduled, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("report", "generate"):
        assert main([command, str(job.output)]) == 2
        assert f"a schedule: name one of its runs, {job.output}/runs/0" in capsys.readouterr().err


def test_a_plan_in_the_making_is_no_run_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Objects(str(tmp_path)).put("plan/0/part-000000.parquet", b"the first of several")
    assert main(["status", str(tmp_path)]) == 2
    assert "there is no run here yet: a plan is being made" in capsys.readouterr().err
