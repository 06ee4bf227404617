"""Which row is which: ids from a column, checked for duplicates, or content hashes with occurrence numbers.

Both need to know of rows far apart, so each looks at the whole dataset once, ahead of planning, and keeps eight bytes a
row. Refuses to know what becomes of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from vidgen.plan import cells
from vidgen.plan.cells import Cells
from vidgen.plan.rows import RowPlanner
from vidgen.prompts import Rows

SHOWN_PLACES = 3
"""Places named of an id that stands more than once."""


class Ids(Protocol):
    def __call__(self, rows: Rows, found: Cells) -> list[str | None]:
        """The id of each row; None, and a reason in `found.faults`, for one that has none."""


def from_column(column: str, selected: Callable[[], Iterator[Rows]]) -> Ids:
    """Ids from a column. Every row of an id that stands more than once among the `selected` rows is rejected: which of
    them is meant is not ours to guess."""
    label = f"id (column {column!r})"
    duplicates = _duplicates(column, selected)

    def ids(rows: Rows, found: Cells) -> list[str | None]:
        faults = found.faults
        texts = _texts(rows, column, label, faults)
        for position, value in enumerate(texts):
            if value is None:
                if position not in faults:
                    faults[position] = [f"{label} is null"]
            elif not value:
                faults.setdefault(position, []).append(f"{label} is empty")
            elif value in duplicates:
                places = ", ".join(duplicates[value])
                reason = f"{label} {value!r} stands in more than one row ({places}); ids must be unique"
                faults.setdefault(position, []).append(reason)
        return texts

    return ids


def from_content(planner: RowPlanner, batches: Iterable[Rows]) -> Ids:
    """Ids that hash a row's generation fields and how many equal rows stand before it; `batches` are all rows from the
    first to the last one that is planned, before any selection."""
    hashes = [_hash64(planner.keys(planner.cells(rows.data))) for rows in batches]
    occurrences = _nth(np.concatenate(hashes or [np.zeros(0, np.uint64)]))
    del hashes
    return lambda rows, found: planner.content_ids(rows, found, occurrences)


def _duplicates(column: str, selected: Callable[[], Iterator[Rows]]) -> Mapping[str, list[str]]:
    """Ids that stand more than once, with their first places. Hashes find the candidates; a second look at those alone
    makes sure."""
    hashes = [_hash64(_keys(_texts(rows, column, "", {}))) for rows in selected()]
    values, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
    suspects = values[counts > 1]
    if not len(suspects):
        return {}
    places: dict[str, list[str]] = {}
    for rows in selected():
        texts = _texts(rows, column, "", {})
        for position in np.flatnonzero(np.isin(_hash64(_keys(texts)), suspects)).tolist():
            if value := texts[position]:
                known = places.setdefault(value, [])
                if len(known) < SHOWN_PLACES:
                    known.append(f"{rows.file}, row {rows.row[position]}")
    return {value: known for value, known in places.items() if len(known) > 1}


def _texts(rows: Rows, column: str, label: str, faults: cells.Faults) -> list[str | None]:
    values = rows.data.column(column)
    if not pt.is_string(values.type):
        values = values.cast(pa.string())
    return cells.strings(values, label, faults)


def _keys(texts: Iterable[str | None]) -> list[bytes]:
    return [(text or "").encode() for text in texts]


def _hash64(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join([sha256(key).digest()[:8] for key in keys]), dtype="<u8")


def _nth(hashes: np.ndarray) -> np.ndarray | None:
    """For each value, how many equal ones stand before it; None if all differ."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    if len(starts) == len(ordered):
        return None
    lengths = np.diff(np.r_[starts, len(ordered)])
    result = np.zeros(len(ordered), dtype=np.uint32)
    result[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return result
