"""What every kind of store does: seven verbs on whole objects, and telling what its errors mean.

A kind is one class of one file: `local` (disks), `s3`, `azure`, `google`, and `other` (memory and whatever else fsspec
opens). Each verb is one request where the store allows it, tried once: `retry` decides about more. Refuses to know what
the objects are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PART_BYTES = 8 << 20
"""Files of more than two parts are put in parts of this size, a few at a time: memory does not grow with the file."""
PARTS_AT_ONCE = 4
CONNECTIONS = 32
"""Requests that one process may have under way."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object: its path, bytes, modification time by the store's clock (seconds since the epoch)."""

    path: str
    size: int
    mtime: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """What an error of a store means, in words. `again`: another try may succeed; if not, only a person can mend it."""

    words: str
    again: bool


class Kind(Protocol):
    """Whole objects under their full names, as the filesystem has them."""

    def create(self, name: str, data: bytes) -> None:
        """Creates an object by the store's own condition; FileExistsError if there is one, NotImplementedError if the
        store has no such condition."""

    def put(self, name: str, data: bytes) -> None:
        """Writes a whole object, atomically, over whatever is there."""

    def put_file(self, name: str, source: str) -> None:
        """The same from a file of this machine, in bounded memory."""

    def read(self, name: str) -> bytes:
        """All bytes; FileNotFoundError if there is no such object."""

    def head(self, name: str) -> Entry | None:
        """Size and age, by this one request; None if there is no such object."""

    def page(self, folder: str, cursor: str | None) -> tuple[list[Entry], str | None]:
        """The next objects below a folder, at any depth, by name; and where the page after them begins, None if there
        is none."""

    def delete(self, name: str) -> None:
        """Deletes an object; FileNotFoundError, or nothing, if there is none."""

    def diagnose(self, error: Exception) -> Trouble | None:
        """What an error means; None for one that says no more than its class does (FileNotFoundError: no object)."""
