"""Which Parquet files a dataset is, in which order, and the columns they have together: read off names and footers.

Refuses to read a row.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from fsspec.implementations.local import LocalFileSystem

from vidgen.config_rules import nearest
from vidgen.errors import PlanError
from vidgen.prompts.columns import plain

SUFFIXES = (".parquet", ".parq", ".pq")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
FOOTER_THREADS = 8
SIGNATURE_BYTES = 28
"""What follows the description in the footer of a file whose columns, but not whose footer, are encrypted."""
DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError, KeyError, MemoryError)
"""What reading a damaged file raises, somewhere: names that are no text and lengths that nobody has among it."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Parquet file: its name as messages and the manifest show it, the URL (or absolute local path) that opens it
    from anywhere, where the filesystem has it, the values of its partition columns, its rows, its own columns, and a
    digest of its footer (which names every chunk and its size)."""

    name: str
    url: str
    path: str
    partitions: tuple[tuple[str, str | None], ...]
    rows: int
    schema: pa.Schema
    footer: bytes


@dataclass(frozen=True, slots=True)
class Dataset:
    """Files in reading order and the columns they have together, dictionaries decoded, partition columns last. `folder`
    is what relative paths in cells are relative to: a URL, or an absolute local path, that ends with a slash."""

    path: str
    folder: str
    fs: Any
    files: tuple[SourceFile, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        """Of all files, as their footers say."""
        return sum(file.rows for file in self.files)

    @property
    def digest(self) -> str:
        """Of the files' footers, in reading order: another dataset, or one that was written again, has another."""
        return sha256(b"".join(file.footer for file in self.files)).hexdigest()[:32]


def open_dataset(path: str) -> Dataset:
    """Finds the files and reads their footers; PlanError if there are none or one is not Parquet."""
    fs, folder, found = _find(path)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda file: _footer(fs, *file), ((name, where) for name, where, _ in found)))
    known: dict[str, pa.Schema] = {}
    files = []
    for (name, where, partitions), (rows, schema, footer) in zip(found, footers, strict=True):
        schema = known.setdefault(str(schema), schema)
        url = os.path.abspath(where) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(where))
        files.append(SourceFile(name, url, where, partitions, rows, schema, footer))
    return Dataset(path, folder, fs, tuple(files), _unify(files))


def require(dataset: Dataset, column: str, key: str, allowed: str, fits: Callable[[pa.DataType], bool]) -> None:
    """Every file must have `column` in a type that fits; `key` is the configuration key that names it and `allowed`
    the types in words. PlanError names the file, the column and the rule."""
    checked: set[int] = set()
    for file in dataset.files:
        if id(file.schema) in checked or column in dict(file.partitions):
            continue
        checked.add(id(file.schema))
        if column not in file.schema.names:
            names = [*file.schema.names, *dict(file.partitions)]
            raise PlanError(f"{file.name}: no column {column!r} ({key}){nearest(column, names)}")
        kind = file.schema.field(column).type
        if not pt.is_null(kind) and not fits(plain(kind)):
            raise PlanError(f"{file.name}: column {column!r} ({key}) is {kind}; allowed: {allowed}")
    kind = dataset.schema.field(column).type
    if not pt.is_null(kind) and not fits(kind):
        raise PlanError(f"{dataset.path}: partition column {column!r} ({key}) is {kind}; allowed: {allowed}")


_Found = tuple[str, str, tuple[tuple[str, str | None], ...]]


def _find(path: str) -> tuple[Any, str, list[_Found]]:
    """The filesystem, the dataset's folder, and (shown name, path, partitions) of each file, by name."""
    try:
        fs, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
        shown = _shown_by(fs, path)
        place = root if isinstance(fs, LocalFileSystem) else path
        folder = place[: place.rfind("/", 0, re.search(r"[*?[]|$", place).start()) + 1]  # type: ignore[union-attr]
        if fs.isfile(root):
            return fs, folder, [(shown(root), root, ())]
        if fs.isdir(root):
            folder = f"{place.rstrip('/')}/"
            found = fs.find(root, detail=True)
            names = [name for name, info in found.items() if info["type"] == "file" and _is_data(name, root)]
            below = root
        elif any(mark in path for mark in "*?["):
            names = [name for name in fs.glob(root) if fs.isfile(name)]
            below = ""
        else:
            names, below = [], root
    except Exception as error:  # each store's library raises its own
        raise PlanError(f"dataset.path: {path!r} cannot be read: {error}") from error
    if not names:
        if below and fs.exists(root):
            raise PlanError(f"dataset.path: the folder {path!r} has no files ending in {', '.join(SUFFIXES)}")
        beside = f" (relative to {os.getcwd()})" if isinstance(fs, LocalFileSystem) and not os.path.isabs(path) else ""
        raise PlanError(f"dataset.path: {path!r} names no file{beside}")
    for name in names:
        if not _is_utf8(name):
            raise PlanError(f"dataset.path: {path!r} has a file whose name is not UTF-8: {name!r}; rename it")
    return fs, folder, [(shown(name), name, _partitions(name[len(below) :])) for name in sorted(names)]


def _shown_by(fs: Any, path: str) -> Callable[[str], str]:
    """Local files are shown relative if the user wrote a relative path, remote ones as URLs."""
    if not isinstance(fs, LocalFileSystem):
        return lambda name: str(fs.unstrip_protocol(name))
    if "://" in path or os.path.isabs(path):
        return lambda name: name
    return lambda name: os.path.relpath(name).replace(os.sep, "/")


def _is_utf8(name: str) -> bool:
    """False for a name of the disk whose bytes are no text (Python gives lone surrogates for them)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_data(name: str, root: str) -> bool:
    parts = name[len(root) :].strip("/").split("/")
    return parts[-1].lower().endswith(SUFFIXES) and not any(part.startswith(("_", ".")) for part in parts)


def _partitions(path: str) -> tuple[tuple[str, str | None], ...]:
    """`lang=en/year=2024/part.parquet` -> (lang, en), (year, 2024)."""
    found = []
    for part in path.split("/")[:-1]:
        key, equals, value = part.partition("=")
        if equals and key:
            found.append((unquote(key), None if value == NULL_PARTITION else unquote(value)))
    return tuple(found)


def _footer(fs: Any, name: str, path: str) -> tuple[int, pa.Schema, bytes]:
    """Rows, columns and the footer's digest."""
    try:
        with fs.open(path, "rb") as handle:
            with pq.ParquetFile(handle) as file:
                schema: pa.Schema = file.schema_arrow.remove_metadata()
                rows: int = file.metadata.num_rows
                described: int = file.metadata.serialized_size
            handle.seek(-8, os.SEEK_END)  # the length of the footer, then the magic number
            length = int.from_bytes(handle.read(4), "little")
            if length - described == SIGNATURE_BYTES:  # asked for such columns' sizes, pyarrow ends the process
                raise PlanError(f"{name}: has encrypted columns; encrypted Parquet is not read, write it without")
            handle.seek(-8 - length, os.SEEK_END)
            digest = sha256(handle.read(length)).digest()
    except PlanError:
        raise
    except DAMAGE as error:
        raise unreadable(name, error) from error
    if twice := sorted(column for column, count in Counter(schema.names).items() if count > 1):
        raise PlanError(f"{name}: column {twice[0]!r} stands more than once")
    return rows, schema, digest


def unreadable(name: str, error: Exception) -> PlanError:
    """What to say of a file at which reading raised one of DAMAGE."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, FileNotFoundError):
        return PlanError(f"{name}: no such file")
    if "decrypt" in str(error) or "ncrypted" in str(error):
        return PlanError(f"{name}: is encrypted ({reason}); encrypted Parquet is not read, write it without")
    if isinstance(error, NotImplementedError):
        return PlanError(f"{name}: uses what pyarrow cannot read: {reason}")
    return PlanError(f"{name}: not a Parquet file, or a truncated or damaged one: {reason}")


def _unify(files: Sequence[SourceFile]) -> pa.Schema:
    """One type a column over all files: numbers widen, null gives way; anything else is a PlanError naming both."""
    types: dict[str, tuple[pa.DataType, str]] = {}
    seen: set[int] = set()
    for file in files:
        if id(file.schema) in seen:
            continue
        seen.add(id(file.schema))
        for column in file.schema:
            kind = plain(column.type)
            before, where = types.get(column.name, (kind, file.name))
            try:
                merged = pa.unify_schemas(
                    [pa.schema([(column.name, before)]), pa.schema([(column.name, kind)])],
                    promote_options="permissive",
                )
            except pa.ArrowException as error:
                raise PlanError(
                    f"{file.name}: column {column.name!r} is {kind}, but {before} in {where}; one type is needed"
                ) from error
            types[column.name] = (merged.field(0).type, where)
    fields = [pa.field(name, kind) for name, (kind, _) in types.items()]
    return pa.schema([*fields, *_partition_fields(files, types)])


def _partition_fields(files: Sequence[SourceFile], own: Mapping[str, Any]) -> list[pa.Field]:
    """Partition columns that no file has itself: whole numbers if all their values are, else text."""
    values: dict[str, set[str | None]] = {}
    for file in files:
        for key, value in file.partitions:
            if key not in own:
                values.setdefault(key, set()).add(value)
    return [
        pa.field(key, pa.int64() if all(v is None or _is_whole(v) for v in found) else pa.string())
        for key, found in values.items()
    ]


def _is_whole(text: str) -> bool:
    return text.isascii() and text.lstrip("-").isdigit() and len(text) < 19 and str(int(text)) == text
