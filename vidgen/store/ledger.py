"""The driver's compaction of commits into Parquet, so that a resume need not read millions of small objects.

A ledger part is a cache of commits, never the truth: one that is missing costs GETs and one that is damaged is passed
over. Reading the state of a run costs one LIST per thousand commits and one GET per commit that no part names.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidgen import faults
from vidgen.store import commits
from vidgen.store.objects import Objects
from vidgen.types import Record

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64()}
SCHEMA = pa.schema([(f.name, _ARROW[get_type_hints(Record)[f.name]]) for f in fields(Record)])
READERS = 16


def write_part(objects: Objects, records: Sequence[Record]) -> str:
    """Writes one ledger part, named by its content. Returns its path."""
    columns = {name: [getattr(record, name) for record in records] for name in SCHEMA.names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA).sort_by("ordinal"), sink, compression="zstd")
    data = sink.getvalue()
    ordinals = columns["ordinal"]
    name = f"{min(ordinals):012d}-{max(ordinals):012d}-{hashlib.sha256(data).hexdigest()[:12]}"
    path = f"ledger/{name}.parquet"
    with faults.around("ledger part"):
        objects.put(path, data)
    return path


def read_tables(objects: Objects, first: int = 0, last: int | None = None) -> Iterator[pa.Table]:
    """Ledger parts that may hold ordinals `first` to `last` (both included), cut to them."""
    for entry in objects.list("ledger"):
        name = entry.path.rsplit("/", 1)[-1]
        low, high, _ = name.split("-")
        if int(high) < first or (last is not None and int(low) > last):
            continue
        try:
            table = pq.read_table(io.BytesIO(objects.read(entry.path)), schema=SCHEMA)
        except (pa.ArrowInvalid, FileNotFoundError):
            continue
        ordinal = table.column("ordinal")
        keep = pc.greater_equal(ordinal, first)
        if last is not None:
            keep = pc.and_(keep, pc.less_equal(ordinal, last))
        yield table.filter(keep)


def to_records(table: pa.Table) -> list[Record]:
    return [Record.from_dict(row) for row in table.to_pylist()]


def read_commits(objects: Objects, generation: int, item_ids: Iterable[str]) -> Iterator[Record]:
    """Reads commits one GET each, several at a time; one that vanished is passed over."""
    with ThreadPoolExecutor(READERS) as pool:
        for record in pool.map(lambda item_id: commits.read_commit(objects, generation, item_id), item_ids):
            if record is not None:
                yield record
