"""A run is resumed with what today's configuration may change, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scheduled.schedule import Scheduled, write
from vidgen import config as configuration
from vidgen.cli import main
from vidgen.config import to_dict
from vidgen.errors import PlanError
from vidgen.fleet.driver import Outcome
from vidgen.fleet.opening import prepare
from vidgen.plan.build import build
from vidgen.plan.files import check_resume
from vidgen.scheduled.runs import overrides, read_runs
from vidgen.store.objects import Objects


@pytest.fixture
def job(tmp_path: Path) -> Scheduled:
    made = Scheduled(tmp_path)
    write(made.source / "1.parquet", {"a": "a ball"})
    made.tick(drive=lambda source, overrides: Outcome(5, "", {}, 0.0))
    return made


def test_free_keys_follow_and_frozen_ones_stay(job: Scheduled) -> None:
    today: dict[str, Any] = {
        "run": {"max_attempts": 9, "deadline": "2030-01-01T06:00", "max_gpu_hours": 0.5, "single_writer": True},
        "parallel": {"replicas": 3, "by_shape": [{"tokens_above": 9, "ulysses": 2}], "gpu": None},
        "engine": {"threads": 2, "vae_tiling": "on"},
        "dataset": {"max_rejected": 4, "where": "id = 'x'"},
        "sampling": {"height": 32},
        "model": {"cache_dir": "/tmp/ü cache, [1]"},
    }
    now = job.config(**today)
    now.name = "2024: a, b"
    (run,) = read_runs(Objects(str(job.output)))
    resumed = configuration.from_dict(run.plan.config, "test", overrides(now, run))
    check_resume([run.plan], resumed)
    frozen = to_dict(configuration.from_dict(run.plan.config))
    assert resumed.name == now.name and to_dict(resumed)["run"] == to_dict(now)["run"]
    assert to_dict(resumed)["parallel"] == to_dict(now)["parallel"]
    assert (resumed.engine.threads, resumed.engine.vae_tiling) == (2, "auto")
    assert (resumed.dataset.max_rejected, resumed.dataset.where) == (4, None)
    assert resumed.model.cache_dir == now.model.cache_dir
    assert to_dict(resumed)["sampling"] == frozen["sampling"] and to_dict(resumed)["output"] == frozen["output"]


def test_metrics_of_every_tick_are_the_schedules_and_those_of_a_run_its_own(job: Scheduled, tmp_path: Path) -> None:
    write(job.source / "2.parquet", {"b": "a box"})
    job.tick(drive=lambda source, overrides: Outcome(5, "", {}, 0.0))
    ticks = [prepare(str(job.output / f"runs/{number}"), [], print) for number in (0, 1)]
    assert {run.shown_as for run in ticks} == {str(job.output)}
    alone = Objects(str(tmp_path / "runs/7"))
    build(job.config(output={"path": alone.url}), alone)
    assert prepare(alone.url, [], print).shown_as == alone.url


def test_a_run_that_no_tick_planned_is_refused_below_a_schedule(job: Scheduled) -> None:
    stranger = Objects(str(job.output / "runs/1"))
    build(job.config(output={"path": stranger.url}), stranger)
    with pytest.raises(PlanError, match="runs/1: not planned by a scheduled tick"):
        job.tick()


def test_why_looks_in_every_run_of_a_schedule_the_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Scheduled(tmp_path)
    write(made.source / "1.parquet", {"a": "a ball", "b": "a box"})
    made.tick()
    write(made.source / "2.parquet", {"a": "a corrected ball"})
    (made.source / "1.parquet").unlink()
    made.tick(change="regenerate")
    assert main(["why", str(made.output), "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["item"]
    assert (found["run"], found["status"]) == (0, "done") and found["output"].endswith("runs/0")
    assert main(["why", str(made.output), "a", "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["items"]] == [1, 0]
    assert main(["why", str(made.output / "runs/1"), "a", "--make", str(tmp_path / "a.mp4")]) == 0
    assert "the committed video" in capsys.readouterr().out
    assert main(["why", str(made.output), "c"]) == 2
    assert "any of the 2 runs" in capsys.readouterr().err
