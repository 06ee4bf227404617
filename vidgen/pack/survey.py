"""The first reading of the rows, before anything is written: counts, statistics, shards, and what is wrong with them.

Reads the manifest, never a video.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vidgen.errors import UserError
from vidgen.pack import cells
from vidgen.pack import names as naming
from vidgen.pack.options import Options
from vidgen.pack.shards import Shard, packed, packed_names, shards
from vidgen.pack.source import Source

REVISION = 1
"""Raised when the same rows and options would give other bytes."""
MOST_DISTINCT = 10_000
"""Values that are told apart; of a column with more is said that there are more."""
VIDEO_FOLDER = (".mp4", ".mkv", ".avi", ".mpeg", ".mov")
"""What the video folders of the datasets library may hold."""
MOST_CELL = 2**31 - 2**20
"""Bytes of one video in a Parquet row group."""
MODEL = ("family", "task", "checkpoint", "checkpoint_hash", "loras")


@dataclass(slots=True)
class Column:
    """Statistics of one packed column. `least` and `most` are of what has an order; `values` are the distinct ones, or
    None where they are more than MOST_DISTINCT or not comparable."""

    type: str
    nulls: int = 0
    least: Any = None
    most: Any = None
    values: set[Any] | None = field(default_factory=set)

    def add(self, column: pa.ChunkedArray) -> None:
        self.nulls += column.null_count
        try:
            ends = {} if pa.types.is_boolean(column.type) else pc.min_max(column).as_py()
            values = pc.unique(column).to_pylist() if self.values is not None else []
            least, most = ends.get("min"), ends.get("max")
            if least is not None and not (isinstance(least, float) and math.isnan(least)):
                self.least = least if self.least is None else min(self.least, least)
                self.most = most if self.most is None else max(self.most, most)
        except (ValueError, OverflowError, KeyError, TypeError, pa.ArrowException):  # nested, or beyond Python's years
            self.values = self.least = self.most = None
            return
        if self.values is not None:
            self.values.update(value for value in values if value is not None)
            if len(self.values) > MOST_DISTINCT:
                self.values = None

    def as_json(self) -> dict[str, Any]:
        distinct = None if self.values is None else len(self.values)
        ends = {"min": cells.plain(self.least), "max": cells.plain(self.most)}
        return {"type": self.type, "nulls": self.nulls, "distinct": distinct, **ends}


@dataclass(slots=True)
class Split:
    """Totals of one split; `seconds` of video."""

    rows: int = 0
    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "videos": self.rows,
            "shards": self.shards,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(slots=True)
class Survey:
    """What a pack will hold. `wanted` is the digest of each shard by name; `features` are the types of columns that
    are written as JSON; `recipe` stands for all that decides a shard's bytes beside its rows, `identity` for the whole
    pack; `models` are videos by the columns MODEL."""

    columns: dict[str, Column]
    features: dict[str, str | None]
    recipe: str
    splits: dict[str, Split]
    left_out: Counter[str] = field(default_factory=Counter)
    wanted: dict[str, str] = field(default_factory=dict)
    models: Counter[tuple[str, ...]] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    identity: str = ""

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.splits.values())

    def checkpoint_hashes(self) -> set[str]:
        return {key[MODEL.index("checkpoint_hash")] for key in self.models}


def survey(source: Source, options: Options) -> Survey:
    """Reads all rows once. UserError if none is selected, if a video does not fit the format, and for names that are
    not safe or not the only one, with their rows."""
    renamed = packed_names(source.schema)
    kinds = {new: str(source.schema.field(name).type) for name, new in renamed.items()}
    pattern = naming.pattern(options.name, source.schema.names) if options.name else None
    found = Survey(
        {name: Column(kind) for name, kind in kinds.items()},
        {new: cells.feature(source.schema.field(name).type) for name, new in renamed.items()},
        _hash({"format": options.format, "name": options.name, "columns": kinds, "revision": REVISION}),
        {name: Split() for name, _ in options.splits},
    )
    given = naming.Names()
    for shard in shards(source, options, found.left_out):
        found.wanted[shard.name] = shard.digest()
        _add(found, shard, renamed)
        if pattern is not None:
            for _ in _named(shard, pattern, given):
                pass
    if not found.rows:
        left = ", ".join(f"{count} {why}" for why, count in found.left_out.items() if count)
        raise UserError(f"{source.objects.url}: there is no video to pack ({left or 'no rows'})")
    _check_format(found, options)
    if pattern is not None:
        _check_names(source, options, pattern, given)
    found.identity = _hash({"options": options.as_json(), "recipe": found.recipe, "shards": found.wanted})
    return found


def _add(found: Survey, shard: Shard, renamed: dict[str, str]) -> None:
    split = found.splits[shard.split]
    split.rows += shard.rows.num_rows
    split.shards += 1
    split.bytes += shard.bytes
    frames, fps = (shard.rows.column(name).to_pylist() for name in ("num_frames", "fps"))
    split.seconds += math.fsum(count / rate for count, rate in zip(frames, fps, strict=True) if count and rate)
    for name, column in zip(renamed.values(), packed(shard.rows, renamed).columns, strict=True):
        found.columns[name].add(column)
    found.models.update(zip(*(map(str, shard.rows.column(name).to_pylist()) for name in MODEL), strict=True))
    found.extensions.update(PurePosixPath(path).suffix for path in shard.rows.column("video").to_pylist())


def _check_format(found: Survey, options: Options) -> None:
    wrong = sorted(suffix for suffix in found.extensions if suffix not in VIDEO_FOLDER)
    if options.format == "hf" and wrong:
        raise UserError(
            f"--format hf: the videos are {', '.join(wrong)}, and a video folder of the datasets library takes "
            f"{', '.join(VIDEO_FOLDER)}; webdataset, parquet and folder take any"
        )
    largest = found.columns["bytes"].most or 0
    if options.format == "parquet" and largest > MOST_CELL:
        raise UserError(f"--format parquet: the largest video has {largest:,} bytes, and a cell holds {MOST_CELL:,}")


def _named(
    shard: Shard, pattern: naming.Pattern, given: naming.Names | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Path below the pack and row, of each row whose name is safe; `given` takes the names, and what is wrong."""
    columns = list(dict.fromkeys(["video", "row_id", "sample", *pattern.columns]))
    for row in shard.rows.select(columns).to_pylist():
        try:
            name = pattern.fill(row)
        except UserError as error:
            if given is not None:
                given.refuse(row, str(error))
            continue
        path = f"{shard.split}/{name}"  # two splits are two folders, or there is only one
        if given is not None:
            given.add(path)
        yield path, row


def _check_names(source: Source, options: Options, pattern: naming.Pattern, given: naming.Names) -> None:
    if given.refused:
        listed = "\n".join(f"  {text}" for text in given.problems)
        more = f"\n  ... and {given.refused - len(given.problems)} more" if given.refused > len(given.problems) else ""
        raise UserError(f"--name: {given.refused} rows have no safe name by {pattern.text!r}:\n{listed}{more}")
    suspects = given.suspects()
    if not suspects:
        return
    named = (pair for shard in shards(source, options) for pair in _named(shard, pattern))
    if found := naming.collisions(named, suspects):
        listed = "\n".join(f"  {text}" for text in found)
        raise UserError(
            f"--name: {pattern.text!r} gives several videos one name; {{item_id}} or {{sample}} in it tells them "
            f"apart:\n{listed}"
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
