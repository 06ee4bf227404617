"""What a plan will cost: seconds, GPU-hours, price, bytes and wall time, each with how it is known.

Analytic until something was measured: counted FLOPs at an assumed efficiency. After a pilot its seconds and bytes, and
for shapes that it did not make those of the nearest one it made, scaled. Kept in OUTPUT/estimate.json, which may change
while the plan may not. Refuses to know clusters and the dispatcher; failures and queues for a cluster are not in it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vidgen import faults
from vidgen.config import JobConfig
from vidgen.plan.cost import CPU_GFLOPS_PER_CORE
from vidgen.plan.files import Objects
from vidgen.plan.makespan import makespan
from vidgen.types import Plan

ESTIMATE = "estimate.json"
REPLICAS = (1, 8, 64)
"""For how many the wall time is told where `parallel.replicas` is auto."""
ANALYTIC, PILOT = "analytic", "pilot"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one shape: `items` that count, median seconds of an item by stage (its share of a batch),
    mean bytes of a video, and `spread`, the standard deviation of an item's seconds over their mean."""

    items: int
    encode: float
    denoise: float
    decode: float
    write: float
    bytes: float
    spread: float = 0.0

    @property
    def seconds(self) -> float:
        """For which an item occupies its replica: it is written beside the next, which waits if that takes longer."""
        return max(self.encode + self.denoise + self.decode, self.write)

    def scaled(self, flops: float, pixels: float) -> Measured:
        """The same of a shape of so many times the FLOPs and pixels. Texts take as long."""
        return Measured(
            0, self.encode, self.denoise * flops, self.decode * pixels, self.write * pixels, self.bytes * pixels
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """A pilot's result. `warm_up` is by how many seconds the first item of a replica took longer, `peak_bytes` the most
    memory of a GPU (None: not measured), `first` the items that began a replica, `sizes` the TFLOP and pixels of each
    shape that was measured."""

    items: int
    device: str
    shapes: Mapping[str, Measured]
    sizes: Mapping[str, tuple[float, float]]
    warm_up: float = 0.0
    peak_bytes: int | None = None
    first: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        shapes = {label: Measured(**one) for label, one in values["shapes"].items()}
        sizes = {label: (float(size[0]), float(size[1])) for label, size in values["sizes"].items()}
        return cls(**{**values, "shapes": shapes, "sizes": sizes, "first": tuple(values["first"])})


def forecast(plans: Sequence[Plan], config: JobConfig, pilot: Calibration | None = None) -> dict[str, Any]:
    """The content of estimate.json for a run's plans under a configuration (of which `parallel`, `engine` and
    `run.price_per_gpu_hour` count). Seconds are of a replica, GPU-hours of all members of a gang."""
    estimate = plans[-1].estimate
    shapes = [_shape(entry, estimate, config, pilot) for entry in _together(plans)]
    hours = sum(shape["gpu_hours"] for shape in shapes)
    price = config.run.price_per_gpu_hour
    wanted = config.parallel.replicas
    counts = REPLICAS if wanted == "auto" else (int(wanted),)
    warm_up = 0.0 if pilot is None else pilot.warm_up
    return {
        "basis": ANALYTIC if pilot is None else PILOT,
        "says": _says(estimate, config, pilot),
        "items": sum(shape["items"] for shape in shapes),
        "shapes": shapes,
        "gpu_hours": hours,
        "price_per_gpu_hour": price,
        "price": None if price is None else hours * price,
        "bytes": sum(shape["bytes"] for shape in shapes),
        "wall": [wall(shapes, count, warm_up) for count in counts],
        "warm_up_seconds": None if pilot is None else pilot.warm_up,
        "memory_peak_bytes": None if pilot is None else pilot.peak_bytes,
        "pilot": None if pilot is None else asdict(pilot),
        "made_at": time.time(),
    }


def wall(shapes: Sequence[Mapping[str, Any]], replicas: int, warm_up: float = 0.0) -> dict[str, Any]:
    """Seconds until `replicas` have made all, longest first; `tail_seconds` of it are beyond what the work divided by
    the replicas is. Shapes made by gangs of one size have their replicas to themselves, as many as their share of the
    work; at least one, so there may be more than `replicas`."""
    pools: dict[int, list[tuple[float, int]]] = {} if shapes else {1: []}
    for shape in shapes:
        pools.setdefault(shape["gpus"], []).append((shape["seconds_per_item"], shape["items"]))
    work = {gpus: sum(seconds * items for seconds, items in pool) for gpus, pool in pools.items()}
    total = sum(work.values()) or 1.0
    shares = {gpus: max(1, round(replicas * work[gpus] / total)) for gpus in pools}
    if len(pools) == 1:
        shares = dict.fromkeys(pools, replicas)
    ends = {gpus: makespan(pool, shares[gpus]) for gpus, pool in pools.items()}
    last = max(ends, key=lambda gpus: ends[gpus])
    return {
        "replicas": sum(shares.values()),
        "gpus": sum(gpus * count for gpus, count in shares.items()),
        "seconds": ends[last] + warm_up,
        "tail_seconds": ends[last] - work[last] / shares[last],
    }


def read(objects: Objects) -> dict[str, Any]:
    """estimate.json; {} if there is none."""
    try:
        found: dict[str, Any] = json.loads(objects.read(ESTIMATE))
        return found
    except (FileNotFoundError, ValueError):
        return {}


def calibration(objects: Objects) -> Calibration | None:
    """What the last pilot of a run measured."""
    pilot = read(objects).get("pilot")
    return None if pilot is None else Calibration.from_dict(pilot)


def write(
    objects: Objects, plans: Sequence[Plan], config: JobConfig, pilot: Calibration | None = None
) -> dict[str, Any]:
    """Puts estimate.json, with what an earlier pilot measured if none is given; its content."""
    found = forecast(plans, config, pilot or calibration(objects))
    with faults.around("estimate"):
        objects.put(ESTIMATE, json.dumps(found, indent=1).encode())
    return found


def _together(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """The shapes of all plans, the most work first."""
    found: dict[str, dict[str, Any]] = {}
    for plan in plans:
        pixels = sum(_pixels(entry) * entry["items"] for entry in plan.estimate["shapes"]) or 1.0
        for entry in plan.estimate["shapes"]:
            known = found.setdefault(entry["shape"], {**entry, "items": 0, "bytes": 0.0})
            known["items"] += entry["items"]
            known["bytes"] += plan.estimate["bytes"] * _pixels(entry) * entry["items"] / pixels
    return sorted(found.values(), key=lambda entry: -entry["items"] * entry["tflops_per_item"])


def _pixels(entry: Mapping[str, Any]) -> float:
    """Of a video; plans that did not keep their shapes: in proportion to tokens."""
    request = entry.get("request")
    return float(request["height"] * request["width"] * request["num_frames"] if request else entry["tokens"])


def _shape(
    entry: Mapping[str, Any], estimate: Mapping[str, Any], config: JobConfig, pilot: Calibration | None
) -> dict[str, Any]:
    items, gpus = entry["items"], int(entry.get("gpus", 1))
    measured = None if pilot is None else _measured(entry, pilot)
    seconds = _analytic(entry, estimate, config) if measured is None else measured.seconds
    found = {
        "shape": entry["shape"],
        "items": items,
        "gpus": gpus,
        "tokens": entry["tokens"],
        "tflops_per_item": entry["tflops_per_item"],
        "seconds_per_item": seconds,
        "gpu_hours": seconds * gpus * items / 3600,
        "bytes": entry["bytes"] if measured is None else measured.bytes * items,
        "measured": 0 if measured is None else measured.items,
    }
    if measured is not None:
        found["spread"] = measured.spread
        found["stages"] = {name: getattr(measured, name) for name in ("encode", "denoise", "decode", "write")}
    return found


def _analytic(entry: Mapping[str, Any], estimate: Mapping[str, Any], config: JobConfig) -> float:
    flops = entry["tflops_per_item"] * 1e12
    if config.engine.device == "cpu":
        return float(flops / (CPU_GFLOPS_PER_CORE * 1e9 * _cores(config)))
    if "seconds_per_item" in entry:
        return float(entry["seconds_per_item"])
    return float(flops / (estimate["assumed_gpu_tflops"] * 1e12 * entry.get("gpus", 1)))


def _cores(config: JobConfig) -> int:
    return 1 if config.engine.threads == "auto" else int(config.engine.threads)


def _measured(entry: Mapping[str, Any], pilot: Calibration) -> Measured | None:
    """Of this shape, else of the nearest in FLOPs that was measured, scaled."""
    if entry["shape"] in pilot.shapes:
        return pilot.shapes[entry["shape"]]
    if not pilot.shapes:
        return None
    flops, pixels = size_of(entry)
    label = min(pilot.shapes, key=lambda name: (abs(math.log(pilot.sizes[name][0] / flops)), name))
    return pilot.shapes[label].scaled(flops / pilot.sizes[label][0], pixels / pilot.sizes[label][1])


def size_of(entry: Mapping[str, Any]) -> tuple[float, float]:
    """TFLOP and pixels of an item of a shape of a plan's estimate, by which seconds are scaled."""
    return max(float(entry["tflops_per_item"]), 1e-12), max(_pixels(entry), 1.0)


def _says(estimate: Mapping[str, Any], config: JobConfig, pilot: Calibration | None) -> str:
    """How it is known, in words."""
    if pilot is not None:
        missing = "; shapes without one scaled by FLOPs"
        return f"a pilot of {pilot.items} items on {pilot.device or 'CPU'}{missing}"
    if config.engine.device == "cpu":
        rate = f"{CPU_GFLOPS_PER_CORE:g} GFLOP/s a core, {_cores(config)} a replica"
        return f"counted FLOPs of denoising at an assumed {rate}"
    of = f" of {estimate['gpu']}" if estimate.get("gpu") else ""
    return f"counted FLOPs of denoising at an assumed {estimate['assumed_gpu_tflops']:.4g} TFLOP/s{of}"
