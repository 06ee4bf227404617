"""What a plan will cost, and what it fits on: arithmetic from the family's counts and a few stated assumptions.

Never a measurement. Every assumption stands beside its result, so that a reader can put in his own. Refuses to know the
machine: `parallel.gpu` names the GPU that a plan is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vidgen import memory
from vidgen.placement import Fit, Placement, Planned
from vidgen.plan.placing import template
from vidgen.plan.shapes import Shape
from vidgen.specs.gpus import GPUS

GPU_TFLOPS = GPUS["H100"].tflops * memory.EFFICIENCY
"""Effective bf16 TFLOP/s where no GPU is named: of an H100."""
CPU_GFLOPS_PER_CORE = 25.0
"""Effective fp32 GFLOP/s of one server core in transformer forwards."""
SLOW_SECONDS = 30 * 60
"""`engine.device: auto` refuses a machine without GPU above this many seconds an item."""
BITS_PER_PIXEL = {"mp4": 0.12, "webm": 0.10, "gif": 4.0, "png": 12.0}
"""Stored bits a pixel and frame: generated clips at crf 18 (mp4, webm), palette and lossless frames."""
MOST_LABELS = 1000
OTHERS = "other shapes"


class Estimate:
    """Adds up items by shape; `summary` is the `estimate` of PLAN.json. With a placement, each shape is checked against
    the GPU that it names, once."""

    def __init__(
        self,
        format: str,
        price_per_gpu_hour: float | None,
        weight_bytes: int,
        placement: Placement | None = None,
    ) -> None:
        self.format, self.price, self.weight_bytes = format, price_per_gpu_hour, weight_bytes
        self.placement = placement
        self.shapes: dict[str, dict[str, Any]] = {}
        self.flops, self.costliest, self.pixels = 0.0, 0.0, 0
        self._gpu_seconds: dict[str, float] = {}
        self._planned: dict[str, Planned] = {}
        self._fits: dict[Shape, Fit | None] = {}

    def add(self, shape: Shape, items: int) -> None:
        """ConfigError where the shape cannot be made on the GPU that `parallel.gpu` names."""
        fit = self._fit(shape)
        label = shape.label if shape.label in self.shapes or len(self.shapes) < MOST_LABELS else OTHERS
        entry = self.shapes.get(label)
        if entry is None:
            entry = {"shape": label, "items": 0, "tokens": shape.tokens, "tflops_per_item": shape.flops / 1e12}
            entry |= {"request": template(shape.request)}
            entry |= fit.as_dict() if fit is not None and label != OTHERS else {"gpus": self._gpus(shape)}
            self.shapes[label] = entry
            self._planned[label] = _planned(shape)
        elif label == OTHERS and shape.tokens > entry["tokens"]:  # it stands for all of them
            entry |= {"tokens": shape.tokens, "request": template(shape.request)}
            self._planned[label] = _planned(shape)
        if label == OTHERS:  # of the mean
            done = entry["tflops_per_item"] * entry["items"]
            entry["tflops_per_item"] = (done + shape.flops / 1e12 * items) / (entry["items"] + items)
        entry["items"] += items
        self.flops += shape.flops * items
        seconds = shape.flops / (GPU_TFLOPS * 1e12) if fit is None else fit.seconds * fit.mesh.size
        self._gpu_seconds[label] = self._gpu_seconds.get(label, 0.0) + seconds * items
        self.costliest = max(self.costliest, shape.flops)
        self.pixels += shape.request.height * shape.request.width * shape.frames * items

    def _fit(self, shape: Shape) -> Fit | None:
        if self.placement is None:
            return None
        if shape not in self._fits:
            if len(self._fits) >= MOST_LABELS:
                self._fits.clear()
            self._fits[shape] = self.placement.of(_planned(shape))
        return self._fits[shape]

    def _gpus(self, shape: Shape) -> int:
        """How many make one of it, where no GPU is named."""
        if self.placement is None:
            return 1
        return next(band.layout.size for band in reversed(self.placement.bands) if shape.tokens > band.above)

    def _settle(self) -> None:
        """With `parallel.degree: auto`, the degrees of all shapes together: how they will be made on GPUs enough."""
        if self.placement is None or not self.placement.auto:
            return
        shapes = {label: replace(one, items=self.shapes[label]["items"]) for label, one in self._planned.items()}
        self.placement = self.placement.settled(list(shapes.values()))
        for label, shape in shapes.items():
            fit = self.placement.of(shape)
            if fit is not None and label != OTHERS:
                self.shapes[label] |= fit.as_dict()
                self._gpu_seconds[label] = fit.seconds * fit.mesh.size * shape.items

    def summary(self) -> dict[str, Any]:
        """Seconds and GPU-hours are of denoising: texts and frames are some per cent of it at the published sizes."""
        self._settle()
        hours = sum(self._gpu_seconds.values()) / 3600
        gpu = None if self.placement is None else self.placement.gpu
        return {
            "shapes": sorted(self.shapes.values(), key=lambda entry: -entry["items"]),
            "tflops": self.flops / 1e12,
            "tflops_costliest_item": self.costliest / 1e12,
            "gpu": gpu,
            "gangs": [] if self.placement is None else self.placement.gangs(),
            "assumed_gpu_tflops": GPU_TFLOPS if gpu is None else GPUS[gpu].tflops * memory.EFFICIENCY,
            "gpu_hours": hours,
            "price_per_gpu_hour": self.price,
            "price": None if self.price is None else hours * self.price,
            "bytes": int(self.pixels * BITS_PER_PIXEL[self.format] / 8),
            "assumed_bits_per_pixel": BITS_PER_PIXEL[self.format],
            "weight_bytes": self.weight_bytes,
            "seconds_per_item_one_core": self.costliest / (CPU_GFLOPS_PER_CORE * 1e9),
            "assumed_cpu_gflops_per_core": CPU_GFLOPS_PER_CORE,
        }


def _planned(shape: Shape) -> Planned:
    return Planned(shape.label, shape.request, shape.tokens, shape.flops)


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
