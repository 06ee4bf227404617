"""Cost: arithmetic with its assumptions beside it, and the refusal to spend days on a CPU."""

from __future__ import annotations

import pytest

from vidgen.plan import cost
from vidgen.plan.shapes import Shape
from vidgen.types import Request

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
