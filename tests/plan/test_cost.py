"""Cost: arithmetic with its assumptions beside it, what fits, and the refusal to spend days on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.plan.conftest import dataset, items_of, job
from vidgen import memory
from vidgen import placement as choosing
from vidgen.errors import ConfigError
from vidgen.memory import GIB, Component, Sizing
from vidgen.placement import Placement
from vidgen.plan import cost, placing
from vidgen.plan.build import build
from vidgen.plan.forecast import forecast
from vidgen.plan.shapes import Shape
from vidgen.report import planned
from vidgen.specs.footprint import Footprint
from vidgen.specs.gpus import GPUS
from vidgen.store.objects import Objects
from vidgen.types import Media, Request

HOUR_OF_A_GPU = cost.GPU_TFLOPS * 1e12 * 3600
REQUEST = Request("t2v", "", "", 0, 480, 832, 81, 16.0, 50, 5.0, "unipc")


def estimate(flops: float, items: int = 1, price: float | None = None) -> dict:
    adding = cost.Estimate("mp4", price, 10)
    adding.add(Shape(REQUEST, (), tokens=100, flops=flops, frames=81), items)
    return adding.summary()


def test_hours_price_and_bytes_follow_from_the_assumptions_it_states() -> None:
    found = estimate(HOUR_OF_A_GPU, items=3, price=2.5)
    assert found["gpu_hours"] == pytest.approx(3) and found["price"] == pytest.approx(7.5)
    assert found["bytes"] == int(3 * 480 * 832 * 81 * found["assumed_bits_per_pixel"] / 8)
    (shape,) = found["shapes"]
    assert (shape["shape"], shape["items"]) == ("832x480, 81 frames, 50 steps", 3)


def test_no_price_is_no_price() -> None:
    assert estimate(1.0)["price"] is None


def test_items_of_more_shapes_than_a_person_reads_are_added_up_together() -> None:
    adding = cost.Estimate("mp4", None, 0)
    for steps in range(cost.MOST_LABELS + 50):
        request = Request("t2v", "", "", 0, 64, 64, 17, 8.0, steps, 1.0, "card")
        adding.add(Shape(request, (), flops=1.0, frames=17), 1)
    shapes = adding.summary()["shapes"]
    assert len(shapes) == cost.MOST_LABELS + 1
    assert sum(shape["items"] for shape in shapes) == cost.MOST_LABELS + 50 and shapes[0]["items"] == 50


def test_auto_refuses_a_machine_without_gpu_above_half_an_hour_an_item_with_the_number() -> None:
    slow = estimate(cost.CPU_GFLOPS_PER_CORE * 1e9 * 2 * 3600)
    message = cost.device_problem(slow, "auto", gpus=0, cores=1)
    assert message is not None and "120 minutes on 1 cores" in message and "engine.device=cpu" in message
    assert cost.device_problem(slow, "auto", gpus=0, cores=8) is None
    assert cost.device_problem(slow, "auto", gpus=1, cores=1) is None
    assert cost.device_problem(slow, "cpu", gpus=0, cores=1) is None
    assert "no GPU" in str(cost.device_problem(slow, "cuda", gpus=0, cores=1))


def test_wan_1_3b_at_480p_is_refused_and_a_small_model_is_not() -> None:
    """283 TFLOP a forward, 100 forwards; the demo's two million parameters take about 0.1 TFLOP an item."""
    assert cost.device_problem(estimate(283e12 * 100), "auto", gpus=0, cores=64) is not None
    assert cost.device_problem(estimate(0.1e12), "auto", gpus=0, cores=1) is None


FOOTPRINT = Footprint(tokens=10_000, width=100, token=100_000, branches=1, latents=10, frames=1, work=1)
"""Two billion bytes of activations in bf16, on one GPU."""


def placement(parallel: dict[str, Any], weights: int, asked: list[Request] | None = None) -> Placement:
    """Of a model of so many bytes of weights; `asked` collects the requests whose footprint is taken."""

    def footprint(request: Request) -> Footprint:
        if asked is not None:
            asked.append(request)
        return FOOTPRINT

    return Placement(
        Sizing({"transformer": Component(1, weights)}, footprint, {"denoise": 2, "decode": 2}), parallel, 8
    )


def test_each_shape_says_memory_degree_and_seconds_on_the_named_gpu_and_hours_are_of_its_gangs() -> None:
    placed = placement({"gpu": "A100-80GB", "context": 4}, 10 * GIB)
    adding = cost.Estimate("mp4", 1.0, 10, placed)
    tflops = 312 * memory.EFFICIENCY
    adding.add(Shape(REQUEST, (), tokens=10_000, flops=tflops * 1e12 * 3600, frames=81), 2)
    found = adding.summary()
    (shape,) = found["shapes"]
    assert (shape["gpu"], shape["gpus"], shape["context"], shape["fits"]) == ("A100-80GB", 4, 4, True)
    assert shape["smallest_context"] == 1 and shape["memory_bytes"] > 10 * GIB
    assert shape["memory_bytes"] == sum(term["bytes"] for term in shape["terms"])
    assert shape["seconds_per_item"] == pytest.approx(3600 / 4 / memory.context_efficiency(4))
    assert found["gpu_hours"] == pytest.approx(2 / memory.context_efficiency(4)) == found["price"]
    assert found["assumed_gpu_tflops"] == pytest.approx(tflops)


def test_a_shape_is_weighed_once_however_many_rows_have_it() -> None:
    asked: list[Request] = []
    adding = cost.Estimate("mp4", None, 10, placement({"gpu": "H100"}, GIB, asked))
    shape = Shape(REQUEST, (), tokens=10_000, flops=1.0, frames=81)
    for _ in range(100):
        adding.add(shape, 1000)
    assert len(asked) == 1


def test_a_degree_that_cannot_hold_a_shape_stops_the_planning_with_the_smallest_that_can() -> None:
    usable = memory.usable(GPUS["L4"])
    adding = cost.Estimate("mp4", None, 10, placement({"gpu": "L4", "context": 1}, usable - int(1.2e9)))
    with pytest.raises(ConfigError, match=r"parallel.context: 1: 832x480, 81 frames, 50 steps needs .* fits: 2"):
        adding.add(Shape(REQUEST, (), tokens=10_000, flops=1.0, frames=81), 1)


def test_a_plan_for_a_named_gpu_says_how_its_shapes_fit_and_freezes_it(source: Path, wan: Path) -> None:
    dataset(source, {"prompt": ["a", "b"]})
    rooms: dict[str, Any] = {"model": {"family": "auto", "checkpoint": str(wan)}}
    found = build(job(source, **rooms, parallel={"gpu": "RTX-4090"}), None, dry_run=True).plan.estimate
    (shape,) = found["shapes"]
    assert shape["fits"] and shape["gpus"] == 1 and {term["name"] for term in shape["terms"]} >= {"weights"}
    unsaid = build(job(source, **rooms), None, dry_run=True).plan.estimate
    assert unsaid["gpu"] is None and "fits" not in unsaid["shapes"][0]


def test_a_mesh_that_the_models_heads_do_not_allow_is_refused_by_the_plan(source: Path, wan: Path) -> None:
    dataset(source, {"prompt": ["a"]})
    rooms: dict[str, Any] = {"model": {"family": "auto", "checkpoint": str(wan)}}
    with pytest.raises(ConfigError, match=r"parallel.ulysses: 3; this model has 2 attention heads"):
        build(job(source, **rooms, parallel={"ulysses": 3}), None, dry_run=True)


def test_a_plan_says_which_degree_each_shape_gets_and_why(
    source: Path, wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit between what the two shapes take: the long one's gang halves that."""
    dataset(source, {"prompt": ["a", "b", "c"], "frames": [5, 81, 5]})
    rooms: dict[str, Any] = {
        "model": {"family": "auto", "checkpoint": str(wan)},
        "dataset": {"path": str(source), "columns": {"prompt": "prompt", "num_frames": "frames"}},
        "sampling": {"height": 32, "width": 32, "num_inference_steps": 1},
    }
    before = build(job(source, **rooms, parallel={"gpu": "L4"}), None, dry_run=True).plan.estimate["shapes"]
    monkeypatch.setattr(choosing, "LONG_SECONDS", max(shape["seconds_per_item"] for shape in before) * 0.9)
    config = job(source, **rooms, parallel={"gpu": "L4", "degree": "auto"})
    result = build(config, None, dry_run=True)
    found = result.plan.estimate
    (short,) = [shape for shape in found["shapes"] if "5 frames" in shape["shape"]]
    (long,) = [shape for shape in found["shapes"] if "81 frames" in shape["shape"]]
    assert (short["context"], short["why"]) == (1, "1 GPU: it fits")
    assert long["context"] > 1 and f"{long['gpus']} GPUs" in long["why"] and "minutes an item with 1" in long["why"]
    assert [gang["tokens_above"] for gang in found["gangs"]] == [-1, short["tokens"]]
    spent = sum(shape["items"] * shape["seconds_per_item"] * shape["gpus"] for shape in found["shapes"])
    assert found["gpu_hours"] == pytest.approx(spent / 3600)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    planned.show(result, "out", console, forecast(result.plans, config))
    text = console.export_text()
    assert f"degree    {long['shape']}: {long['why']}" in text
    assert f"gang      above {short['tokens']:,} tokens: {long['mesh']}" in text


def test_a_split_that_was_left_open_is_told_by_the_plan(source: Path, wan: Path) -> None:
    dataset(source, {"prompt": ["a"]})
    rooms: dict[str, Any] = {"model": {"family": "auto", "checkpoint": str(wan)}, "parallel": {"context": 4}}
    (gang,) = build(job(source, **rooms), None, dry_run=True).plan.estimate["gangs"]
    assert gang["mesh"] == "4 GPUs: tokens over 4 (ring 2 x ulysses 2)", "it has two heads"


def test_a_family_without_gangs_is_refused_them_by_the_plan(source: Path) -> None:
    dataset(source, {"prompt": ["a"]})
    with pytest.raises(ConfigError, match="testcard runs on one GPU, allowed: context 1 and cfg 1"):
        build(job(source, parallel={"context": 2}), None, dry_run=True)


def test_another_parallel_for_a_frozen_plan_is_judged_by_its_shapes_without_reading_a_row(
    source: Path, wan: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(source, {"prompt": ["a", "b"]})
    rooms: dict[str, Any] = {"model": {"family": "auto", "checkpoint": str(wan)}}
    frozen = build(job(source, **rooms), objects).plan
    (shape,) = placing.planned([frozen])
    (item, _) = items_of(objects, build(job(source, **rooms), objects))
    assert shape.items == 2 and shape.request == replace(item.request, prompt="", negative_prompt="", seed=0)
    assert not build(job(source, **rooms, parallel={"gpu": "L4", "context": 2}), objects).made
    monkeypatch.setitem(GPUS, "L4", replace(GPUS["L4"], memory=memory.CONTEXT_BYTES + 1000))
    with pytest.raises(ConfigError, match=r"parallel\.gpu: 'L4': \d+x\d+, .* needs .* has .*allowed: B200"):
        build(job(source, **rooms, parallel={"gpu": "L4"}), objects)
    with pytest.raises(ConfigError, match=r"parallel\.ulysses: 3; this model has 2 attention heads"):
        build(job(source, **rooms, parallel={"ulysses": 3}), objects)


def test_auto_is_refused_for_a_plan_that_did_not_keep_its_shapes(source: Path, wan: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})
    rooms: dict[str, Any] = {"model": {"family": "auto", "checkpoint": str(wan)}}
    rooms["parallel"] = {"gpu": "L4", "degree": "auto"}
    config = job(source, **rooms)
    frozen = build(config, objects).plan
    settled = placing.settled([frozen], config, 8)
    assert settled is not None and settled.parallel["context"] == 8, "one item, eight GPUs"
    older = replace(frozen, estimate={"shapes": [{"shape": "s", "items": 1, "tokens": 1, "tflops_per_item": 1.0}]})
    with pytest.raises(ConfigError, match="did not keep its shapes"):
        placing.settled([older], config, 8)
    assert placing.settled([older], job(source, model=rooms["model"]), 8) is None, "a GPU each needs none"


def test_shapes_of_media_and_lists_come_back_from_an_estimate_as_they_were() -> None:
    request = replace(
        REQUEST,
        task="i2v",
        image=Media("", ""),
        sigmas=(1.0, 0.5),
        tiling=(256, 256, 192, 192),
        params=(("strength", 0.5),),
    )
    adding = cost.Estimate("mp4", None, 10)
    adding.add(Shape(request, (), tokens=100, flops=1e12, frames=81), 3)
    plan: Any = SimpleNamespace(config={"model": {"task": "i2v"}}, estimate=json.loads(json.dumps(adding.summary())))
    (found,) = placing.planned([plan])
    assert (found.request, found.tokens, found.flops, found.items) == (request, 100, 1e12, 3)
