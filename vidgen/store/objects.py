"""Objects under one fsspec URL: atomic whole-object puts, create-only writes, listings without a cache.

The only file that touches a filesystem for outputs. Refuses to know what the objects mean. The same code serves
`file://`, `memory://` and the object stores of fsspec; local files get the atomicity that fsspec does not give them
(temporary file in the same folder, fsync, link or rename).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.errors import ConfigError, InfrastructureError

TEMPORARY = ".tmp-"
"""Prefix of the names under which local files are written before they are published; listings pass over them."""


def new_token() -> str:
    """A name for one writer: what it creates carries this, so that it can recognise its own work."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: path below the store's root, bytes, modification time (seconds since the epoch)."""

    path: str
    size: int
    mtime: float


class Objects:
    """Objects below `url`. Paths are relative, with forward slashes.

    `single_writer` is for a store that ignores the create-only condition: create then means look, put, read back,
    which is only right while one process writes.
    """

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(str(url), **_options(str(url)))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{url!r} cannot be opened as a store: {error}") from error
        self.url = str(url)
        self.root = root.rstrip("/")
        self.single_writer = single_writer
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, path: str) -> str:
        """The filesystem's own name of an object."""
        return f"{self.root}/{path}" if path else self.root

    # ---------------------------------------------------------------- writing

    def create(self, path: str, data: bytes, token: str) -> bool:
        """Creates an object that must not exist yet. True if it now holds our bytes (an earlier, ambiguous attempt of
        ours included: the object is read back and `token` looked for); False if somebody else's is there."""
        assert token.encode() in data, "a create-only object carries its writer's token"
        try:
            if self.single_writer:
                if self.exists(path):
                    raise FileExistsError(path)
                self.put(path, data)
                return self.read(path) == data
            if self.local:
                self._publish(path, data, exclusive=True)
            else:
                self.fs.pipe_file(self.path(path), data, mode="create")
            return True
        except FileExistsError:
            return token.encode() in self.read(path)

    def put(self, path: str, data: bytes) -> None:
        """Writes a whole object, atomically, over whatever is there."""
        if self.local:
            self._publish(path, data, exclusive=False)
        else:
            self.fs.pipe_file(self.path(path), data)

    def put_file(self, path: str, source: str | Path) -> None:
        """Writes a whole object from a local file, atomically, over whatever is there. The file must not be changed
        afterwards: on the same disk the object is the file itself under another name."""
        if not self.local:
            self.fs.put_file(str(source), self.path(path))
            return
        final = self.path(path)
        temporary = self._temporary(final)
        try:
            try:
                os.link(source, temporary)
            except OSError:  # another filesystem, or one without links
                shutil.copyfile(source, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)
        finally:
            _unlink(temporary)  # still there after an error, or where both names were the same file already

    def delete(self, path: str) -> None:
        """Deletes an object; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(path))

    def _publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        final = self.path(path)
        temporary = self._temporary(final)
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if exclusive:
                os.link(temporary, final)
            else:
                os.replace(temporary, final)
        finally:
            _unlink(temporary)

    def _temporary(self, final: str) -> str:
        folder, name = os.path.split(final)
        os.makedirs(folder, exist_ok=True)
        return f"{folder}/{TEMPORARY}{secrets.token_hex(8)}-{name}"

    # ---------------------------------------------------------------- reading

    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError if there is none."""
        if self.local:
            with open(self.path(path), "rb") as file:
                return file.read()
        data: bytes = self.fs.cat_file(self.path(path))
        return data

    def exists(self, path: str) -> bool:
        if self.local:
            return os.path.exists(self.path(path))
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(path)))

    def size(self, path: str) -> int | None:
        """Bytes of the object, or None if there is none."""
        try:
            self.fs.invalidate_cache()
            return int(self.fs.info(self.path(path))["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects below the folder `prefix`, at any depth, sorted by path within what the store lists."""
        if self.local:
            yield from _walk(self.path(prefix), prefix.rstrip("/"))
            return
        self.fs.invalidate_cache()
        cut = len(self.root) + 1
        for name, info in sorted(self.fs.find(self.path(prefix), detail=True).items()):
            yield Entry(name[cut:] if name.startswith(self.root) else name, int(info["size"]), _mtime(info))

    def sweep_temporaries(self, prefix: str, older_than: float) -> int:
        """Removes what writers that died left half-written on a local disk; returns how many."""
        if not self.local:
            return 0
        removed = 0
        for folder, _, names in os.walk(self.path(prefix)):
            for name in names:
                file = os.path.join(folder, name)
                if name.startswith(TEMPORARY) and os.path.getmtime(file) < time.time() - older_than:
                    _unlink(file)
                    removed += 1
        return removed

    def probe(self, token: str) -> None:
        """Refuses, with the reason and the way out, a store that cannot be written or that ignores create-only."""
        path = f"epochs/.probe-{token}"
        try:
            first = self.create(path, f"{token} first".encode(), token)
            other = new_token()
            second = self.create(path, f"{other} second".encode(), other)
            held = self.read(path)
            self.delete(path)
        except (OSError, InfrastructureError) as error:
            raise ConfigError(f"output.path: {self.url!r} cannot be written: {error!r}") from error
        if not first or second or not held.endswith(b"first"):
            raise ConfigError(
                f"output.path: {self.url!r} ignores create-only writes, so two writers could undo each other; "
                "use another store, or set run.single_writer: true if only one driver will ever write there"
            )


def _options(url: str) -> dict[str, Any]:
    """Filesystem options: no listing cache where truth is read."""
    protocol = url.split("://", 1)[0] if "://" in url else "file"
    return {} if protocol in ("file", "local", "memory") else {"use_listings_cache": False}


def _walk(folder: str, prefix: str) -> Iterator[Entry]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, path)
        elif not entry.name.startswith(TEMPORARY):
            try:
                info = entry.stat()
            except FileNotFoundError:
                continue
            yield Entry(path, info.st_size, info.st_mtime)


def _mtime(info: dict[str, Any]) -> float:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if value is not None and hasattr(value, "timestamp"):
            return float(value.timestamp())
    return time.time()


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
