"""The driver's compaction of commits into Parquet, so that a resume need not read millions of small objects.

A ledger part is a cache of commits, never the truth: one that is missing costs GETs, and one whose bytes are not those
that its name tells is passed over. Reading the state of a run costs one LIST per thousand commits and one GET per
commit that no part names.
"""

from __future__ import annotations

import hashlib
import io
import re
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
_PART = re.compile(r"(?P<first>\d+)-(?P<last>\d+)-(?P<sha256>[0-9a-f]{12})\.parquet")


def write_part(objects: Objects, records: Sequence[Record]) -> str:
    """Writes one ledger part, named by its content. Returns its path."""
    columns = {name: [getattr(record, name) for record in records] for name in SCHEMA.names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA).sort_by("ordinal"), sink, compression="zstd")
    data = sink.getvalue()
    ordinals = columns["ordinal"]
    name = f"{min(ordinals):012d}-{max(ordinals):012d}-{_digest(data)}"
    path = f"ledger/{name}.parquet"
    with faults.around("ledger part"):
        objects.put(path, data)
    return path


def read_tables(objects: Objects, first: int = 0, last: int | None = None) -> Iterator[pa.Table]:
    """Ledger parts that may hold ordinals `first` to `last` (both included), cut to them."""
    for entry in objects.list("ledger"):
        part = _PART.fullmatch(entry.path.rsplit("/", 1)[-1])
        if part is None or int(part["last"]) < first or (last is not None and int(part["first"]) > last):
            continue
        try:
            data = objects.read(entry.path)
        except FileNotFoundError:
            continue
        if _digest(data) != part["sha256"]:
            continue
        table = pq.read_table(io.BytesIO(data), schema=SCHEMA)
        ordinal = table.column("ordinal")
        keep = pc.greater_equal(ordinal, first)
        if last is not None:
            keep = pc.and_(keep, pc.less_equal(ordinal, last))
        yield table.filter(keep)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def to_records(table: pa.Table) -> list[Record]:
    return [Record.from_dict(row) for row in table.to_pylist()]


def read_commits(objects: Objects, generation: int, item_ids: Iterable[str]) -> Iterator[Record]:
    """Reads commits one GET each, several at a time; one that vanished is passed over."""
    with ThreadPoolExecutor(READERS) as pool:
        for record in pool.map(lambda item_id: commits.read_commit(objects, generation, item_id), item_ids):
            if record is not None:
                yield record
