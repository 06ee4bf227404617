"""Memory, and whatever else fsspec opens (SFTP, WebDAV, HDFS, ...), by what all its filesystems can do.

Create-only is mode="create", which not all of them heed: the probe at start finds out. Listings come whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vidgen.store import retry
from vidgen.store.kind import Entry, Trouble


class Other:
    """Objects of any fsspec filesystem."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def create(self, name: str, data: bytes) -> None:
        self._in_folder(name, lambda: self.fs.pipe_file(name, data, mode="create"))

    def put(self, name: str, data: bytes) -> None:
        self._in_folder(name, lambda: self.fs.pipe_file(name, data))

    def put_file(self, name: str, source: str) -> None:
        self._in_folder(name, lambda: self.fs.put_file(source, name))

    def _in_folder(self, name: str, write: Callable[[], object]) -> None:
        """Some of these filesystems want a folder made before it is written to."""
        try:
            write()
        except FileNotFoundError:
            self.fs.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
            write()

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(name)
        return data

    def head(self, name: str) -> Entry | None:
        self.fs.invalidate_cache()
        try:
            info = self.fs.info(name)
        except FileNotFoundError:
            return None
        return Entry(name, int(info["size"]), _mtime(info)) if info["type"] == "file" else None

    def page(self, folder: str, cursor: str | None) -> tuple[list[Entry], str | None]:
        self.fs.invalidate_cache()
        found = sorted(self.fs.find(folder, detail=True).items())
        return [Entry(name, int(info["size"]), _mtime(info)) for name, info in found], None

    def delete(self, name: str) -> None:
        self.fs.rm_file(name)

    def diagnose(self, error: Exception) -> Trouble | None:
        if isinstance(error, ConnectionError | TimeoutError):
            return retry.unreachable(error)
        return None


def _mtime(info: dict[str, Any]) -> float:
    for key in ("mtime", "modified", "last_modified", "LastModified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if value is not None and hasattr(value, "timestamp"):
            return float(value.timestamp())
    return time.time()
