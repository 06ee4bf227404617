"""A schedule is packed as one dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.scheduled.schedule import Runs, Scheduled, write
from vidgen.cli import main


def test_all_runs_are_packed_as_one_without_what_was_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = Scheduled(tmp_path)
    write(schedule.source / "monday.parquet", {"a": "a red circle", "b": "a blue square"})
    schedule.tick()
    write(schedule.source / "tuesday.parquet", {"c": "a green circle"}, topic=["sea"])
    write(schedule.source / "monday.parquet", {"a": "a red circle", "b": "a blue circle"})
    schedule.tick(change="regenerate")
    assert main(["pack", str(schedule.output), str(tmp_path / "pack"), "--format", "parquet", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert (account["videos"], account["left_out"]) == (3, {"superseded": 1})
    rows = [row for file in (tmp_path / "pack/data").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert sorted((row["row_id"], row["prompt"], row["run"], row["topic"]) for row in rows) == [
        ("a", "a red circle", 0, None),
        ("b", "a blue circle", 1, None),
        ("c", "a green circle", 1, "sea"),
    ]
    for row in rows:
        assert (schedule.output / row["source_video"]).read_bytes() == row["video"]["bytes"]


def test_a_schedule_with_an_unfinished_run_is_refused_unless_a_part_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = Scheduled(tmp_path)
    write(schedule.source / "monday.parquet", {str(i): f"prompt {i}" for i in range(6)})
    schedule.tick(run={"max_gpu_hours": 1e-9})
    command = ["pack", str(schedule.output), str(tmp_path / "pack"), "--format", "folder"]
    assert main(command) == 2
    assert "run 0 has not finished" in capsys.readouterr().err
    schedule.runs = Runs()
    schedule.tick()
    assert main(command) == 0
    assert len(list((tmp_path / "pack").glob("*.mp4"))) == 6
