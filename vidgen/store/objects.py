"""Objects under one URL: atomic whole-object puts, create-only writes, listings without a cache.

The only door to outputs. Refuses to know what the objects mean; what each kind of store does differently is in a file
of its own (`local`, `s3`, `azure`, `google`, `other`), what an answer means and how often it is asked again in `retry`.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.errors import ConfigError, InfrastructureError
from vidgen.redaction import Secrets, refuse_credentials
from vidgen.store import retry
from vidgen.store.azure import Azure
from vidgen.store.google import Google
from vidgen.store.kind import Entry, Kind
from vidgen.store.local import TEMPORARY, Local
from vidgen.store.other import Other
from vidgen.store.s3 import S3

__all__ = ["TEMPORARY", "Entry", "Objects", "new_token"]

T = TypeVar("T")

EXTRAS: dict[str, tuple[Callable[[str], S3 | Azure | Google], str]] = {
    **dict.fromkeys(("s3", "s3a"), (S3, "s3")),
    **dict.fromkeys(("abfs", "abfss", "az"), (Azure, "azure")),
    **dict.fromkeys(("gs", "gcs"), (Google, "gcs")),
}
"""Protocol -> who serves it, and the extra of this package that it needs."""
QUESTION = "epochs/."
"""What the names of objects begin with that are written to see what the store does with them, and deleted at once."""
WAY_OUT = "use another store, or set run.single_writer: true if only one driver will ever write there"


def new_token() -> str:
    """A name for one writer: what it creates carries this, so that it can recognise its own work."""
    return secrets.token_hex(8)


def is_question(path: str) -> bool:
    """Whether the object of that path only asked the store something; its writer has deleted it, or died."""
    return path.startswith(QUESTION)


class Objects:
    """Objects below `url`. Paths are relative, with forward slashes.

    `single_writer` is for a store that ignores the create-only condition: create then means look, put, read back,
    which is only right while one process writes. Every verb tries again where that may help, and then raises
    InfrastructureError; what only a person can mend is a `retry.Refused`.
    """

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        self.url = str(url)
        self.single_writer = single_writer
        refuse_credentials(self.url)
        self.kind: Kind
        try:
            self.kind, root, self._secrets = _open(self.url)
        except ImportError as error:
            extra = EXTRAS.get(_protocol(self.url), (None, ""))[1]
            way = f'; pip install "vidgen[{extra}]"' if extra else ""
            raise ConfigError(f"{self.url!r} cannot be opened as a store: {error}{way}") from error
        except ValueError as error:
            said = Secrets(fsspec.config.conf).clean(str(error))
            raise ConfigError(f"{self.url!r} cannot be opened as a store: {said}") from None
        self.root = root.rstrip("/")
        self.local = isinstance(self.kind, Local)
        self._answered = False

    def path(self, path: str) -> str:
        """The filesystem's own name of an object."""
        return f"{self.root}/{path}" if path else self.root

    # ---------------------------------------------------------------- writing

    def create(self, path: str, data: bytes, token: str) -> bool:
        """Creates an object that must not exist yet. True if it now holds our bytes (an earlier, ambiguous attempt of
        ours included: the object is read back and `token` looked for); False if somebody else's is there."""
        assert token.encode() in data, "a create-only object carries its writer's token"
        name = self.path(path)

        def attempt() -> bool:
            try:
                if not self.single_writer:
                    self.kind.create(name, data)
                    return True
                with contextlib.suppress(FileNotFoundError):
                    return token.encode() in self.kind.read(name)
                self.kind.put(name, data)
                return self.kind.read(name) == data
            except FileExistsError:
                pass
            try:
                return token.encode() in self.kind.read(name)
            except FileNotFoundError:  # it was deleted since, or its creation failed beside ours
                raise retry.Unsettled("it was there, and then it was not") from None

        return self._write(path, attempt)

    def put(self, path: str, data: bytes, before: Callable[[], None] = lambda: None) -> None:
        """Writes a whole object, atomically, over whatever is there. After a try of unknown outcome the same bytes are
        written again. `before` is called before every try, and may raise: between two of them minutes may pass."""

        def attempt() -> None:
            before()
            self.kind.put(self.path(path), data)

        self._write(path, attempt)

    def put_file(self, path: str, source: str | Path) -> None:
        """Writes a whole object from a local file, atomically, over whatever is there, in bounded memory. The file must
        not be changed afterwards: on the same disk the object is the file itself under another name."""
        self._write(path, lambda: self.kind.put_file(self.path(path), str(source)))

    def delete(self, path: str, still: Callable[[], bool] = lambda: True) -> bool:
        """Deletes an object; one that is not there is no error. `still` is asked before every try whether it is to go:
        between two of them minutes may pass. Returns its last answer, and may raise what it raises."""

        def attempt() -> bool:
            if wanted := still():
                with contextlib.suppress(FileNotFoundError):
                    self.kind.delete(self.path(path))
            return wanted

        return self._tried(path, attempt)

    def _write(self, path: str, act: Callable[[], T]) -> T:
        try:
            return self._tried(path, act)
        except FileNotFoundError as error:
            if self.local:
                raise
            raise retry.Refused(
                f"{self._shown(path)}: there is no such bucket or container; it must be made first"
            ) from error

    # ---------------------------------------------------------------- reading

    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError if there is none."""
        return self._tried(path, lambda: self.kind.read(self.path(path)))

    def exists(self, path: str) -> bool:
        return self.head(path) is not None

    def size(self, path: str) -> int | None:
        """Bytes of the object, or None if there is none."""
        entry = self.head(path)
        return None if entry is None else entry.size

    def head(self, path: str) -> Entry | None:
        """Bytes and age of the object, by one request; None if there is none."""
        found = self._tried(path, lambda: self.kind.head(self.path(path)))
        return None if found is None else replace(found, path=path)

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects below the folder `prefix`, at any depth, by name; a page of the store's listing at a time."""
        folder, cut = self.path(prefix), len(self.root) + 1
        if isinstance(self.kind, Local):
            for entry in self.kind.walk(folder):
                yield replace(entry, path=entry.path[cut:])
            return
        cursor: str | None = None
        while True:
            entries, cursor = self._tried(prefix, lambda cursor=cursor: self.kind.page(folder, cursor))  # type: ignore[misc]
            for entry in entries:
                yield Entry(entry.path[cut:], entry.size, entry.mtime)
            if cursor is None:
                return

    def now(self, token: str) -> float:
        """The store's own time, by writing an object and looking at its age: what its ages can be held against, however
        wrong this machine's clock is."""
        path = f"{QUESTION}clock-{token}"
        self.put(path, token.encode())
        entry = self.head(path)
        self.delete(path)
        return entry.mtime if entry is not None else time.time()

    def sweep_temporaries(self, prefix: str, before: float) -> int:
        """Removes what writers that died left half-written on a local disk before a time of the store's clock; returns
        how many."""
        return self.kind.sweep_temporaries(self.path(prefix), before) if isinstance(self.kind, Local) else 0

    # ---------------------------------------------------------------- trouble

    def probe(self, token: str) -> None:
        """Refuses, with the reason and the way out, a store that cannot be written or that ignores create-only."""
        path = f"{QUESTION}probe-{token}"
        try:
            first = self.create(path, f"{token} first".encode(), token)
            other = new_token()
            second = self.create(path, f"{other} second".encode(), other)
            held = self.read(path)
            self.delete(path)
        except (OSError, InfrastructureError) as error:
            said = str(error) if isinstance(error, InfrastructureError) else self._secrets.clean(repr(error))
            raise ConfigError(f"output.path: {self.url!r} cannot be written: {said}") from error.__cause__
        except (NotImplementedError, TypeError) as error:
            said = self._secrets.clean(str(error))
            raise ConfigError(
                f"output.path: {self.url!r} has no create-only writes ({said}), so two writers could undo each other; "
                f"{WAY_OUT}"
            ) from error
        if not first or second or not held.endswith(b"first"):
            raise ConfigError(
                f"output.path: {self.url!r} ignores create-only writes, so two writers could undo each other; {WAY_OUT}"
            )

    def _tried(self, path: str, act: Callable[[], T]) -> T:
        patience = retry.PATIENCE if self._answered else retry.FIRST_PATIENCE
        name = self._shown(path)
        try:
            done = retry.tried(act, self.kind.diagnose, name, patience=patience, clean=self._secrets.clean)
        except FileNotFoundError:
            self._answered = True
            raise
        self._answered = True
        return done

    def _shown(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"


def _protocol(url: str) -> str:
    return url.split("://", 1)[0] if "://" in url else "file"


def _open(url: str) -> tuple[Kind, str, Secrets]:
    """Who serves a URL, what its paths begin with, and what must not be shown."""
    if _protocol(url) in EXTRAS and "::" not in url:
        served = EXTRAS[_protocol(url)][0](url)
        return served, served.root, served.secrets
    fs, root = fsspec.core.url_to_fs(url)
    secret = Secrets(getattr(fs, "storage_options", {}))
    return (Local() if isinstance(fs, LocalFileSystem) else Other(fs)), root, secret
