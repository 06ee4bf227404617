"""Rows of a dataset, streamed in batches that stay small: `where`, `limit`, and each file's columns in one type.

Refuses to know how the files were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from vidgen.conditioning.cells import BUFFER_BYTES, batch_rows
from vidgen.conditioning.limits import CELL_BATCH_BYTES, CELL_BATCH_ROWS
from vidgen.errors import PlanError
from vidgen.prompts.columns import cast, holds_binary, plain
from vidgen.prompts.dataset import DAMAGE, Dataset, SourceFile, unreadable

BATCH_ROWS = 16_384
BATCH_BYTES = 64 * 2**20
"""About what a batch of text may take, by its average row: prompts of a megabyte come a few dozen at a time."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one file, by its name and its URL. `row` is each one's number in the file and `index` in the whole
    dataset, both from 0."""

    file: str
    url: str
    row: np.ndarray
    index: np.ndarray
    data: pa.RecordBatch


def read(dataset: Dataset, columns: Sequence[str]) -> Iterator[Rows]:
    """All rows, in batches of at most BATCH_ROWS, with these columns in the dataset's types (null where a file has
    no such column)."""
    schema = pa.schema([dataset.schema.field(name) for name in dict.fromkeys(columns)])
    start = 0
    for file in dataset.files:
        there = set(file.schema.names)
        own = [name for name in schema.names if name in there]
        done = 0
        for batch in _batches(dataset, file, own):
            row = np.arange(done, done + batch.num_rows, dtype=np.int64)
            yield Rows(file.name, file.url, row, row + start, _conform(batch, file, schema))
            done += batch.num_rows
        if done != file.rows:
            raise PlanError(f"{file.name}: damaged: its footer says {file.rows:,} rows, and there are {done:,}")
        start += file.rows


def select(
    batches: Iterator[Rows], condition: pc.Expression | None, limit: int | None, keep: Sequence[str]
) -> Iterator[Rows]:
    """The rows where `condition` is true, at most `limit` of them in all, with the columns `keep`."""
    left = limit
    for rows in batches:
        if left == 0:
            return
        data, row, index = rows.data, rows.row, rows.index
        if condition is not None:
            chosen = _chosen(rows, condition)
            data, row, index = data.take(pa.array(chosen)), row[chosen], index[chosen]
        if left is not None:
            data, row, index = data.slice(0, left), row[:left], index[:left]
            left -= len(row)
        if len(row):
            yield Rows(rows.file, rows.url, row, index, data.select(list(dict.fromkeys(keep))))


def count_chosen(rows: Rows, condition: pc.Expression | None) -> int:
    """How many rows of a batch `condition` selects."""
    return len(rows.row) if condition is None else len(_chosen(rows, condition))


def _chosen(rows: Rows, condition: pc.Expression) -> np.ndarray:
    numbers = pa.array(np.arange(len(rows.row), dtype=np.int64))
    number = max(rows.data.schema.names, key=len, default="") + "#"  # a name that no column has
    table = pa.Table.from_batches([rows.data]).append_column(number, numbers)
    try:
        return np.asarray(table.filter(condition).columns[-1].to_numpy())
    except pa.ArrowException as error:
        raise PlanError(f"dataset.where: {error} ({rows.file})") from error


def _batches(dataset: Dataset, file: SourceFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of a file, of few rows where the columns hold bytes; where none of its own columns are wanted, batches of
    another one, for their length."""
    wanted = columns or file.schema.names[:1]
    binary = any(holds_binary(plain(file.schema.field(name).type)) for name in wanted)
    how: dict[str, Any] = {"buffer_size": BUFFER_BYTES, "pre_buffer": False} if binary else {}
    most = (CELL_BATCH_BYTES, CELL_BATCH_ROWS) if binary else (BATCH_BYTES, BATCH_ROWS)
    try:
        with (
            dataset.fs.open(file.path, "rb") as handle,
            pq.ParquetFile(handle, page_checksum_verification=True, **how) as parquet,
        ):
            if parquet.metadata.num_rows != file.rows:
                raise PlanError(f"{file.name}: changed while it was being read")
            batches = parquet.iter_batches(batch_size=batch_rows(parquet.metadata, *most), columns=wanted)
            yield from _joined(batches, *most)
    except PlanError:
        raise
    except DAMAGE as error:
        raise unreadable(file.name, error) from error


def _joined(batches: Iterator[pa.RecordBatch], most_bytes: int, most_rows: int) -> Iterator[pa.RecordBatch]:
    """Neighbouring batches as one, as long as it stays within the limits: where other columns are large, few rows come
    at a time."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if held and (rows + batch.num_rows > most_rows or size + batch.nbytes > most_bytes):
            yield from _one(held)
            held, rows, size = [], 0, 0
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
    yield from _one(held)


def _one(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    if len(batches) < 2:
        return batches
    joined: list[pa.RecordBatch] = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return joined


def _conform(batch: pa.RecordBatch, file: SourceFile, schema: pa.Schema) -> pa.RecordBatch:
    partitions, own = dict(file.partitions), set(file.schema.names)
    arrays = []
    for field in schema:
        if field.name in own:
            try:
                array = cast(batch.column(field.name), field.type)
            except pa.ArrowException as error:
                raise PlanError(f"{file.name}: column {field.name!r} does not become {field.type}: {error}") from error
        elif (value := partitions.get(field.name)) is not None:
            cell = int(value) if pt.is_integer(field.type) else value
            array = pa.repeat(pa.scalar(cell, field.type), batch.num_rows)
        else:
            array = pa.nulls(batch.num_rows, field.type)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
