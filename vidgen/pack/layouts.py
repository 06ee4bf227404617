"""A shard as objects: one tar, one Parquet file, or a folder of files with their metadata. A format is one function.

The same rows give the same bytes. Refuses to know what was written before, and what follows.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vidgen.pack import cells
from vidgen.pack.names import Pattern
from vidgen.pack.reading import Row, ahead, read
from vidgen.pack.shards import Shard, packed
from vidgen.pack.source import Source
from vidgen.store.objects import Objects

GROUP_BYTES = 64_000_000
"""Bytes of video in one row group of a Parquet file: what a reader must take at once."""
VIDEO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""A video in a cell, as the datasets library has it."""
FEATURES = json.dumps({"info": {"features": {"video": {"_type": "Video"}}}})
"""What tells the datasets library so, in the schema's metadata."""


@dataclass(frozen=True, slots=True)
class File:
    """One object of a pack: its path below the pack, bytes and sha256."""

    name: str
    bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Press:
    """What writes shards: where rows and videos come from, where they go, which manifest columns are packed and under
    which names, and of format `folder` the pattern and whether each split has a folder."""

    source: Source
    dest: Objects
    columns: Mapping[str, str]
    pattern: Pattern | None
    is_split: bool

    def write(self, format: str, shard: Shard) -> list[File]:
        """Writes the objects of a shard, over what may be there. DamagedError names a video that is not as the
        manifest has it."""
        return _WRITERS[format](self, shard)

    def rows(self, shard: Shard) -> Iterator[Row]:
        names = list(dict.fromkeys(["item_id", "row_id", "sample", "video", "sha256", "bytes"]))
        yield from shard.rows.select(names + self._pattern_columns(names)).to_pylist()

    def _pattern_columns(self, known: list[str]) -> list[str]:
        return [name for name in dict.fromkeys(self.pattern.columns) if name not in known] if self.pattern else []

    def table(self, shard: Shard) -> pa.Table:
        return packed(shard.rows, dict(self.columns))


def file_name(row: Row) -> str:
    """A video's name where the user gives none: its item and its own extension."""
    return f"{row['item_id']}{PurePosixPath(row['video']).suffix}"


# ---------------------------------------------------------------- one object a shard


def _webdataset(press: Press, shard: Shard) -> list[File]:
    """A tar; of each video its file, its caption and its columns: {item}.mp4, {item}.txt, {item}.json."""
    table = press.table(shard)

    def write(place: Path) -> None:
        with tarfile.open(place, "w", format=tarfile.GNU_FORMAT) as tar:
            for index, (row, data) in enumerate(_videos(press, shard)):
                columns = cells.row(table.slice(index, 1))
                _member(tar, file_name(row), data)
                _member(tar, f"{row['item_id']}.txt", (columns["prompt"] or "").encode())
                _member(tar, f"{row['item_id']}.json", json.dumps(columns, ensure_ascii=False).encode())

    return [_put(press.dest, f"data/{shard.name}.tar", write)]


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # time 0, owner 0, mode 644
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _parquet(press: Press, shard: Shard) -> list[File]:
    """A Parquet file: the columns, and the video as a struct of bytes and file name."""
    table = press.table(shard)
    schema = pa.schema([pa.field("video", VIDEO), *table.schema], metadata={"huggingface": FEATURES})
    flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]

    def write(place: Path) -> None:
        with pq.ParquetWriter(
            place, schema, compression=dict.fromkeys(flat, "zstd"), use_dictionary=flat, write_statistics=flat
        ) as writer:
            group: list[dict[str, Any]] = []
            start = held = 0
            for row, data in _videos(press, shard):
                if group and held + len(data) > GROUP_BYTES:
                    writer.write_table(_group(group, table.slice(start, len(group)), schema))
                    start, group, held = start + len(group), [], 0
                group.append({"bytes": data, "path": file_name(row)})
                held += len(data)
            writer.write_table(_group(group, table.slice(start), schema))

    return [_put(press.dest, f"data/{shard.name}.parquet", write)]


def _group(videos: list[dict[str, Any]], table: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(videos, VIDEO), *table.columns], schema=schema)


def _videos(press: Press, shard: Shard) -> Iterator[tuple[Row, bytes]]:
    return ahead(lambda row: read(press.source, row), press.rows(shard))


def _put(dest: Objects, name: str, write: Callable[[Path], None]) -> File:
    """Has a file written on this machine's disk, hashes it and puts it."""
    with tempfile.TemporaryDirectory(prefix="vidgen-pack-") as folder:
        place = Path(folder) / "shard"
        write(place)
        written = File(name, place.stat().st_size, sha256_of(place))
        dest.put_file(name, place)
    return written


def sha256_of(place: Path) -> str:
    """Of a file on this machine's disk, read a block at a time."""
    digest = hashlib.sha256()
    with place.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- one object a video


def _hf(press: Press, shard: Shard) -> list[File]:
    """A folder of videos and their metadata.parquet, as the library's video folders are."""
    folder = f"data/{shard.split}/{shard.number:06d}"
    return _files(press, shard, folder, file_name, f"{folder}/metadata.parquet")


def _folder(press: Press, shard: Shard) -> list[File]:
    """Files named by the pattern; which is which stands in a table beside the index entry."""
    assert press.pattern is not None, "format folder has a pattern"
    where = shard.split if press.is_split else ""
    return _files(press, shard, where, press.pattern.fill, f"index/{shard.name}.parquet")


def _files(press: Press, shard: Shard, folder: str, name: Callable[[Row], str], listing: str) -> list[File]:
    prefix = f"{folder}/" if folder else ""

    def send(row: Row) -> File:
        data = read(press.source, row)
        press.dest.put(f"{prefix}{name(row)}", data)
        return File(f"{prefix}{name(row)}", len(data), row["sha256"])

    files = [file for _, file in ahead(send, press.rows(shard))]
    within = prefix if listing.startswith(f"{folder}/") else ""
    names = pa.array([file.name.removeprefix(within) for file in files], pa.string())
    sink = io.BytesIO()
    pq.write_table(press.table(shard).add_column(0, "file_name", names), sink, compression="zstd")
    data = sink.getvalue()
    press.dest.put(listing, data)
    return [*files, File(listing, len(data), hashlib.sha256(data).hexdigest())]


_WRITERS: dict[str, Callable[[Press, Shard], list[File]]] = {
    "webdataset": _webdataset,
    "parquet": _parquet,
    "hf": _hf,
    "folder": _folder,
}
