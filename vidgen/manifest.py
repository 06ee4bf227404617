"""The manifest: one row for every planned item and every rejected row, joined from the plan and the commits.

Parts follow the plan's ordinals and hold a plan part each; `_SUCCESS.json` is written last and names them by hash.
Refuses to know who writes it and when.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from vidgen import faults
from vidgen.errors import PlanError
from vidgen.plan.files import part_table, rejected_table, total_rejected
from vidgen.store import commits, ledger
from vidgen.store.objects import Objects
from vidgen.store.ordered import Ordered
from vidgen.store.state import NAMES, State
from vidgen.types import MANIFEST_COLUMNS, Part, Plan, Record

SUCCESS = "_SUCCESS.json"

_FROM_RECORD = {
    "status": pa.string(),
    "video": pa.string(),
    "sha256": pa.string(),
    "bytes": pa.int64(),
    "error_class": pa.string(),
    "error": pa.string(),
    "dtype": pa.string(),
    "batch": pa.int32(),
    "context": pa.int32(),
    "gpu": pa.string(),
    "node": pa.string(),
    "attempt": pa.int32(),
    "generation": pa.int32(),
    "encode_s": pa.float64(),
    "denoise_s": pa.float64(),
    "decode_s": pa.float64(),
    "write_s": pa.float64(),
    "created_at": pa.float64(),
    "vidgen_version": pa.string(),
}
_FROM_PLAN = {
    "item_id": pa.string(),
    "row_id": pa.string(),
    "sample": pa.int32(),
    "prompt": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "num_frames": pa.int32(),
    "fps": pa.float64(),
    "num_inference_steps": pa.int32(),
    "guidance_scale": pa.float64(),
    "sampler": pa.string(),
    "params": pa.string(),
    "tiling": pa.string(),
    "spec_hash": pa.string(),
    "origin_file": pa.string(),
    "origin_row": pa.int64(),
}
_FROM_HEADER = ("family", "task", "checkpoint", "checkpoint_hash", "loras")


def rows(objects: Objects, plans: Sequence[Plan], state: State) -> Iterator[pa.Table]:
    """Manifest-shaped tables, a plan part each, then the rejected rows; for unfinished runs too (status pending)."""
    for _, table in _parts(objects, plans, state):
        yield table


def write(
    objects: Objects,
    plans: Sequence[Plan],
    state: State,
    token: str,
    before_write: Callable[[], None] = lambda: None,
) -> None:
    """Writes every part and then `_SUCCESS.json`, replacing one that no longer matches. Expects the ledger to be
    complete. `before_write` is called before each durable act, and each try of one, and may raise."""
    hashes: dict[str, str] = {}
    for name, table in _parts(objects, plans, state):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        hashes[name] = hashlib.sha256(data).hexdigest()
        before_write()
        with faults.around("manifest part"):
            objects.put(name, data, before_write)
    body = {
        "plan": plans[-1].k,
        "generation": state.generation,
        "counts": {**state.counts(), "rejected": total_rejected(plans)},
        "parts": hashes,
        "token": token,
    }
    before_write()
    data = json.dumps(body, indent=1).encode()
    with faults.around("success"):
        ours = objects.create(SUCCESS, data, token)
    if not ours and not is_valid(objects, plans, state):

        def still() -> bool:
            before_write()
            return not is_valid(objects, plans, state)

        before_write()
        with faults.around("old success"):
            objects.delete(SUCCESS, still)
        with faults.around("new success"):
            objects.create(SUCCESS, data, token)


def is_valid(objects: Objects, plans: Sequence[Plan], state: State) -> bool:
    """Whether `_SUCCESS.json` is of this plan and generation and every part it names is there, byte for byte."""
    try:
        body = json.loads(objects.read(SUCCESS))
        if body["plan"] != plans[-1].k or body["generation"] != state.generation:
            return False
        return all(
            hashlib.sha256(objects.read(name)).hexdigest() == digest for name, digest in body["parts"].items()
        ) and set(body["parts"]) == {name for name, _ in _names(plans)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read(objects: Objects) -> Iterator[pa.Table]:
    """The tables of a finished manifest, in order; FileNotFoundError if `_SUCCESS.json` is not there."""
    for name in json.loads(objects.read(SUCCESS))["parts"]:
        yield pq.read_table(io.BytesIO(objects.read(name)))


def read_parts(objects: Objects, parts: Mapping[str, str], otherwise: str) -> Iterator[pa.Table]:
    """The tables of parts, given as name -> sha256. PlanError, which says `otherwise`, for one that is gone or whose
    bytes are others."""
    for name, digest in parts.items():
        try:
            data = objects.read(name)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise PlanError(f"{objects.url}: {name} is not {otherwise}")
        yield pq.read_table(io.BytesIO(data))


def _names(plans: Sequence[Plan]) -> Iterator[tuple[str, tuple[Plan, Part, bool]]]:
    for plan in plans:
        for part in plan.parts:
            yield f"manifest/part-{part.first:012d}.parquet", (plan, part, True)
    for plan in plans:
        for number, part in enumerate(plan.rejected):
            yield f"manifest/part-rejected-{plan.k}-{number:06d}.parquet", (plan, part, False)


def _parts(objects: Objects, plans: Sequence[Plan], state: State) -> Iterator[tuple[str, pa.Table]]:
    settled = Ordered(objects)
    for name, (plan, part, planned) in _names(plans):
        yield name, (_items(objects, settled, plan, part, state) if planned else _rejected(objects, plan, part))


def _items(objects: Objects, settled: Ordered, plan: Plan, part: Part, state: State) -> pa.Table:
    planned = part_table(objects, part)
    records = _records(objects, settled, part, state, planned.column("item_id").to_pylist())
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for name, kind in _FROM_PLAN.items():
        columns[name] = planned.column(name).cast(kind)
    for name, kind in _FROM_RECORD.items():
        if name == "status":
            codes = state.status[part.first : part.first + part.items]
            columns[name] = pa.array([NAMES[code] for code in codes.tolist()], kind)
        else:
            columns[name] = pa.array([_value(record, name) for record in records], kind)
    return _assemble(plan, columns, planned)


def _records(objects: Objects, settled: Ordered, part: Part, state: State, item_ids: list[str]) -> list[Record | None]:
    """The record that counts of each item of a part: from the ledger, else from the commit itself."""
    records: list[Record | None] = [None] * part.items
    for record in ledger.to_records(settled.between(part.first, part.first + part.items - 1)):
        if record.generation == state.generation_of(record.item_id):
            records[record.ordinal - part.first] = record
    for index, item_id in enumerate(item_ids):
        if records[index] is None and not state.is_pending(part.first + index):
            records[index] = commits.read_commit(objects, state.generation_of(item_id), item_id)
    return records


def _rejected(objects: Objects, plan: Plan, part: Part) -> pa.Table:
    refused = rejected_table(objects, part)
    count = refused.num_rows
    columns = {name: pa.nulls(count, kind) for name, kind in (_FROM_PLAN | _FROM_RECORD).items()}
    columns["status"] = pa.array(["rejected"] * count, pa.string())
    columns["error_class"] = pa.array(["rejected"] * count, pa.string())
    columns["error"] = refused.column("reason")
    for name in ("row_id", "prompt", "origin_file", "origin_row"):
        if name in refused.column_names:
            columns[name] = refused.column(name).cast(_FROM_PLAN[name])
    return _assemble(plan, columns, refused)


def _assemble(plan: Plan, columns: dict[str, pa.Array], source: pa.Table) -> pa.Table:
    count = source.num_rows
    for name in _FROM_HEADER:
        value = json.dumps(plan.config["model"]["loras"]) if name == "loras" else getattr(plan, name)
        columns[name] = pa.array([value] * count, pa.string())
    arrays = [columns[name] for name in MANIFEST_COLUMNS]
    names = list(MANIFEST_COLUMNS)
    for name in plan.carried:
        arrays.append(source.column(name) if name in source.column_names else pa.nulls(count))
        names.append(name)
    return pa.table(arrays, names=names)


def _value(record: Record | None, name: str) -> object:
    value = getattr(record, name) if record is not None else None
    return None if value == "" else value
