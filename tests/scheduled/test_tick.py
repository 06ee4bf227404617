"""A tick makes what is new in the source, once, whatever happened to the source, the job or the tick before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.scheduled.schedule import Runs, Scheduled, write
from vidgen.errors import ConfigError, PlanError
from vidgen.family import spec as family_spec
from vidgen.fleet.driver import Outcome
from vidgen.plan import files
from vidgen.plan.build import build, changed_dataset
from vidgen.plan.files import read_plan
from vidgen.report.repair import retry
from vidgen.scheduled import difference
from vidgen.scheduled import tick as ticks
from vidgen.scheduled.tick import Schedule
from vidgen.store import epochs
from vidgen.store.objects import Objects

A = {"a": "a red ball", "b": "a blue cube"}


@pytest.fixture
def job(tmp_path: Path) -> Scheduled:
    return Scheduled(tmp_path)


@pytest.fixture
def plain(tmp_path: Path) -> Scheduled:
    """Without an id column."""
    return Scheduled(tmp_path, ids=False)


# ---------------------------------------------------------------- what is new


def test_new_files_become_a_run_of_their_own_and_old_ones_are_not_made_again(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    first = job.tick()
    assert (first.exit, first.run, first.items, first.rows.new) == (0, 0, 2, 2)
    write(job.source / "2.parquet", {"c": "a cat"})
    second = job.tick()
    assert (second.exit, second.run, second.items, second.rows.same) == (0, 1, 1, 2)
    assert job.made(1) == [("c", "a cat", 0)] and len(job.made()) == 3
    assert second.counts["done"] == 3
    job.prove()


def test_new_row_groups_in_a_rewritten_file_are_told_from_its_old_rows(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    with pq.ParquetWriter(job.source / "1.parquet", pa.schema([("id", pa.string()), ("prompt", pa.string())])) as file:
        for rows in ({"c": "a cat"}, A, {"d": "a dog"}):  # before and after the old ones
            file.write_table(pa.table({"id": list(rows), "prompt": list(rows.values())}))
    assert job.tick().items == 2
    assert [row for row, *_ in job.made(1)] == ["c", "d"]
    job.prove()


def test_a_late_partition_before_the_known_ones_is_made_and_nothing_else(plain: Scheduled) -> None:
    write(plain.source / "day=02/x.parquet", ["one", "two"])
    plain.tick()
    write(plain.source / "day=01/x.parquet", ["late", "one"])  # a second "one": the source has it twice now
    report = plain.tick()
    assert (report.items, report.rows.gone) == (2, 0)
    assert sorted(prompt for _, prompt, _ in plain.made()) == ["late", "one", "one", "two"]
    assert plain.tick().run is None
    assert {row["day"] for row in plain.rows()} == {"01", "02"}
    plain.prove()


def test_a_glob_and_one_file_are_sources_too(job: Scheduled, tmp_path: Path) -> None:
    write(job.source / "x-1.parquet", A)
    write(job.source / "y-1.parquet", {"z": "not this one"})
    job.dataset["path"] = str(job.source / "x-*.parquet")
    assert job.tick().items == 2
    write(job.source / "x-2.parquet", {"c": "a cat"})
    assert job.tick().items == 1
    job.dataset["path"] = str(job.source / "x-2.parquet")
    narrowed = job.tick()
    assert (narrowed.run, narrowed.rows.gone) == (None, 2)


def test_a_source_and_an_output_may_be_any_store(job: Scheduled, tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    write(tmp_path / "x.parquet", A)
    fs.pipe_file("/prompts-tick/1.parquet", (tmp_path / "x.parquet").read_bytes())
    rooms: dict[str, Any] = {
        "dataset": {"path": "memory://prompts-tick"},
        "output": {"path": f"memory://scheduled-{os.getpid()}-{time.time_ns()}"},
    }
    assert job.tick(**rooms).items == 2
    assert job.tick(**rooms).run is None


def test_an_empty_tick_makes_no_run_and_ends_with_0(job: Scheduled) -> None:
    waiting = job.tick()
    assert (waiting.exit, waiting.run) == (0, None) and any("no files" in note for note in waiting.notes)
    write(job.source / "1.parquet", A)
    job.tick()
    written = sorted(path for path in (job.output / "runs").rglob("*"))
    again = job.tick()
    assert (again.exit, again.run, again.rows.same, again.driven) == (0, None, 2, [])
    assert sorted(path for path in (job.output / "runs").rglob("*")) == written
    assert job.tick(dataset={"where": "id = 'nobody'"}).run is None


def test_a_path_that_names_nothing_is_an_error_and_not_an_empty_tick(job: Scheduled) -> None:
    with pytest.raises(PlanError, match="names no file"):
        job.tick(dataset={"path": str(job.source / "elsewhere")})
    (job.source / "x.parquet").write_bytes(b"half a file")
    with pytest.raises(PlanError, match="truncated or damaged"):
        job.tick()


def test_more_samples_a_row_are_made_beside_the_old_ones(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    report = job.tick(dataset={"samples_per_row": 3})
    assert (report.items, report.rows.more, report.rows.new) == (4, 2, 0)
    assert [(row, sample) for row, _, sample in job.made()] == [(r, s) for r in "ab" for s in range(3)]
    assert job.tick(dataset={"samples_per_row": 2}).run is None
    job.prove()


def test_deleted_rows_keep_their_videos_and_are_told(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    write(job.source / "1.parquet", {"b": A["b"]})
    report = job.tick()
    assert (report.exit, report.run, report.rows.gone) == (0, None, 1)
    assert any("no longer in the source" in note for note in report.notes)
    assert len(job.made()) == 2
    (job.source / "1.parquet").unlink()
    assert job.tick().exit == 0
    job.prove()


# ---------------------------------------------------------------- what changed


def test_a_corrected_row_is_left_or_made_again_or_an_error(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    write(job.source / "1.parquet", {**A, "a": "a green ball"})
    left = job.tick()
    assert (left.run, left.rows.changed, left.rows.same) == (None, 1, 1)
    with pytest.raises(PlanError, match=r"1 rows say something else.*\n.*'a' \(.*1.parquet, row 0\)"):
        job.tick(change="error")
    assert not (job.output / "runs/1/plan/0/PLAN.json").exists()
    again = job.tick(change="regenerate")
    assert (again.items, job.made(1)) == (1, [("a", "a green ball", 0)])
    assert [(r["row_id"], r["superseded_by"]) for r in job.rows(0)] == [("a", 1), ("b", None)]
    for policy in ("skip", "regenerate", "error"):
        assert job.tick(change=policy).run is None
    job.prove()


def test_a_row_without_an_id_that_is_corrected_is_another_row(plain: Scheduled) -> None:
    write(plain.source / "1.parquet", ["a red ball", "a cube"])
    plain.tick()
    write(plain.source / "1.parquet", ["a green ball", "a cube"])
    report = plain.tick(change="error")
    assert (report.items, report.rows.changed, report.rows.gone) == (1, 0, 1)


def test_a_row_delivered_twice_is_one_row_and_two_meanings_of_an_id_are_not_guessed_at(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    write(job.source / "2.parquet", {**A, "c": "a cat"})  # a full export, beside the one before
    assert job.tick().items == 1 and len(job.made()) == 3
    write(job.source / "3.parquet", {"a": "a green ball"})
    conflict = job.tick(change="regenerate")
    assert (conflict.items, conflict.rejected) == (0, 1)
    assert "stands in more than one row" in job.rows(conflict.run)[0]["error"]
    assert job.tick(change="regenerate").run is None
    job.prove()


def test_what_cannot_be_made_is_recorded_once_and_made_when_it_is_mended(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    write(job.source / "2.parquet", {"c": "a cat", "d": ""})
    broken = job.tick()
    assert (broken.items, broken.rejected) == (1, 1)
    assert job.tick().run is None
    write(job.source / "3.parquet", {"e": " "})
    only = job.tick()
    assert (only.exit, only.items, only.rejected, only.counts["rejected"]) == (0, 0, 1, 2)
    write(job.source / "2.parquet", {"c": "a cat", "d": "a dog"})
    assert job.tick(change="error").items == 1
    assert ("d", "a dog", 0) in job.made()
    job.prove()


def test_too_many_rejected_rows_freeze_nothing(job: Scheduled) -> None:
    write(job.source / "1.parquet", {**A, "x": ""})
    with pytest.raises(PlanError, match="max_rejected allows 0"):
        job.tick(dataset={"max_rejected": 0})
    job.tick()
    write(job.source / "2.parquet", {"y": ""})
    with pytest.raises(PlanError, match="max_rejected allows 0"):
        job.tick(dataset={"max_rejected": 0})
    assert not (job.output / "runs/1/plan/0/PLAN.json").exists()


@pytest.mark.parametrize(
    "rooms",
    [
        {"sampling": {"height": 32, "width": 32}},
        {"sampling": {"seed": 5}},
        {"sweep": {"over": {"fps": [4, 8]}}},
        {"output": {"crf": 30}},
        {"dataset": {"columns": {"prompt": "prompt", "negative_prompt": "prompt"}}},
    ],
)
def test_another_configuration_makes_only_new_rows_unless_asked(job: Scheduled, rooms: dict[str, Any]) -> None:
    variants = len(rooms.get("sweep", {}).get("over", {}).get("fps", [0]))
    write(job.source / "1.parquet", A)
    job.tick()
    same = job.tick(change="error", **rooms)
    assert (same.run, same.rows.respec, same.rows.changed) == (None, 2, 0)
    assert any(note.startswith("since run 0") for note in same.notes)
    write(job.source / "2.parquet", {"c": "a cat"})
    assert job.tick(**rooms).items == variants
    again = job.tick(spec="regenerate", **rooms)
    assert (again.items, again.rows.respec) == (2 * variants, 2)
    assert {r["superseded_by"] for r in job.rows(0)} == {again.run} and not any(
        r["superseded_by"] for r in job.rows(1) + job.rows(2)
    )
    assert job.tick(spec="regenerate", **rooms).run is None


def test_a_default_written_out_is_no_change(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    assert job.tick(sampling={"fps": 8.0}).run is None
    assert job.tick(run={"max_attempts": 9}, spec="regenerate").run is None


def test_another_checkpoint_makes_nothing_again_unless_asked(job: Scheduled, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace as changed

    from vidgen.plan import model

    write(job.source / "1.parquet", A)
    job.tick()
    resolve = model.resolve
    monkeypatch.setattr(model, "resolve", lambda config: changed(resolve(config), checkpoint_hash="another" * 4))
    same = job.tick()
    assert (same.run, same.rows.respec) == (None, 2) and any("the checkpoint" in note for note in same.notes)
    planned: list[int] = []

    def drive(source: str, overrides: Any) -> Outcome:
        planned.append(len(read_plan(Objects(source))[0].parts))
        return Outcome(5, "not here", {}, 0.0)

    assert job.tick(spec="regenerate", drive=drive).items == 2 and planned == [1]


def test_another_revision_of_the_family_makes_nothing_again_unless_asked(
    job: Scheduled, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    job.runs.interrupt_at = 1
    write(job.source / "2.parquet", {str(n): f"number {n}" for n in range(30)})
    assert job.tick(sampling={"params": {"step_seconds": 0.05}}).exit == 130
    job.runs.interrupt_at = None
    spec = family_spec("testcard")
    monkeypatch.setattr(spec, "REVISION", spec.REVISION + 1)
    with pytest.raises(PlanError, match="run 1 has not finished and was planned by vidgen"):
        job.tick()
    again = job.tick(spec="regenerate")
    assert (again.exit, again.items, job.runs.order[-1]) == (0, 32, 2)
    assert job.tick().exit == 0  # run 1 is left as it is: its rows were made again
    current = [r for r in job.rows() if r["status"] == "done" and r["superseded_by"] is None]
    assert len(current) == 32 and {r["run"] for r in current} == {2}


def test_ids_of_another_kind_are_refused(job: Scheduled) -> None:
    write(job.source / "1.parquet", A, seed=[1, 2])
    job.tick()
    with pytest.raises(ConfigError, match=r"dataset\.id_column: run 0 has 'id', now None"):
        job.tick(dataset={"id_column": None})
    assert job.tick(dataset={"id_column": None}, spec="regenerate").items == 2


def test_without_an_id_column_other_fields_are_other_ids_and_refused(plain: Scheduled) -> None:
    write(plain.source / "1.parquet", ["one"], own=[4])
    plain.tick()
    with pytest.raises(ConfigError, match=r"dataset\.columns: run 0 maps prompt, now prompt, seed"):
        plain.tick(dataset={"columns": {"prompt": "prompt", "seed": "own"}})


# ---------------------------------------------------------------- unfinished ticks


def test_a_tick_that_was_interrupted_is_finished_first_then_the_new_rows(job: Scheduled) -> None:
    write(job.source / "1.parquet", {str(n): f"number {n}" for n in range(12)})
    half = Runs(interrupt_at=3)
    assert job.tick(drive=half, sampling={"params": {"step_seconds": 0.02}}).exit == 130
    write(job.source / "2.parquet", {"new": "a cat"})
    report = job.tick()
    assert (report.exit, report.run, job.runs.order) == (0, 1, [0, 1])
    assert len(job.made()) == 13
    job.prove()


KILLED = """
import sys
from pathlib import Path
from tests.scheduled.schedule import Scheduled
job = Scheduled(Path(sys.argv[1]))
job.tick(sampling={"params": {"step_seconds": 0.05}})
"""


def test_a_killed_tick_loses_nothing_and_nothing_is_done_twice(job: Scheduled, tmp_path: Path) -> None:
    write(job.source / "1.parquet", {str(n): f"number {n}" for n in range(25)})
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    commits = job.output / "runs/0/commits"
    while process.poll() is None and len(list(commits.rglob("*.json"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in commits.rglob("*.json")}
    assert 3 <= len(before) < 25
    write(job.source / "2.parquet", {"new": "a cat"})
    assert job.tick().exit == 0
    after = {path.name: path.stat().st_mtime_ns for path in commits.rglob("*.json")}
    assert before.items() <= after.items() and len(job.made()) == 26
    job.prove()


def test_a_tick_that_died_before_its_plan_was_frozen_is_as_if_it_never_was(
    job: Scheduled, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(job.source / "1.parquet", A)
    with monkeypatch.context() as patch:
        patch.setattr(files, "freeze", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.tick()
    assert list((job.output / "runs/0/plan/0").glob("part-*"))
    assert job.tick().items == 2
    job.prove()


def test_what_was_planned_under_another_configuration_is_finished_under_that(job: Scheduled) -> None:
    write(job.source / "1.parquet", {str(n): f"number {n}" for n in range(8)})
    slow = {"params": {"step_seconds": 0.02}}
    job.tick(drive=Runs(interrupt_at=1), sampling=slow)
    write(job.source / "2.parquet", {"new": "a cat"})
    report = job.tick(sampling={**slow, "num_frames": 3}, run={"max_attempts": 7})
    assert report.exit == 0
    assert {r["num_frames"] for r in job.rows(0)} == {2} and {r["num_frames"] for r in job.rows(1)} == {3}
    job.prove()


def test_failed_rows_stay_failed_until_they_are_reopened_and_then_go_first(job: Scheduled) -> None:
    job.dataset["columns"] = {"prompt": "prompt", "params.fail": "fail"}
    write(job.source / "1.parquet", {"a": "a red ball", "bad": "a blue cube"}, fail=["", "item"])
    report = job.tick(run={"max_attempts": 1})
    assert (report.exit, report.counts["failed"]) == (3, 1)
    assert job.tick().exit == 0  # nothing was driven
    retry(str(job.output / "runs/0"))
    write(job.source / "2.parquet", {"c": "a cat"}, fail=[""])
    again = job.tick(run={"max_attempts": 1})
    assert (again.exit, [d.run for d in again.driven]) == (3, [0, 1])


# ---------------------------------------------------------------- two ticks at once


def test_a_tick_beside_a_running_one_is_skipped_or_joins_in(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    inside: list[Any] = []

    def meanwhile() -> None:
        if inside:
            return
        inside.append("began")
        with pytest.raises(epochs.Held, match="still runs, this one is skipped"):
            job.tick()
        write(job.source / "2.parquet", {"c": "a cat"})
        inside.append(job.tick(overlap="join", drive=other))

    def other(source: str, overrides: Any) -> Outcome:
        if source.endswith("/0"):
            raise epochs.Held("the first tick has it")
        return Runs()(source, overrides)

    job.runs.before = meanwhile
    assert job.tick().exit == 0
    joined = inside[1]
    assert (joined.exit, joined.run, [(d.run, d.code) for d in joined.driven]) == (0, 1, [(0, 75), (1, 0)])
    assert len(job.made()) == 3
    job.prove()


def test_who_loses_the_creation_of_a_run_works_out_what_is_still_new(
    job: Scheduled, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(job.source / "1.parquet", A)
    freeze, raced = files.freeze, []

    def late(objects: Any, plan: Any, token: str) -> bool:
        if not raced:
            raced.append(True)
            job.tick(overlap="join")
            write(job.source / "2.parquet", {"c": "a cat"})
        return freeze(objects, plan, token)

    monkeypatch.setattr(files, "freeze", late)
    report = job.tick()
    assert (report.exit, report.run, report.items) == (0, 1, 1)
    assert any("another tick made run 0 first" in line for line in job.said)
    assert job.made() == [("a", "a red ball", 0), ("b", "a blue cube", 0), ("c", "a cat", 0)]
    job.prove()


def test_many_ticks_at_once_make_every_row_once(job: Scheduled) -> None:
    write(job.source / "1.parquet", {str(n): f"number {n}" for n in range(9)})
    gate, reports, errors = threading.Barrier(4), [], []

    def one() -> None:
        gate.wait()
        try:
            reports.append(job.tick(overlap="join"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [report.run for report in reports if report.run is not None] == [0]
    job.tick()
    assert len(job.made()) == 9
    job.prove()


def test_a_plan_that_is_gone_is_noticed(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    write(job.source / "2.parquet", {"c": "a cat"})
    job.tick()
    (job.output / "runs/0/plan/0/PLAN.json").unlink()
    with pytest.raises(PlanError, match=r"runs/0/plan/0/PLAN\.json is gone"):
        job.tick()


def test_a_run_and_a_schedule_do_not_share_a_folder_and_a_tick_is_not_extended(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    run = Objects(str(job.output / "runs/0"))
    config = job.config(output={"path": run.url})
    with pytest.raises(PlanError, match="one tick of a schedule"):
        build(config, run, extend=True)
    write(job.source / "2.parquet", {"c": "a cat"})
    assert changed_dataset(read_plan(run), config) is None
    other = Objects(str(job.output.parent / "plain"))
    build(job.config(output={"path": other.url}), other)
    with pytest.raises(ConfigError, match="is a run itself"):
        job.tick(output={"path": other.url})


# ---------------------------------------------------------------- budgets


def test_what_a_budget_leaves_over_is_resumed_by_the_next_tick_before_its_own_rows(job: Scheduled) -> None:
    slow = {"params": {"step_seconds": 0.1}}
    write(job.source / "1.parquet", {str(n): f"number {n}" for n in range(40)})
    budget = {"max_gpu_hours": 0.5 / 3600}
    first = job.tick(sampling=slow, run=budget)
    assert (first.exit, first.waiting) == (5, [0])
    done = len(job.made())
    assert 0 < done < 40 and first.counts["pending"] == 40 - done
    write(job.source / "2.parquet", {"new": "a cat"})
    second = job.tick(sampling=slow, run=budget)  # a budget of its own
    assert (second.exit, second.run, second.waiting, job.runs.order) == (5, 1, [0, 1], [0, 0])
    assert done < len(job.made()) < 40
    third = job.tick(sampling=slow)
    assert (third.exit, third.waiting, job.runs.order) == (0, [], [0, 0, 0, 1])
    job.prove()


def test_a_budget_is_shared_by_the_runs_of_a_tick(job: Scheduled) -> None:
    asked: list[float] = []

    def drive(source: str, overrides: Any) -> Outcome:
        found = dict(text.split("=", 1) for text in overrides)
        objects = Objects(source)
        planned = read_plan(objects)[0].config["run"]["max_gpu_hours"]
        asked.append(float(found.get("run.max_gpu_hours", planned)) * 3600)
        lease = epochs.acquire(objects, lease=60)
        spent = float(lease.before.get("gpu_seconds", 0.0))
        lease.release(gpu_seconds=spent + 400.0)
        if len(asked) == 1:
            return Outcome(5, "test", {}, 0.0)
        objects.put("_SUCCESS.json", json.dumps({"plan": 0, "generation": 0, "counts": {}, "parts": {}}).encode())
        return Outcome(0, "test", {}, 0.0)

    write(job.source / "1.parquet", A)
    job.tick(drive=drive, run={"max_gpu_hours": 1.0})
    write(job.source / "2.parquet", {"c": "a cat"})
    report = job.tick(drive=drive, run={"max_gpu_hours": 600 / 3600})
    assert report.exit == 0 and asked == pytest.approx([3600.0, 400.0 + 600.0, 200.0])
    write(job.source / "3.parquet", {"d": "a dog"})
    spent = job.tick(drive=drive, run={"max_gpu_hours": 0})
    assert (spent.exit, spent.run, spent.waiting, len(asked)) == (5, 2, [2], 3)


def test_the_highest_priority_goes_first_then_the_oldest(job: Scheduled) -> None:
    job.dataset["columns"] = {"prompt": "prompt", "priority": "rank"}

    def limit(source: str, overrides: Any) -> Outcome:
        return Outcome(5, "test", {}, 0.0)

    for number, ranks in enumerate([[0, 3], [0, 7], [1, 3]]):
        ids = {f"{number}{i}": "a ball" for i in range(2)}
        write(job.source / f"{number}.parquet", ids, rank=ranks)
        assert job.tick(drive=limit).exit == 5
    assert job.tick().exit == 0
    assert job.runs.order == [1, 0, 2]


def test_a_deadline_is_one_moment_for_all_runs_of_a_tick(job: Scheduled) -> None:
    write(job.source / "1.parquet", A)
    soon = datetime.now().astimezone() + timedelta(hours=3)
    asked: list[str] = []

    def drive(source: str, overrides: Any) -> Outcome:
        asked.append(dict(text.split("=", 1) for text in overrides)["run.deadline"])
        return Outcome(5, "test", {}, 0.0)

    clock = [soon - timedelta(hours=3)]
    config = job.config(run={"deadline": soon.strftime("%H:%M")})
    ticks.tick(config, Schedule(), drive, say=job.said.append, now=lambda: clock[0])
    assert datetime.fromisoformat(json.loads(asked[0])) == soon.replace(second=0, microsecond=0)
    past = job.config(run={"deadline": (soon - timedelta(days=1)).isoformat()})
    report = ticks.tick(past, Schedule(), drive, say=job.said.append, now=lambda: clock[0])
    assert (report.exit, len(asked)) == (5, 1)


def test_a_clock_that_jumps_changes_nothing(job: Scheduled, monkeypatch: pytest.MonkeyPatch) -> None:
    write(job.source / "1.parquet", A)
    job.tick()
    real = time.time
    for number, jump in enumerate((-400 * 86400.0, 400 * 86400.0, 0.0)):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        assert job.tick().run is None
        write(job.source / f"new-{number}.parquet", {f"n{number}": "a cat"})
        assert (job.tick().run, len(job.made())) == (number + 1, number + 3)
    job.prove()


# ---------------------------------------------------------------- size


def test_a_row_seen_costs_no_python_object_no_planning_and_no_look_at_its_media(
    job: Scheduled, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(job.source / "1.parquet", {str(n): f"number {n}" for n in range(500)})
    job.tick(drive=lambda source, overrides: Outcome(5, "test", {}, 0.0))
    write(job.source / "2.parquet", {"new": "a cat"})
    looked: list[int] = []
    look = difference.Difference._planned

    def counting(self: Any, *arguments: Any) -> Any:
        rows, block = look(self, *arguments)
        looked.append(len(rows.row))
        return rows, block

    monkeypatch.setattr(difference.Difference, "_planned", counting)
    job.tick(drive=lambda source, overrides: Outcome(5, "test", {}, 0.0))
    assert looked == [1]
