"""A pilot makes a sample as the run would, its videos count, and it says what the rest will cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fleet.inline import config_for, drive, planned, write_prompts
from vidgen import cli, manifest
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.opening import Run
from vidgen.fleet.pilot import calibrate, records
from vidgen.plan import forecast, sample
from vidgen.plan.build import build
from vidgen.plan.sample import Shapes
from vidgen.report.status import read as status
from vidgen.report.verify import verify
from vidgen.store import commits
from vidgen.store.objects import Objects
from vidgen.types import Plan, Record


def small_and_large(tmp_path: Path, **overrides: Any) -> tuple[Any, Objects, tuple[Plan, ...]]:
    return planned(tmp_path, [32] * 12 + [64] * 2, **overrides)


def test_a_sample_is_made_and_nothing_else_and_the_run_goes_on_with_what_is_left(tmp_path: Path) -> None:
    config, objects, plans = small_and_large(tmp_path, run__price_per_gpu_hour=2.0)
    known = sample.shapes(objects, plans)
    chosen = sample.stratified(known, 4)
    outcome, fleet = drive(config, only=np.array(chosen))
    assert (outcome.code, outcome.counts["done"], outcome.counts["pending"]) == (0, 4, 10)
    assert "sample of 4" in outcome.reason and not objects.exists(manifest.SUCCESS)
    assert {work.item.ordinal for _, works in fleet.sent for work in works} == set(chosen)
    assert {known.label(ordinal) for ordinal in chosen} == set(known.labels)

    found = calibrate(plans, known, records(Run(config, objects, plans), chosen), 0.0)
    assert found is not None and found.items == 4 and set(found.shapes) == set(known.labels)
    assert found.peak_bytes is None and all(one.seconds > 0 and one.bytes > 0 for one in found.shapes.values())
    estimate = forecast.write(objects, plans, config, found)
    assert estimate["basis"] == "pilot" and estimate["gpu_hours"] > 0 and len(found.first) <= 2

    outcome, fleet = drive(config)
    assert outcome.code == 0 and verify(config.output.path, strict=True).ok
    assert {work.item.ordinal for _, works in fleet.sent for work in works} == set(range(14)) - set(chosen)
    against = status(config.output.path).against
    assert against is not None and against.basis == "pilot"
    assert sum(shape.done for shape in against.shapes) == 14 == sum(shape.items for shape in against.shapes)
    assert all(shape.actual_seconds and shape.predicted_seconds for shape in against.shapes)
    assert against.actual_bytes == sum(entry.size for entry in objects.list("data"))
    assert against.predicted_cost == pytest.approx(2 * (against.predicted_gpu_hours or 0))


def test_a_pilot_that_was_interrupted_goes_on_with_the_same_sample(tmp_path: Path) -> None:
    config, objects, plans = small_and_large(tmp_path, sampling__params__step_seconds=0.05)
    chosen = sample.stratified(sample.shapes(objects, plans), 10)
    first, _ = drive(config, only=np.array(chosen), interrupt_at=2)
    assert first.code == 130 and 0 < first.counts["done"] < 10
    assert sample.stratified(sample.shapes(objects, plans), 10) == chosen
    done = set(commits.list_commits(objects, 0))
    second, fleet = drive(config, only=np.array(chosen))
    assert (second.code, second.counts["done"]) == (0, 10)
    assert {work.item.item_id for _, works in fleet.sent for work in works}.isdisjoint(done)


def test_a_sample_that_is_the_whole_plan_ends_as_the_run_does(tmp_path: Path) -> None:
    config, objects, _ = small_and_large(tmp_path)
    outcome, _ = drive(config, only=np.arange(14))
    assert outcome.code == 0 and objects.exists(manifest.SUCCESS) and verify(config.output.path).ok


def test_failed_items_of_a_sample_are_told_by_the_exit_code_and_calibrate_nothing(tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 8, fails=["item"] + [""] * 7), str(tmp_path / "out"))
    config.dataset.columns["params.fail"] = "fails"
    outcome, _ = drive(config, only=np.array([0, 1, 2]))
    assert (outcome.code, outcome.counts["failed"], outcome.counts["pending"]) == (3, 1, 5)
    objects = Objects(config.output.path)
    plans = build(config, objects).plans
    assert [record.ordinal for record in records(Run(config, objects, plans), [0, 1, 2])] == [1, 2]


def test_a_bad_configuration_burns_nothing_of_the_sample_and_gives_no_estimate(tmp_path: Path) -> None:
    config, objects, plans = small_and_large(tmp_path, sampling__params__fail="item")
    outcome, _ = drive(config, only=np.arange(6), rules=Rules(breaker_failures=6))
    assert (outcome.code, outcome.counts["pending"]) == (4, 14)
    known = sample.shapes(objects, plans)
    assert calibrate(plans, known, records(Run(config, objects, plans), list(range(6))), 0.0) is None


# ---------------------------------------------------------------- arithmetic


def made(ordinal: int, replica: str, at: float, seconds: float, batch: int = 1, **more: Any) -> Record:
    timing = {"denoise_s": seconds, "decode_s": 1.0, "write_s": 0.5, "bytes": 100, "batch": batch}
    return Record(f"{ordinal:02d}", ordinal, "done", 0, 1, replica=replica, started_at=at, **{**timing, **more})


def plan_of(tmp_path: Path) -> tuple[tuple[Plan, ...], Shapes]:
    _, objects, plans = small_and_large(tmp_path)
    return plans, sample.shapes(objects, plans)


def test_the_first_item_of_a_replica_warms_up_and_is_counted_apart(tmp_path: Path) -> None:
    plans, known = plan_of(tmp_path)
    group = [made(0, "r0", 10, 30), made(1, "r0", 40, 4), made(2, "r0", 50, 4), made(3, "r1", 10, 20)]
    found = calibrate(plans, known, group, began=5.0)
    assert found is not None
    (one,) = found.shapes.values()
    assert (one.items, one.denoise, one.seconds, one.spread) == (2, 4.0, 5.0, 0.0)
    assert found.warm_up == pytest.approx((26 + 16) / 2) and found.first == ("00", "03")
    later = calibrate(plans, known, [*group, made(4, "r0", 90, 40)], began=80.0, first=found.first)
    assert later is not None and later.first == ("00", "03", "04"), "a pilot that went on remembers"
    assert next(iter(later.shapes.values())).denoise == 4.0


def test_items_of_a_batch_share_its_steps_and_a_shape_seen_only_warming_up_is_better_than_none(tmp_path: Path) -> None:
    plans, known = plan_of(tmp_path)
    group = [made(0, "r0", 10, 8.0, batch=4), made(12, "r1", 10, 9.0, peak_bytes=7 << 30)]
    found = calibrate(plans, known, group, began=5.0)
    assert found is not None and found.peak_bytes == 7 << 30
    small, large = (found.shapes[known.label(ordinal)] for ordinal in (0, 12))
    assert (small.seconds, small.items) == (3.0, 1) and (large.seconds, large.items) == (10.0, 1)
    assert found.warm_up == 0.0, "nothing to compare with"
    assert found.sizes[known.label(12)][1] == 4 * found.sizes[known.label(0)][1]


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_vidgen_pilot_and_generate_and_status_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 9)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: piloted\nmodel: {{family: testcard}}\ndataset: {{path: {prompts}}}\n"
        f"sampling: {{num_frames: 5, num_inference_steps: 1}}\noutput: {{path: {tmp_path}/out}}\n"
        "run: {price_per_gpu_hour: 2.5}\n"
    )
    assert cli.main(["pilot", str(job), "--items", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["exit"], said["counts"]["done"], said["counts"]["pending"]) == (0, 4, 5)
    assert said["estimate"]["basis"] == "pilot" and said["estimate"]["price"] > 0
    assert cli.main(["pilot", str(job), "--items", "4"]) == 0, "made before: nothing to do, and the estimate again"
    text = capsys.readouterr().out
    assert "a pilot of 4 items" in text and "not measured" in text and "5 items are left" in text
    assert cli.main(["plan", str(job)]) == 0 and "a pilot of 4 items" in capsys.readouterr().out
    assert cli.main(["generate", str(tmp_path / "out"), "--no-report"]) == 0
    capsys.readouterr()
    assert cli.main(["status", str(tmp_path / "out")]) == 0
    assert "9/9" in (text := capsys.readouterr().out) and "predicted" in text and "a pilot of 4 items" in text
