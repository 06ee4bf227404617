"""Plan against actual: what estimate.json said of a run, and what its commits say, shape by shape.

Reads the plan's parts and the ledger (`vidgen.manifest.rows`), so it is for runs of a size that a person waits for.
Refuses to know a cluster, and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from vidgen import family
from vidgen.plan.shapes import label_of
from vidgen.report.wording import seconds, size
from vidgen.types import Request

MOST_ITEMS = 200_000
"""Of a run whose shapes are compared; of larger ones the totals are."""
MOST_SHOWN = 20
_SHAPE = ["height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "params", "family", "task"]
_SUMS = ["occupied_s", "write_s", "bytes"]


@dataclass(slots=True)
class ShapeActual:
    """One shape of a run. Seconds and bytes are means of an item; None: not predicted, or nothing made yet."""

    shape: str
    items: int
    done: int = 0
    predicted_seconds: float | None = None
    actual_seconds: float | None = None
    predicted_bytes: float | None = None
    actual_bytes: float | None = None
    gpus: int = 1


@dataclass(slots=True)
class Comparison:
    """`predicted_*` are of what is done so far, `whole_*` of all. GPU-hours spent include what failed and was repeated.
    Costs are in the currency of run.price_per_gpu_hour, None without one; `shapes` is empty above MOST_ITEMS items."""

    basis: str
    says: str
    whole_gpu_hours: float
    whole_bytes: float
    whole_cost: float | None
    predicted_gpu_hours: float | None
    actual_gpu_hours: float
    predicted_cost: float | None
    actual_cost: float | None
    predicted_bytes: float | None
    actual_bytes: float | None
    shapes: list[ShapeActual]


def compare(
    estimate: Mapping[str, Any], rows: Iterable[pa.Table] | None, gpu_hours: float, cost: float | None
) -> Comparison | None:
    """What estimate.json says against manifest rows (None: too many), and hours and cost so far. None without an
    estimate."""
    if not estimate:
        return None
    shapes = [] if rows is None else _shapes(estimate, rows)
    made = [shape for shape in shapes if shape.done]
    hours = sum((s.predicted_seconds or 0.0) * s.gpus * s.done for s in made) / 3600
    price = estimate["price_per_gpu_hour"]
    return Comparison(
        basis=estimate["basis"],
        says=estimate["says"],
        whole_gpu_hours=estimate["gpu_hours"],
        whole_bytes=estimate["bytes"],
        whole_cost=estimate["price"],
        predicted_gpu_hours=hours if made else None,
        actual_gpu_hours=gpu_hours,
        predicted_cost=None if price is None or not made else hours * price,
        actual_cost=cost,
        predicted_bytes=sum((s.predicted_bytes or 0.0) * s.done for s in made) if made else None,
        actual_bytes=sum((s.actual_bytes or 0.0) * s.done for s in made) if made else None,
        shapes=shapes,
    )


def _shapes(estimate: Mapping[str, Any], tables: Iterable[pa.Table]) -> list[ShapeActual]:
    found = {
        entry["shape"]: ShapeActual(
            entry["shape"],
            entry["items"],
            predicted_seconds=entry["seconds_per_item"],
            predicted_bytes=entry["bytes"] / max(1, entry["items"]),
            gpus=entry["gpus"],
        )
        for entry in estimate["shapes"]
    }
    sums: dict[str, list[float]] = {}
    for row in _summed(tables):
        label = _label(row)
        label = label if label in found or "other shapes" not in found else "other shapes"
        found.setdefault(label, ShapeActual(label, 0))
        total = sums.setdefault(label, [0.0] * 4)
        for place, name in enumerate(("write_s_count", *(f"{name}_sum" for name in _SUMS))):
            total[place] += row[name] or 0
    for label, (done, occupied, writing, stored) in sums.items():
        shape, count = found[label], max(1.0, done)
        shape.done = int(done)
        shape.actual_seconds, shape.actual_bytes = max(occupied, writing) / count, stored / count
    return list(found.values())


def _summed(tables: Iterable[pa.Table]) -> Iterable[dict[str, Any]]:
    """Sums over what is done, a row a combination of what shapes depend on."""
    for table in tables:
        done = table.filter(pc.equal(table.column("status"), "done"))
        batch = pc.cast(pc.max_element_wise(done.column("batch"), 1), pa.float64())
        shared = pc.divide(pc.add(done.column("encode_s"), done.column("denoise_s")), batch)
        done = done.append_column("occupied_s", pc.add(shared, done.column("decode_s")))
        sums = [(name, "sum") for name in _SUMS] + [("write_s", "count")]
        yield from done.group_by(_SHAPE).aggregate(sums).to_pylist()


def _label(row: Mapping[str, Any]) -> str:
    request = Request(
        task=row["task"],
        prompt="",
        negative_prompt="",
        seed=0,
        sampler="",
        params=tuple(sorted(json.loads(row["params"] or "{}").items())),
        **{name: row[name] for name in _SHAPE[:6]},
    )
    return label_of(request, family.spec(row["family"]).frames_out(request))


def lines(found: Comparison) -> list[Text | Table]:
    """The comparison as a person reads it."""
    shown: list[Text | Table] = []
    if found.predicted_gpu_hours is not None:
        parts = [f"GPU-hours {_against(found.predicted_gpu_hours, found.actual_gpu_hours, '{:.3g}'.format)}"]
        if found.predicted_cost is not None and found.actual_cost is not None:
            parts.append(f"cost {_against(found.predicted_cost, found.actual_cost, '{:,.2f}'.format)}")
        if found.predicted_bytes is not None and found.actual_bytes is not None:
            parts.append(f"out {_against(found.predicted_bytes, found.actual_bytes, size)}")
        shown.append(Text(f"  so far: {', '.join(parts)}"))
    whole = [f"{found.whole_gpu_hours:.3g} GPU-hours", size(found.whole_bytes)]
    whole += [f"cost {found.whole_cost:,.2f}"] if found.whole_cost is not None else []
    shown.append(Text(f"  in all, as predicted: {', '.join(whole)}; by {found.says}"))
    made = [shape for shape in found.shapes if shape.done]
    if made:
        table = Table("shape", "done", "an item", "its video", box=None, pad_edge=False, padding=(0, 2))
        for shape in made[:MOST_SHOWN]:
            table.add_row(
                Text(shape.shape),
                f"{shape.done:,}/{shape.items:,}",
                _against(shape.predicted_seconds, shape.actual_seconds, seconds),
                _against(shape.predicted_bytes, shape.actual_bytes, size),
            )
        shown.append(table)
    return shown


def _against(predicted: float | None, actual: float | None, write: Any) -> str:
    """4.2 s, predicted 4 s (+5%); from ten times on as a factor, as where an estimate of GPUs meets a CPU."""
    if predicted is None or actual is None:
        return "not predicted" if actual is None else f"{write(actual)}, not predicted"
    if predicted <= 0:
        return f"{write(actual)}, predicted {write(predicted)}"
    ratio = actual / predicted
    share = f"{ratio - 1:+.0%}" if ratio < 10 else f"{ratio:,.0f} times"
    return f"{write(actual)}, predicted {write(predicted)} ({share})"
