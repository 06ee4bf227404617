"""Bytes that stand in a Parquet cell, read again when they are wanted: one cursor a file and column walks through a row
group, so that neighbouring rows cost one pass, and no more than a few cells are held. (A page of Parquet is read whole:
who writes a thousand cells into one page makes every reader hold them.)

Refuses to know what the bytes are. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from vidgen.conditioning.limits import CELL_BATCH_BYTES, CELL_BATCH_ROWS
from vidgen.conditioning.places import parse_cell, shown
from vidgen.errors import ItemError

CURSORS = 4
"""Files held open, the least recently used closing first."""
BUFFER_BYTES = 1 << 20
"""Read ahead of a column; without it, or with its default of `pre_buffer`, pyarrow reads a column's whole part of a row
group at once."""


def read_cell(url: str, most: int) -> bytes:
    """The bytes in the cell at `url` (`places.cell_url`), of a binary column or the `bytes` of a struct; ItemError if
    they are gone, or more than `most`."""
    file, row, column = parse_cell(url)
    with _lock:
        try:
            with ExitStack() as on_error:  # a cursor that failed is not used again
                cursor = _cursors.pop((file, column), None) or _Cursor(file, column)
                on_error.callback(cursor.close)
                data = cursor.cell(row)
                on_error.pop_all()
        except (ConnectionError, TimeoutError):
            raise
        except (pa.ArrowException, OSError, EOFError) as error:
            raise ItemError(f"{shown(url)} cannot be read: {error}") from error
        _cursors[file, column] = cursor
        while len(_cursors) > CURSORS:
            _cursors.popitem(last=False)[1].close()
    if not isinstance(data, bytes):
        raise ItemError(f"{shown(url)} holds no bytes any more: the dataset was changed")
    if len(data) > most:
        raise ItemError(f"{shown(url)} has {len(data):,} bytes; allowed: at most {most:,}")
    return data


def forget() -> None:
    """Closes every file; what is wanted next is opened anew."""
    with _lock:
        for cursor in _cursors.values():
            cursor.close()
        _cursors.clear()


def batch_rows(metadata: pq.FileMetaData, most_bytes: int, most_rows: int) -> int:
    """Rows that take about `most_bytes` with all their columns, by the largest average of any row group: 1 to
    `most_rows`. (Asked for the size of one column of a damaged or encrypted file, pyarrow ends the process.)"""
    largest = 0.0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        largest = max(largest, group.total_byte_size / max(1, group.num_rows))
    return most_rows if largest <= 0 else max(1, min(most_rows, int(most_bytes / largest)))


class _Cursor:
    """A Parquet file, open at a row of one column."""

    def __init__(self, file: str, column: str) -> None:
        self._stack = ExitStack()
        self._file = file
        try:
            handle = self._stack.enter_context(fsspec.open(file, "rb"))
            self._parquet = self._stack.enter_context(
                pq.ParquetFile(handle, buffer_size=BUFFER_BYTES, pre_buffer=False)
            )
            schema = self._parquet.schema_arrow
            if column not in schema.names:
                raise ItemError(f"{file}: no column {column!r} any more: the dataset was changed")
        except FileNotFoundError as error:
            raise ItemError(f"{file}: there is no such file any more") from error
        except BaseException:
            self._stack.close()
            raise
        self._leaf = f"{column}.bytes" if pt.is_struct(storage(schema.field(column).type)) else column
        metadata = self._parquet.metadata
        self._step = batch_rows(metadata, CELL_BATCH_BYTES, CELL_BATCH_ROWS)
        self._starts = [0]
        for index in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(index).num_rows)
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first, self._held = 0, pa.array([], pa.binary())

    def cell(self, row: int) -> Any:
        """The cell at `row` of the file; ItemError if there is no such row."""
        if not 0 <= row < self._starts[-1]:
            raise ItemError(f"{self._file}: no row {row} any more: the dataset was changed")
        group = next(index for index in range(len(self._starts) - 1) if row < self._starts[index + 1])
        if group != self._group or row < self._first:
            self._group, self._first, self._held = group, self._starts[group], self._held[:0]
            self._batches = self._parquet.iter_batches(
                self._step, row_groups=[group], columns=[self._leaf], use_threads=False
            )
        while row >= self._first + len(self._held):
            self._first += len(self._held)
            self._held = next(self._batches).column(0)
        value = self._held[row - self._first].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def close(self) -> None:
        self._stack.close()


def storage(kind: pa.DataType) -> pa.DataType:
    """The type that an extension type stores."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


_lock = threading.Lock()
_cursors: OrderedDict[tuple[str, str], _Cursor] = OrderedDict()
