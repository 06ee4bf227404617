"""What a plan will cost: arithmetic from the family's FLOP counts and a few stated assumptions, never a measurement.

Every assumption stands beside its result, so that a reader can put in his own. Refuses to know the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidgen.plan.shapes import Shape

GPU_TFLOPS = 344.0
"""Effective bf16 TFLOP/s of an H100-class GPU: what eager diffusers reaches on Wan 2.1 (9.77 s a step of the 14B model
at 480x832x81 on one H100)."""
CPU_GFLOPS_PER_CORE = 25.0
"""Effective fp32 GFLOP/s of one server core in transformer forwards."""
SLOW_SECONDS = 30 * 60
"""`engine.device: auto` refuses a machine without GPU above this many seconds an item."""
BITS_PER_PIXEL = {"mp4": 0.12, "webm": 0.10, "gif": 4.0, "png": 12.0}
"""Stored bits a pixel and frame: generated clips at crf 18 (mp4, webm), palette and lossless frames."""
MOST_LABELS = 1000


class Estimate:
    """Adds up items by shape; `summary` is the `estimate` of PLAN.json."""

    def __init__(self, format: str, price_per_gpu_hour: float | None, weight_bytes: int) -> None:
        self.format, self.price, self.weight_bytes = format, price_per_gpu_hour, weight_bytes
        self.shapes: dict[str, dict[str, Any]] = {}
        self.flops, self.costliest, self.pixels = 0.0, 0.0, 0

    def add(self, shape: Shape, items: int) -> None:
        label = shape.label if shape.label in self.shapes or len(self.shapes) < MOST_LABELS else "other shapes"
        entry = self.shapes.setdefault(
            label, {"shape": label, "items": 0, "tokens": shape.tokens, "tflops_per_item": shape.flops / 1e12}
        )
        entry["items"] += items
        self.flops += shape.flops * items
        self.costliest = max(self.costliest, shape.flops)
        self.pixels += shape.request.height * shape.request.width * shape.frames * items

    def summary(self) -> dict[str, Any]:
        hours = self.flops / (GPU_TFLOPS * 1e12) / 3600
        return {
            "shapes": sorted(self.shapes.values(), key=lambda entry: -entry["items"]),
            "tflops": self.flops / 1e12,
            "tflops_costliest_item": self.costliest / 1e12,
            "assumed_gpu_tflops": GPU_TFLOPS,
            "gpu_hours": hours,
            "price_per_gpu_hour": self.price,
            "price": None if self.price is None else hours * self.price,
            "bytes": int(self.pixels * BITS_PER_PIXEL[self.format] / 8),
            "assumed_bits_per_pixel": BITS_PER_PIXEL[self.format],
            "weight_bytes": self.weight_bytes,
            "seconds_per_item_one_core": self.costliest / (CPU_GFLOPS_PER_CORE * 1e9),
            "assumed_cpu_gflops_per_core": CPU_GFLOPS_PER_CORE,
        }


def cpu_seconds_per_item(estimate: Mapping[str, Any], cores: int) -> float:
    """Predicted seconds of the costliest item on `cores` cores without a GPU."""
    return float(estimate["seconds_per_item_one_core"]) / max(1, cores)


def device_problem(estimate: Mapping[str, Any], device: str, gpus: int, cores: int) -> str | None:
    """Why `engine.device` cannot be followed on a machine or cluster with so many GPUs and cores; None if it can."""
    if device == "cuda" and gpus == 0:
        return "engine.device: cuda is asked for, and there is no GPU"
    seconds = cpu_seconds_per_item(estimate, cores)
    if device == "auto" and gpus == 0 and seconds > SLOW_SECONDS:
        return (
            f"engine.device: auto finds no GPU, and an item would take about {seconds / 60:,.0f} minutes on {cores} "
            f"cores (the limit is {SLOW_SECONDS // 60}); use a machine with a GPU, or set engine.device=cpu to insist"
        )
    return None
