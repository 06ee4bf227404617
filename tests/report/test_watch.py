"""A run watched from its output alone, until it ends."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen.cli import main
from vidgen.errors import PlanError
from vidgen.plan.build import build
from vidgen.report import watch
from vidgen.store.objects import Objects


def test_a_watch_begins_before_the_driver_and_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    config = config_for(write_prompts(tmp_path / "p.parquet", 12), output, sampling__params__step_seconds=0.1)
    build(config, Objects(output))
    driver = threading.Thread(target=drive, args=(config,), daemon=True)
    first = next(watch.watch(output))
    assert (first.driver, first.pending) == ("none yet", 12)
    driver.start()
    assert main(["status", output, "--watch", "--every", "0.1", "--json"]) == 0
    driver.join()
    seen = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len(seen) > 2
    assert (seen[-1]["driver"], seen[-1]["finished"], seen[-1]["done"]) == ("stopped", True, 12)
    assert "running" in {one["driver"] for one in seen}
    assert [one["done"] for one in seen] == sorted(one["done"] for one in seen)


def test_what_a_driver_writes_down_is_shown_without_a_look_at_the_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from vidgen.store import epochs

    output = str(tmp_path / "out")
    objects = Objects(output)
    build(config_for(write_prompts(tmp_path / "p.parquet", 5), output), objects)
    lease = epochs.acquire(objects, lease=60)
    counts = {"done": 3, "failed": 1, "quarantined": 0, "pending": 1}
    replicas = [{"name": "r0", "stage": "denoise"}, {"name": "r1", "stage": "idle"}, {"name": "r2", "stage": "denoise"}]
    shown = {"state": "running", "updated_at": time.time(), "rate": 60.0, "eta": 60.0, "gpu_seconds": 36.0, "cost": 0.5}
    objects.put("progress.json", json.dumps({**shown, **counts, "replicas": replicas}).encode())
    refreshes = watch.watch(output, sleep=lambda seconds: None)
    assert next(refreshes).pending == 5, "the commits are asked at the start"
    found = next(refreshes)
    assert (found.done, found.failed, found.pending, found.eta, found.cost) == (3, 1, 1, 60.0, 0.5)
    assert found.replicas == {"denoise": 2, "idle": 1} and found.gpu_hours == 0.01
    lease.release()
    assert next(refreshes).driver == "stopped" and next(refreshes, None) is None


def test_a_finished_run_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    drive(config_for(write_prompts(tmp_path / "p.parquet", 2), output))
    assert main(["status", output, "--watch"]) == 0
    assert capsys.readouterr().out.count("2/2 done") == 1


def test_nothing_to_watch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no run here"):
        next(watch.watch(str(tmp_path)))
