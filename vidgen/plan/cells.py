"""Columns of cells to Python values, with a reason for each cell that does not hold what its field takes.

Refuses to know what fields exist. A null cell, and a NaN, is an empty one: None, and no mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from vidgen.prompts import texts

Faults = dict[int, list[str]]
"""Reasons by position in the batch."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The mapped cells of a batch, a list a field, and what is wrong with them."""

    values: Mapping[str, list]
    faults: Faults


def fits(kind: type) -> tuple[Callable[[pa.DataType], bool], str]:
    """(test of a column's type, the allowed types in words) for values of `kind`. Columns of whole numbers with empty
    cells are often stored as floats, so those are let through and each cell is checked."""
    if kind is str:
        return pt.is_string, "text"
    if kind is bool:
        return pt.is_boolean, "boolean"
    words = "whole numbers" if kind is int else "numbers"
    return lambda found: pt.is_integer(found) or pt.is_floating(found), words


def fits_id(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_integer(kind))


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


def _number(cell: int | float | None, kind: type, label: str, faults: Faults, position: int) -> int | float | None:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if math.isinf(cell):
        faults.setdefault(position, []).append(f"{label} is {cell}; allowed: finite numbers")
        return None
    if kind is int and int(cell) != cell:
        faults.setdefault(position, []).append(f"{label} is {cell!r}; allowed: whole numbers")
        return None
    number: int | float = kind(cell)
    return number
