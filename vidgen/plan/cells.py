"""Columns of cells to Python values, with a reason for each cell that does not hold what its field takes.

Refuses to know what fields exist. A null cell, and a NaN, is an empty one: None, and no mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from hashlib import sha256

import pyarrow as pa
import pyarrow.types as pt

from vidgen.prompts import texts

Faults = dict[int, list[str]]
"""Reasons by position in the batch."""


MEDIA_WORDS = "text (a path or URL), bytes, or a struct of bytes and path"
"""The types a media column may have."""


@dataclass(frozen=True, slots=True)
class MediaCell:
    """A path or URL as written, or the bytes themselves and their sha256."""

    path: str
    data: bytes | None = None
    digest: str = ""

    @property
    def key(self) -> str:
        """What tells one row from another."""
        return self.path or f"sha256:{self.digest}"


@dataclass(frozen=True, slots=True)
class Cells:
    """The mapped cells of a batch, a list a field, and what is wrong with them; media apart from the other values."""

    values: Mapping[str, list]
    faults: Faults
    media: Mapping[str, list[MediaCell | None]]


def fits(kind: type) -> tuple[Callable[[pa.DataType], bool], str]:
    """(test of a column's type, the allowed types in words) for values of `kind`. Columns of whole numbers with empty
    cells are often stored as floats, and databases store numbers as decimals: those are let through and each cell is
    checked."""
    if kind is str:
        return pt.is_string, "text"
    if kind is bool:
        return pt.is_boolean, "boolean"
    words = "whole numbers" if kind is int else "numbers"
    return lambda found: pt.is_integer(found) or pt.is_floating(found) or pt.is_decimal(found), words


def fits_id(kind: pa.DataType) -> bool:
    """Text, whole numbers, and decimals without a fraction (the 38 digits of databases)."""
    return bool(pt.is_string(kind) or pt.is_integer(kind) or (pt.is_decimal(kind) and kind.scale == 0))


def fits_media(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        whole = "bytes" in parts and _is_bytes(parts["bytes"])
        return whole and ("path" not in parts or _is_text(parts["path"]) or pt.is_null(parts["path"]))
    return _is_text(kind) or _is_bytes(kind)


def media(column: pa.Array, label: str, faults: Faults) -> list[MediaCell | None]:
    """Media cells or None; of a struct the bytes, else its path. An empty path, and no bytes at all, are an empty
    cell."""
    if pt.is_struct(column.type):
        parts = {column.type.field(i).name: part for i, part in enumerate(column.flatten())}
        paths = strings(parts["path"], label, faults) if "path" in parts else [None] * len(column)
        return [_of_struct(*cell) for cell in zip(parts["bytes"].to_pylist(), paths, strict=True)]
    if _is_bytes(column.type):
        return [_of_bytes(data) for data in column.to_pylist()]
    return [MediaCell(path) if path else None for path in strings(column, label, faults)]


def values(column: pa.Array, kind: type, label: str, faults: Faults) -> list:
    """The cells as `kind` or None; what cannot be is None and gets a reason that starts with `label`."""
    if pt.is_null(column.type):
        return [None] * len(column)
    if kind is str:
        return strings(column, label, faults)
    cells = column.to_pylist()
    if kind is bool or (kind is int and pt.is_integer(column.type)):
        return cells
    return [_number(cell, kind, label, faults, position) for position, cell in enumerate(cells)]


def strings(column: pa.Array, label: str, faults: Faults) -> list[str | None]:
    """Text cells or None; a cell that is not valid UTF-8 is None and gets a reason."""
    if pt.is_null(column.type):
        return [None] * len(column)
    found, broken = texts(column)
    for position in broken:
        faults.setdefault(position, []).append(f"{label} is not valid UTF-8")
    return found


def _of_struct(data: bytes | None, path: str | None) -> MediaCell | None:
    return MediaCell(path) if path and not data else _of_bytes(data)


def _of_bytes(data: bytes | None) -> MediaCell | None:
    return MediaCell("", data, sha256(data).hexdigest()) if data else None


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pt.is_binary, pt.is_large_binary, pt.is_fixed_size_binary, pt.is_binary_view, pt.is_null)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def _number(
    cell: int | float | Decimal | None, kind: type, label: str, faults: Faults, position: int
) -> int | float | None:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if math.isinf(cell):
        faults.setdefault(position, []).append(f"{label} is {cell}; allowed: finite numbers")
        return None
    if kind is int and int(cell) != cell:
        faults.setdefault(position, []).append(f"{label} is {cell}; allowed: whole numbers")
        return None
    number: int | float = kind(cell)
    return number
