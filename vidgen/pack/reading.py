"""Videos, several at a time and in order, each held against the sha256 that the manifest has of it.

What is under way is bounded in bytes. Refuses to know where they go.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vidgen.errors import DamagedError
from vidgen.pack.source import Source

READERS = 8
MOST_BYTES = 256_000_000
"""Bytes of video under way at once, one larger video excepted."""
T = TypeVar("T")
Row = Mapping[str, Any]


def read(source: Source, row: Row) -> bytes:
    """The bytes of a row's video; DamagedError if they are not those of the manifest."""
    what = f"item {row['item_id']} (row {row['row_id']!r}, sample {row['sample']}): {row['video']}"
    try:
        data = source.objects.read(row["video"])
    except FileNotFoundError:
        raise DamagedError(f"{what} is not there; {source.missing}") from None
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DamagedError(f"{what} is not the video of the manifest (sha256 differs); {source.missing}")
    return data


def ahead(act: Callable[[Row], T], rows: Iterable[Row]) -> Iterator[tuple[Row, T]]:
    """Each row with what `act` gives for it, in order, while READERS threads work on those that follow. The rows'
    `bytes` count as held until their result is taken."""
    waiting: deque[tuple[Row, Future[T]]] = deque()
    held = 0
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for row in rows:
                while waiting and (len(waiting) >= 2 * READERS or held + row["bytes"] > MOST_BYTES):
                    first, result = waiting.popleft()
                    held -= first["bytes"]
                    yield first, result.result()
                waiting.append((row, pool.submit(act, row)))
                held += row["bytes"]
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
