"""Types of columns: which mean the same, how a column becomes another type, and which hold bytes.

Refuses to know files and what a cell means.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.types as pt

from vidgen.conditioning.cells import storage


def holds_binary(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, at any depth."""
    kind = storage(kind)
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind) or pt.is_binary_view(kind):
        return True
    if pt.is_dictionary(kind):
        return holds_binary(kind.value_type)
    return any(holds_binary(kind.field(i).type) for i in range(kind.num_fields))


def texts(column: pa.Array) -> tuple[list[str | None], list[int]]:
    """The strings of a column, and the positions of those that are not valid UTF-8 (None in the list)."""
    try:
        return column.to_pylist(), []
    except UnicodeDecodeError:
        values: list[str | None] = []
        broken = []
        for position, raw in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                values.append(None if raw is None else raw.decode())
            except UnicodeDecodeError:
                values.append(None)
                broken.append(position)
        return values, broken


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without its encoding: dictionaries, extensions and the large and view forms of text; of a UUID its
    text."""
    if pt.is_dictionary(kind):
        return plain(kind.value_type)
    if isinstance(kind, pa.UuidType):
        return pa.string()
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    return kind


def cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column of a file in the dataset's type."""
    if isinstance(array.type, pa.UuidType):
        return pa.array([None if cell is None else str(cell) for cell in array.to_pylist()], kind)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()  # a cast would refuse all of it for one cell that is not UTF-8
    return array if array.type == kind else array.cast(kind)
