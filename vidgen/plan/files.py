"""The frozen plan as files: `plan/{k}/PLAN.json`, its parts of items, its parts of rejected rows.

Writes and reads them; refuses to know how a plan is made. A part is Parquet: one row an item, every request field
resolved, then the carried input columns. PLAN.json is created last, so a plan is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vidgen import faults
from vidgen.config import JobConfig, to_dict
from vidgen.errors import ConfigError, PlanError
from vidgen.family import spec as family_spec
from vidgen.plan.frozen import frozen_differences
from vidgen.types import MEDIA_FIELDS, Item, Media, Part, Plan, Request

PART_ITEMS = 32_768
PLAN_JSON = "PLAN.json"
MEDIA_TYPE = pa.struct([("url", pa.string()), ("digest", pa.string())])
ITEM_SCHEMA = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("item_id", pa.string()),
        ("row_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("image", MEDIA_TYPE),
        ("last_image", MEDIA_TYPE),
        ("video", MEDIA_TYPE),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("sampler", pa.string()),
        ("shift", pa.float64()),
        ("sigmas", pa.string()),
        ("timesteps", pa.string()),
        ("tiling", pa.string()),
        ("params", pa.string()),
        ("resize", pa.string()),
        ("request_hash", pa.string()),
        ("spec_hash", pa.string()),
        ("batch_key", pa.string()),
        ("tokens", pa.int64()),
        ("flops", pa.float64()),
        ("priority", pa.int32()),
        ("origin_file", pa.string()),
        ("origin_row", pa.int64()),
    ]
)
"""Columns of a part, before the carried ones; sigmas, timesteps, tiling and params are JSON (null: none).
Conditioning media are places and digests, never bytes."""
REJECTED_SCHEMA = pa.schema(
    [
        ("origin_file", pa.string()),
        ("origin_row", pa.int64()),
        ("row_id", pa.string()),
        ("variant", pa.string()),
        ("reason", pa.string()),
        ("prompt", pa.string()),
    ]
)
"""Columns of a rejected part, before the carried ones; `variant` is JSON where a sweep makes several."""
_UNIQUE = ("ordinal", "item_id", "row_id", "seed", "request_hash", "prompt", "origin_row")
"""Columns whose values hardly repeat: a dictionary would only cost time."""


class Objects(Protocol):
    """What a plan needs of a store; `vidgen.store.objects.Objects` is one."""

    @property
    def url(self) -> str: ...
    def create(self, path: str, data: bytes, token: str) -> bool: ...
    def put(self, path: str, data: bytes) -> None: ...
    def read(self, path: str) -> bytes: ...
    def list(self, prefix: str) -> Iterable[Any]: ...


# ---------------------------------------------------------------- reading


def read_plan(objects: Objects) -> list[Plan]:
    """Every frozen plan of a run, k = 0, 1, ...; [] if there is none. The run's plan is their union."""
    names = sorted(entry.path for entry in objects.list("plan") if entry.path.endswith(f"/{PLAN_JSON}"))
    return sorted((_read(objects, name) for name in names), key=lambda plan: plan.k)


def _read(objects: Objects, name: str) -> Plan:
    try:
        return _plan(json.loads(objects.read(name)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{objects.url}: {name} is not a whole plan; restore the object") from error


def require_plan(objects: Objects) -> list[Plan]:
    """`read_plan`, of a run that must be there; PlanError if it is not."""
    plans = read_plan(objects)
    if not plans:
        raise PlanError(f"{objects.url}: no plan/0/PLAN.json, so there is no run here{_instead(objects)}")
    return plans


def _instead(objects: Objects) -> str:
    """What lies there in place of a run, if something like one does."""
    runs = [entry.path for entry in objects.list("runs/0/plan") if entry.path.endswith(f"0/{PLAN_JSON}")]
    if runs:
        url = objects.url.rstrip("/")
        return f", but a schedule: name one of its runs, {url}/runs/0 and so on; `vidgen status {url}` tells of all"
    if any(True for _ in objects.list("plan")):
        return " yet: a plan is being made, or was not made to its end (`vidgen generate CONFIG` makes it)"
    return ""


def total_items(plans: Iterable[Plan]) -> int:
    """Items of all plans of a run."""
    return sum(part.items for plan in plans for part in plan.parts)


def total_rejected(plans: Iterable[Plan]) -> int:
    """Rejected rows of all plans of a run."""
    return sum(plan.counts["rejected"] for plan in plans)


def part_table(objects: Objects, part: Part, columns: list[str] | None = None) -> pa.Table:
    """The items of one part, with their carried columns, or these `columns` of them; PlanError if its bytes are not
    those the plan lists."""
    data = objects.read(part.name)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise PlanError(f"{part.name}: its bytes are not those the plan lists (sha256 differs); restore the object")
    return pq.read_table(io.BytesIO(data), columns=columns)


def rejected_table(objects: Objects, part: Part) -> pa.Table:
    """The rejected rows of one part, with their carried columns."""
    return part_table(objects, part)


def read_items(objects: Objects, plan: Plan, part: Part) -> Iterator[Item]:
    """The items of one part of `plan`, by ordinal."""
    return items_of(plan, part_table(objects, part))


def items_of(plan: Plan, table: pa.Table) -> Iterator[Item]:
    """The items of some rows of a part."""
    for name in (*MEDIA_FIELDS, "resize"):
        if name not in table.schema.names:  # planned before there were media
            column = pa.nulls(table.num_rows, MEDIA_TYPE) if name != "resize" else pa.array(["exact"] * table.num_rows)
            table = table.append_column(name, column)
    table = table.select(ITEM_SCHEMA.names)
    shapes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for batch in table.to_batches(max_chunksize=4096):
        columns = [
            [None] * batch.num_rows
            if batch.column(name).null_count == batch.num_rows
            else batch.column(name).to_pylist()
            for name in ITEM_SCHEMA.names
        ]
        for values in zip(*columns, strict=True):
            yield _item(values, plan.task, shapes)


def rejected_reasons(objects: Objects, plans: Iterable[Plan], most: int = 1000) -> dict[str, int]:
    """How often each reason stands in the rejected parts, the most frequent first, at most `most` of them."""
    counts: dict[str, int] = {}
    for plan in plans:
        for part in plan.rejected:
            for reason in rejected_table(objects, part).column("reason").to_pylist():
                counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda entry: -entry[1])[:most])


def check_resume(plans: Sequence[Plan], config: JobConfig, extend: bool = False) -> None:
    """Refuses a configuration that differs from the frozen one in a frozen key, and a family whose pixels changed.

    Raises ConfigError with both values; the same with `extend`, which lets some dataset keys differ.
    """
    last = plans[-1]
    revision = family_spec(last.family).REVISION
    if revision != last.spec_revision:
        raise ConfigError(
            f"this run was planned by vidgen {last.vidgen_version} with {last.family} at revision "
            f"{last.spec_revision}; here it is {revision} and makes other pixels. Finish it with vidgen "
            f"{last.vidgen_version}, or plan anew into another output.path"
        )
    if found := frozen_differences(last.config, to_dict(config), extend, last.resolved):
        listed = "\n".join(f"  {line}" for line in found)
        hint = "--extend takes no other change" if extend else "use another output.path, or the frozen values"
        raise ConfigError(f"the frozen plan differs from the configuration; {hint}:\n{listed}")


def _plan(values: Mapping[str, Any]) -> Plan:
    parts = {name: tuple(Part(**part) for part in values[name]) for name in ("parts", "rejected")}
    rest = {name: value for name, value in values.items() if name in Plan.__slots__ and name not in parts}
    return Plan(**{**rest, **parts, "carried": tuple(values["carried"])})


_FIRST_SHAPE = ITEM_SCHEMA.names.index("height")
_AFTER_SHAPE = ITEM_SCHEMA.names.index("request_hash")


def _item(values: tuple[Any, ...], task: str, shapes: dict[tuple[Any, ...], dict[str, Any]]) -> Item:
    key = values[_FIRST_SHAPE:_AFTER_SHAPE]
    shape = shapes.get(key)
    if shape is None:
        shape = shapes[key] = _shape_fields(dict(zip(ITEM_SCHEMA.names[_FIRST_SHAPE:_AFTER_SHAPE], key, strict=True)))
    ordinal, item_id, row_id, sample, prompt, negative, seed, *media = values[:_FIRST_SHAPE]
    if any(media):
        shape = {**shape, **{name: Media(**m) for name, m in zip(MEDIA_FIELDS, media, strict=True) if m is not None}}
    request = Request(task=task, prompt=prompt, negative_prompt=negative, seed=seed, **shape)
    return Item(ordinal, item_id, row_id, sample, request, *values[_AFTER_SHAPE:])


def _shape_fields(columns: dict[str, Any]) -> dict[str, Any]:
    for name in ("sigmas", "timesteps", "tiling"):
        columns[name] = None if columns[name] is None else tuple(json.loads(columns[name]))
    columns["params"] = tuple(json.loads(columns["params"]).items())
    return columns


# ---------------------------------------------------------------- writing


class PartWriter:
    """Gathers tables of one schema and writes them as parts of `PART_ITEMS` rows, named by number and hash."""

    def __init__(self, objects: Objects, k: int, kind: str, first: int, schema: pa.Schema) -> None:
        self.objects, self.prefix, self.first, self.schema = objects, f"plan/{k}/{kind}", first, schema
        self.parts: list[Part] = []
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self._repeating = [name for name in schema.names if name not in _UNIQUE]

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += table.num_rows
        while self._rows >= PART_ITEMS:
            self._write(PART_ITEMS)

    def close(self) -> tuple[Part, ...]:
        """Writes what is left; the parts, in order."""
        if self._rows:
            self._write(self._rows)
        return tuple(self.parts)

    def _write(self, rows: int) -> None:
        table = pa.concat_tables(self._waiting)
        self._waiting = [table.slice(rows)]
        self._rows -= rows
        sink = io.BytesIO()
        pq.write_table(
            table.slice(0, rows), sink, compression="zstd", compression_level=1, use_dictionary=self._repeating
        )
        data = sink.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        name = f"{self.prefix}-{len(self.parts):06d}-{digest[:12]}.parquet"
        with faults.around("plan part"):
            self.objects.put(name, data)
        self.parts.append(Part(name, digest, rows, self.first))
        self.first += rows


def freeze(objects: Objects, plan: Plan, token: str) -> bool:
    """Creates PLAN.json. True if this plan is now the run's k-th, False if another was there first."""
    body = {**asdict(plan), "token": token}
    with faults.around("plan"):
        return objects.create(f"plan/{plan.k}/{PLAN_JSON}", json.dumps(body, indent=1).encode(), token)
