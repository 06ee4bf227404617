"""Cells of a table as JSON knows values, and what a reader of that JSON must be told of their types.

Refuses to know what the cells mean.
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa


def row(table: pa.Table) -> dict[str, Any]:
    """The cells of a table of one row, by column."""
    return {name: cell(column[0]) for name, column in zip(table.column_names, table.columns, strict=True)}


def cell(scalar: pa.Scalar) -> Any:
    """What `plain` makes of the value; of one that Python has no value for, what Arrow writes for it."""
    try:
        return plain(scalar.as_py())
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        return str(scalar)


def plain(value: Any) -> Any:
    """A number that is not finite is null; times and decimals are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def feature(kind: pa.DataType) -> str | None:
    """The dtype of the datasets library for what `cell` writes; None for nested values, which it must find out."""
    if pa.types.is_nested(kind):
        return None
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind):
        return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return "string"
