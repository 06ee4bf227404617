"""Selected rows, cut into shards: the same rows always into the same shards, a table of the manifest at a time.

What is held is the shard that each split has open. Refuses to know what a shard becomes.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from vidgen import where as grammar
from vidgen.pack.options import Options
from vidgen.pack.source import Source

NOT_SELECTED = "not selected"
"""Done rows that the condition does not select, among what was left out."""
LEFT = ("status", "error_class", "error")
"""Columns that say nothing about a video that is there."""
OWN = ("video", "file_name", "source_video")
"""Columns that the formats have of their own."""
FILE_COLUMN = re.compile(r"file_names?$")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of one split, in the manifest's order, and what their videos weigh together."""

    split: str
    number: int
    rows: pa.Table
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    def digest(self) -> str:
        """A hash of every value of every row."""
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_table(self.rows)
        return hashlib.sha256(sink.getvalue()).hexdigest()


@dataclass(slots=True)
class _Open:
    """A shard that is being filled."""

    number: int = 0
    pieces: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0


def shards(source: Source, options: Options, left_out: Counter[str] | None = None) -> Iterator[Shard]:
    """The shards of all splits, as they fill. `left_out` counts rows by why they are in none: their status, or
    NOT_SELECTED. WhereError for a condition that does not fit the columns."""
    condition = grammar.compile(options.where, source.schema) if options.where else None
    split_of = options.splitter()
    opened = {name: _Open() for name, _ in options.splits}
    for table in source.rows():
        done = table.filter(pc.field("status") == "done")
        chosen = done if condition is None else done.filter(condition)
        if left_out is not None:
            left_out.update(status for status in table.column("status").to_pylist() if status != "done")
            left_out[NOT_SELECTED] += done.num_rows - chosen.num_rows
        places: dict[str, list[int]] = {name: [] for name in opened}
        for index, row_id in enumerate(chosen.column("row_id").to_pylist()):
            places[split_of(row_id)].append(index)
        for split, indices in places.items():
            yield from _fill(split, opened[split], chosen.take(pa.array(indices, pa.int64())), options)
    for split, last in opened.items():
        if last.rows:
            yield _closed(split, last)


def _fill(split: str, shard: _Open, table: pa.Table, options: Options) -> Iterator[Shard]:
    start = 0
    for index, size in enumerate(table.column("bytes").to_pylist()):
        if shard.rows and (shard.bytes + size > options.shard_size or shard.rows >= options.most_rows):
            shard.pieces.append(table.slice(start, index - start))
            yield _closed(split, shard)
            start = index
        shard.rows += 1
        shard.bytes += size
    if start < table.num_rows:
        shard.pieces.append(table.slice(start))


def _closed(split: str, shard: _Open) -> Shard:
    rows = pa.concat_tables(shard.pieces)
    rows = rows.take(pa.array(range(rows.num_rows), pa.int64())).combine_chunks()  # equal values, equal buffers
    closed = Shard(split, shard.number, rows, shard.bytes)
    shard.number, shard.pieces, shard.rows, shard.bytes = shard.number + 1, [], 0, 0
    return closed


def packed_names(schema: pa.Schema) -> dict[str, str]:
    """Manifest column -> its name in the pack. The manifest's `video`, the path below the output, is `source_video`;
    one of the dataset's own that has the name of one of ours becomes `input_<name>`, and `file_name` in a name
    `filename`, since a video folder takes columns that end so for files of its own."""
    taken = {*schema.names, *OWN}
    found: dict[str, str] = {}
    for name in schema.names:
        if name in LEFT:
            continue
        new = "source_video" if name == "video" else name
        if (name in OWN and name != "video") or FILE_COLUMN.search(name):
            new = FILE_COLUMN.sub("filename", name)
            while new in taken:
                new = f"input_{new}"
            taken.add(new)
        found[name] = new
    return found


def packed(rows: pa.Table, names: dict[str, str]) -> pa.Table:
    """The columns that are packed, under the names they have there."""
    return rows.select(list(names)).rename_columns(list(names.values()))
