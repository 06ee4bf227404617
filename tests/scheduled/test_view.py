"""The view over all runs: complete, deterministic, and written only where it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.scheduled.schedule import Runs, Scheduled, write
from vidgen.errors import PlanError
from vidgen.fleet.driver import Outcome
from vidgen.report.repair import retry
from vidgen.scheduled import view
from vidgen.scheduled.runs import read_runs
from vidgen.store.objects import Objects
from vidgen.types import MANIFEST_COLUMNS


@pytest.fixture
def job(tmp_path: Path) -> Scheduled:
    return Scheduled(tmp_path)


class Spy(Objects):
    """Keeps account of what is put."""

    put_paths: list[str]

    def put(self, path: str, data: bytes) -> None:
        self.put_paths = [*getattr(self, "put_paths", []), path]
        super().put(path, data)


def files_of(job: Scheduled) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.output / "manifest").iterdir()}


def test_a_part_that_would_not_change_is_not_written(job: Scheduled) -> None:
    write(job.source / "1.parquet", {"a": "a ball", "b": ""})
    job.tick()
    before = {path: path.stat().st_mtime_ns for path in (job.output / "manifest").glob("run-000000-*")}
    assert len(before) == 2  # items, and a rejected row
    write(job.source / "2.parquet", {"c": "a cat"})
    job.tick()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    spy = Spy(str(job.output))
    view.update(spy)
    assert not hasattr(spy, "put_paths")


def test_the_view_follows_from_the_runs_alone_byte_for_byte(job: Scheduled) -> None:
    for number, change in enumerate(("red", "green", "blue")):
        write(job.source / "1.parquet", {"a": f"a {change} ball", "same": "a cube"})
        write(job.source / f"new-{number}.parquet", {f"n{number}": "a cat"})
        job.tick(change="regenerate")
    grown = files_of(job)
    assert [(r["run"], r["superseded_by"]) for r in job.rows() if r["row_id"] == "a"] == [(0, 2), (1, 2), (2, None)]
    shutil.rmtree(job.output / "manifest")
    view.update(Objects(str(job.output)))
    assert files_of(job) == grown
    job.prove()


def test_a_row_made_again_takes_the_place_of_the_old_one_only_once_it_is_done(job: Scheduled) -> None:
    job.dataset["columns"] = {"prompt": "prompt", "params.fail": "fail"}
    write(job.source / "1.parquet", {"a": "a ball"}, fail=[""])
    job.tick()
    write(job.source / "1.parquet", {"a": "a cube"}, fail=["item"])
    assert job.tick(change="regenerate", run={"max_attempts": 1}).exit == 3
    assert [(r["status"], r["superseded_by"]) for r in job.rows()] == [("done", None), ("failed", None)]
    write(job.source / "1.parquet", {"a": "a cone"}, fail=[""])
    job.tick(change="regenerate")
    assert [(r["status"], r["superseded_by"]) for r in job.rows()] == [("done", 2), ("failed", 2), ("done", None)]


def test_runs_that_nothing_was_made_again_of_are_not_read(job: Scheduled, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(job.source / f"{number}.parquet", {f"{number}": "a ball"})
        job.tick()
    write(job.source / "1.parquet", {"1": "another ball"})
    read: list[int] = []
    tables = view._tables

    def counted(run: Any, standing: Any) -> Any:
        read.append(run.number)
        return tables(run, standing)

    monkeypatch.setattr(view, "_tables", counted)
    job.tick(change="regenerate")
    assert set(read) == {1, 3}


def test_an_unfinished_run_shows_what_is_done_and_what_is_pending(job: Scheduled) -> None:
    write(job.source / "1.parquet", {str(n): "a ball" for n in range(20)})
    slow = {"params": {"step_seconds": 0.05}}
    job.tick(drive=Runs(interrupt_at=2), sampling=slow)
    view.update(Objects(str(job.output)))
    states = [row["status"] for row in job.rows()]
    assert len(states) == 20 and 2 <= states.count("done") < 20 and states.count("pending") == 20 - states.count("done")
    assert json.loads((job.output / "manifest/_VIEW.json").read_text())["unfinished"] == [0]
    assert job.tick().counts["done"] == 20
    job.prove()
    retry(str(job.output / "runs/0"), missing=True)
    assert job.tick().run is None


def test_the_view_reads_as_one_dataset_and_keeps_what_was_carried(job: Scheduled) -> None:
    write(job.source / "1.parquet", {"a": "a ball"}, topic=["x"], run=["mine"])
    job.tick()
    write(job.source / "2.parquet", {"b": "a cube"}, topic=["y"], run=["mine"], more=[3])
    job.tick()
    parts = sorted((job.output / "manifest").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts], promote_options="default")
    assert table.column_names[:2] == ["run", "superseded_by"]
    assert table.column_names[2:] == [*MANIFEST_COLUMNS, "topic", "input_run", "more"]
    assert table.column("input_run").to_pylist() == ["mine"] * 2 and table.column("more").to_pylist() == [None, 3]
    assert ds.dataset(str(job.output / "manifest")).count_rows() == 2


def test_two_updaters_end_with_the_newest_state(job: Scheduled, monkeypatch: pytest.MonkeyPatch) -> None:
    write(job.source / "1.parquet", {"a": "a ball"})
    job.tick()
    shutil.rmtree(job.output / "manifest")
    old = read_runs(Objects(str(job.output)))
    write_view, raced = view._write, []

    def slow(root: Objects, runs: Any, standings: Any) -> Any:
        if not raced:  # while this one has the old state in hand, another tick makes a run and its view
            raced.append(True)
            write(job.source / "2.parquet", {"b": "a cube"})
            job.tick()
        return write_view(root, runs, standings)

    monkeypatch.setattr(view, "_write", slow)
    body = view.update(Objects(str(job.output)), old)
    assert [entry["run"] for entry in body["runs"]] == [0, 1] and len(job.rows()) == 2
    assert body == view.read(Objects(str(job.output)))


def test_a_manifest_that_is_damaged_is_named_with_the_way_out(job: Scheduled) -> None:
    write(job.source / "1.parquet", {"a": "a ball"})
    job.tick()
    shutil.rmtree(job.output / "manifest")
    part = next((job.output / "runs/0/manifest").glob("*.parquet"))
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(PlanError, match=r"part-.*`vidgen generate .*runs/0` writes it again"):
        view.update(Objects(str(job.output)))


def test_a_schedule_without_runs_has_an_empty_view(job: Scheduled) -> None:
    assert view.update(Objects(str(job.output)))["runs"] == []
    assert job.tick(drive=lambda source, overrides: Outcome(0, "", {}, 0.0)).counts == {}
