"""What a plan says it costs: in all and by shape, analytic and after a pilot."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fleet.inline import planned
from vidgen.plan import forecast, sample
from vidgen.plan.build import build
from vidgen.plan.cost import GPU_TFLOPS
from vidgen.plan.forecast import Calibration, Measured
from vidgen.plan.sample import Shapes
from vidgen.store.objects import Objects
from vidgen.types import Plan


def mixed(tmp_path: Path, **overrides: Any) -> tuple[Any, Objects, tuple[Plan, ...]]:
    """30 small clips and 3 of four times the pixels."""
    return planned(tmp_path, [32] * 30 + [64] * 3, **overrides)


def costing(plans: tuple[Plan, ...], *tflops: float) -> tuple[Plan, ...]:
    """The same plan where the shapes, the most items first, cost so many TFLOP an item."""
    shapes = [{**e, "tflops_per_item": t} for e, t in zip(plans[0].estimate["shapes"], tflops, strict=True)]
    return (replace(plans[0], estimate={**plans[0].estimate, "shapes": shapes}),)


def test_gpu_hours_price_bytes_and_wall_time_add_up(tmp_path: Path) -> None:
    config, _, plans = mixed(tmp_path, run__price_per_gpu_hour=3.0)
    found = forecast.forecast(costing(plans, GPU_TFLOPS, 10 * GPU_TFLOPS), config)
    long, short = sorted(found["shapes"], key=lambda shape: -shape["seconds_per_item"])
    assert (long["seconds_per_item"], short["seconds_per_item"]) == (pytest.approx(10), pytest.approx(1))
    assert found["gpu_hours"] == pytest.approx(60 / 3600) == pytest.approx(found["price"] / 3)
    assert found["bytes"] == pytest.approx(plans[0].estimate["bytes"], abs=2)
    assert long["bytes"] / long["items"] == pytest.approx(4 * short["bytes"] / short["items"])
    assert [(w["replicas"], w["seconds"]) for w in found["wall"]] == [
        (1, pytest.approx(60)),
        (8, pytest.approx(10)),
        (64, pytest.approx(10)),
    ]
    assert found["wall"][1]["tail_seconds"] == pytest.approx(10 - 60 / 8)
    assert found["basis"] == "analytic" and "assumed 344 TFLOP/s" in found["says"]


def test_a_number_of_replicas_is_the_only_one_told_and_a_cpu_counts_its_cores(tmp_path: Path) -> None:
    config, _, plans = mixed(tmp_path, parallel__replicas=5)
    assert [wall["replicas"] for wall in forecast.forecast(plans, config)["wall"]] == [5]
    config.engine.device, config.engine.threads = "cpu", 4
    found = forecast.forecast(costing(plans, 0.1, 0.1), config)
    assert found["shapes"][0]["seconds_per_item"] == pytest.approx(1.0) and "4 a replica" in found["says"]


def test_gangs_have_their_replicas_to_themselves_and_cost_all_their_gpus() -> None:
    shapes = [
        {"gpus": 1, "seconds_per_item": 1.0, "items": 60},
        {"gpus": 4, "seconds_per_item": 10.0, "items": 6},
    ]
    assert forecast.wall(shapes, 4) == {"replicas": 4, "gpus": 10, "seconds": 30.0, "tail_seconds": 0.0}
    assert forecast.wall(shapes, 1)["replicas"] == 2, "one of each at least"
    assert forecast.wall([], 4)["seconds"] == 0.0


PILOT = Calibration(
    items=5,
    device="",
    shapes={"32x32, 5 frames, 2 steps, no guidance": Measured(4, 1.0, 4.0, 2.0, 3.0, 1000.0)},
    sizes={"32x32, 5 frames, 2 steps, no guidance": (1.0, 5 * 32 * 32)},
    warm_up=6.0,
    first=("a",),
)


def test_after_a_pilot_shapes_take_what_was_measured_and_the_others_that_scaled(tmp_path: Path) -> None:
    config, _, plans = mixed(tmp_path)
    found = forecast.forecast(costing(plans, 1.0, 10.0), config, PILOT)
    long, short = sorted(found["shapes"], key=lambda shape: -shape["seconds_per_item"])
    assert (short["measured"], short["seconds_per_item"], short["bytes"]) == (4, 7.0, 30_000.0)
    # Ten times the FLOPs of its steps, four times the pixels of its decoding; its prompt takes as long.
    assert (long["measured"], long["seconds_per_item"], long["bytes"]) == (0, 1.0 + 40.0 + 8.0, 12_000.0)
    assert found["basis"] == "pilot" and found["memory_peak_bytes"] is None
    assert found["wall"][0]["seconds"] == pytest.approx(30 * 7 + 3 * 49 + 6)


def test_an_item_occupies_its_replica_until_the_next_is_made_or_it_is_written() -> None:
    assert Measured(1, 1, 2, 3, 5, 0).seconds == 6 and Measured(1, 1, 2, 3, 9, 0).seconds == 9


def test_the_estimate_lies_beside_the_plan_and_keeps_a_pilot_through_an_extension(tmp_path: Path) -> None:
    config, objects, plans = mixed(tmp_path, dataset__limit=20)
    assert forecast.read(objects)["basis"] == "analytic" and forecast.read(objects)["items"] == 20
    forecast.write(objects, plans, config, PILOT)
    assert forecast.calibration(objects) == PILOT == Calibration.from_dict(asdict(PILOT))
    config.dataset.limit = None
    assert build(config, objects, extend=True).plan.k == 1
    again = forecast.read(objects)
    assert (again["basis"], again["items"]) == ("pilot", 33)


def test_a_damaged_or_missing_estimate_is_none(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "out"))
    assert forecast.read(objects) == {} and forecast.calibration(objects) is None
    objects.put(forecast.ESTIMATE, b"{")
    assert forecast.read(objects) == {}


# ---------------------------------------------------------------- the sample


def test_the_shapes_of_items_are_those_of_the_estimate(tmp_path: Path) -> None:
    _, objects, plans = mixed(tmp_path)
    known = sample.shapes(objects, plans)
    assert {known.label(ordinal) for ordinal in range(30)} == {"32x32, 5 frames, 2 steps, no guidance"}
    assert {known.label(ordinal) for ordinal in range(30, 33)} == {"64x64, 5 frames, 2 steps, no guidance"}
    assert {entry["shape"] for entry in plans[0].estimate["shapes"]} == set(known.labels)


def test_a_sample_has_some_of_every_shape_the_costliest_certainly_and_is_always_the_same() -> None:
    code = np.array([0] * 900 + [1] * 90 + [2] * 9 + [3], np.uint16)
    known = Shapes(code, ["a", "b", "c", "d"], [1.0, 5.0, 20.0, 100.0])
    assert sample.stratified(known, 1) == [999], "the costliest alone"
    chosen = sample.stratified(known, 20)
    assert chosen == sample.stratified(known, 20) and len(set(chosen)) == 20
    counts = np.bincount(code[chosen], minlength=4)
    assert counts[3] == 1 and all(counts >= 1) and counts[0] > counts[1] > counts[2]
    first = [ordinal for ordinal in chosen if ordinal < 900]
    assert max(np.diff([0, *first, 900])) < 2.5 * 900 / len(first), "spread over the plan"


def test_a_sample_of_more_than_there_is_is_everything() -> None:
    known = Shapes(np.array([0, 1, 1], np.uint16), ["a", "b"], [1.0, 2.0])
    assert sample.stratified(known, 20) == [0, 1, 2]
    assert sample.stratified(Shapes(np.zeros(0, np.uint16)), 20) == []
