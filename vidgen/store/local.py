"""Disks of this machine, shared ones included: the atomicity that fsspec does not give local files, and what their
errors mean.

An object is written beside its place, synced, and linked (create-only) or renamed over what is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator

from vidgen import faults
from vidgen.store.kind import Entry, Trouble

TEMPORARY = ".tmp-"
"""Prefix of the names under which files are written before they are published; listings pass over them."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SHAKY = (errno.EIO, errno.ESTALE)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What exFAT, SMB and the file interfaces of object stores answer to a hard link, next to a file just written there."""


class Local:
    """Files of a disk. Only what a network disk recovers from is tried again."""

    def create(self, name: str, data: bytes) -> None:
        with _written(name, data) as temporary:
            faults.reached("file created")
            try:
                os.link(temporary, name)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise NotImplementedError(f"the disk has no hard links: {error.strerror}") from error
                raise

    def put(self, name: str, data: bytes) -> None:
        with _written(name, data) as temporary:
            faults.reached("file written")
            os.replace(temporary, name)

    def put_file(self, name: str, source: str) -> None:
        temporary = _temporary(name)
        try:
            try:
                os.link(source, temporary)
            except OSError:  # another filesystem, or one without links
                shutil.copyfile(source, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            faults.reached("file copied")
            os.replace(temporary, name)
        finally:
            _unlink(temporary)  # still there after an error, or where both names were the same file already

    def read(self, name: str) -> bytes:
        with open(name, "rb") as file:
            return file.read()

    def head(self, name: str) -> Entry | None:
        try:
            info = os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(name, info.st_size, info.st_mtime)

    def page(self, folder: str, cursor: str | None) -> tuple[list[Entry], str | None]:
        raise NotImplementedError("a disk is walked, not paged")

    def walk(self, folder: str) -> Iterator[Entry]:
        """All files below a folder, at any depth, by name."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.is_dir():
                yield from self.walk(entry.path)
            elif not entry.name.startswith(TEMPORARY):
                try:
                    info = entry.stat()
                except FileNotFoundError:
                    continue
                yield Entry(entry.path, info.st_size, info.st_mtime)

    def delete(self, name: str) -> None:
        os.unlink(name)

    def diagnose(self, error: Exception) -> Trouble | None:
        if not isinstance(error, OSError) or error.errno is None:
            return None
        said = f"{error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
        if error.errno in _FULL:
            return Trouble(f"the disk is full; make room and start again: {said}", again=False)
        if error.errno in _DENIED:
            return Trouble(f"permission is missing to read and write below the output: {said}", again=False)
        if error.errno in _SHAKY:
            return Trouble(f"the disk is in trouble: {said}", again=True)
        return None

    def sweep_temporaries(self, folder: str, before: float) -> int:
        """Removes what writers that died left half-written before that time; returns how many."""
        removed = 0
        for place, _, names in os.walk(folder):
            for name in names:
                file = os.path.join(place, name)
                found = self.head(file) if name.startswith(TEMPORARY) else None
                if found is not None and found.mtime < before:
                    _unlink(file)
                    removed += 1
        return removed


@contextlib.contextmanager
def _written(name: str, data: bytes) -> Iterator[str]:
    """The data in a synced file beside `name`, which is gone afterwards."""
    temporary = _temporary(name)
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        _unlink(temporary)


def _temporary(final: str) -> str:
    folder, name = os.path.split(final)
    os.makedirs(folder, exist_ok=True)
    return f"{folder}/{TEMPORARY}{secrets.token_hex(8)}-{name}"


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
