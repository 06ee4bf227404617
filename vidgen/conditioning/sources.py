"""The bytes of a medium and their digest: local files, any fsspec URL, cells, folders of frames.

A digest is the sha256 of the bytes; of a remote file whose store names its content (an etag or a checksum) a hash of
path, size and that name; of a folder a hash of its frames' names and digests. The plan and the replica compute it by
the same rule. Refuses to know what the bytes mean.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.conditioning.cells import read_cell
from vidgen.conditioning.limits import ENTRIES, IMAGE_BYTES, VIDEO_BYTES
from vidgen.conditioning.places import CELL, schemes, shown
from vidgen.errors import InfrastructureError, ItemError
from vidgen.types import Media

NAMES_CONTENT = (
    *("ETag", "etag", "e_tag", "Content-MD5", "content_md5", "md5Hash", "crc32c", "Digest", "checksum"),
    *("blob_id", "oid"),
)
"""Keys under which the filesystems of fsspec tell what names a file's content."""
BLOCK = 1 << 20
HEADER_BLOCK = 1 << 16
"""Bytes read at a time of a remote file of which only the header is wanted."""


@dataclass(frozen=True, slots=True)
class File:
    """A file or folder that is there. `name` is how messages call it, `size` its bytes (None: the store does not say)
    and `tag` what the store calls its content ("" for local files, whose bytes are hashed)."""

    fs: Any
    path: str
    name: str
    size: int | None
    tag: str
    folder: bool

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def open(self) -> IO[bytes]:
        """Opened for reading here and there."""
        if self.local:
            return open(self.path, "rb")
        handle: IO[bytes] = self.fs.open(self.path, "rb", block_size=HEADER_BLOCK)
        return handle

    def read(self, most: int) -> bytes:
        """All its bytes; ItemError, before they are read, if they are more than `most`."""
        self.check_size(most)
        if not self.local and self.size is not None:
            data: bytes = self.fs.cat_file(self.path)
        else:
            with self.fs.open(self.path, "rb") as handle:
                data = handle.read(most + 1)
        return _limited(data, self.name, most)

    def check_size(self, most: int) -> None:
        if self.size is not None and self.size > most:
            raise ItemError(f"{self.name} has {self.size:,} bytes; allowed: at most {most:,}")

    def digest(self, most: int) -> str:
        """As the module says; at most `most` bytes are read."""
        self.check_size(most)
        if self.tag:
            place = self.fs.unstrip_protocol(self.path)
            return digest_of(f"remote\0{place}\0{self.size}\0{self.tag}".encode())
        found, size = hashlib.sha256(), 0
        with self.fs.open(self.path, "rb") as handle:
            while block := handle.read(BLOCK):
                size += len(block)
                if size > most:
                    raise ItemError(f"{self.name} has more than {most:,} bytes")
                found.update(block)
        return found.hexdigest()


def digest_of(data: bytes) -> str:
    """sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def find(url: str) -> File:
    """What lies at a URL or path; ItemError if nothing does, or the URL cannot be understood; InfrastructureError if
    its store cannot be reached."""
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **_within_scheme(url))
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error.__cause__, ItemError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):  # what fsspec makes of an HTTP server that does not answer
            raise InfrastructureError(f"{shown(url)} cannot be reached: {error.__cause__}") from error
        raise ItemError(f"{shown(url)}: there is no such file") from error
    except (ConnectionError, TimeoutError) as error:
        raise InfrastructureError(f"{shown(url)} cannot be reached: {error}") from error
    except PermissionError as error:
        raise ItemError(f"{shown(url)} may not be read: {error}") from error
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise
        raise ItemError(f"{shown(url)} cannot be opened: {error}") from error
    tag = "" if isinstance(fs, LocalFileSystem) else next((str(v) for k in NAMES_CONTENT if (v := info.get(k))), "")
    size = info.get("size")
    if info.get("type") not in ("file", "directory"):
        raise ItemError(f"{shown(url)} is neither a file nor a folder")
    return File(fs, path, shown(url), None if size is None else int(size), tag, info.get("type") == "directory")


def _within_scheme(url: str) -> dict[str, Any]:
    """Options of the HTTP filesystems in a URL, by which they follow no redirect to another scheme: what may be reached
    is decided by the URL's own (`dataset.media_schemes`)."""
    options: dict[str, Any] = {}
    for scheme in {"http", "https"}.intersection(schemes(url)):
        given = fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
        options[scheme] = {"client_kwargs": {**given, "trace_configs": [*given.get("trace_configs", ()), _no_escape()]}}
    return options


@cache
def _no_escape() -> Any:
    import aiohttp

    async def redirected(session: Any, context: Any, request: Any) -> None:
        target = request.response.headers.get("Location", "")
        if urlsplit(target).scheme not in ("", request.url.scheme):
            raise ItemError(
                f"{shown(str(request.url))} leads to another scheme, {shown(target)}, which is not followed"
            )

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(redirected)
    return trace


def frames_in(folder: File) -> list[File]:
    """The .png files directly in a folder, in the order a person counts them; ItemError if there is none."""
    listed = folder.fs.ls(folder.path, detail=True)
    if len(listed) > ENTRIES:
        raise ItemError(f"{folder.name} has {len(listed):,} entries; allowed: at most {ENTRIES:,}")
    found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in listed if entry["type"] == "file"}
    for name in found:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python has a name's bytes that are no text
            raise ItemError(f"{folder.name} has a file whose name is not UTF-8: {name!r}")
    files = []
    for name in in_order(found):
        entry, tag = found[name], ""
        if not folder.local:
            tag = next((str(v) for k in NAMES_CONTENT if (v := entry.get(k))), "")
        files.append(File(folder.fs, entry["name"], f"{folder.name}/{name}", entry.get("size"), tag, False))
    if not files:
        raise ItemError(f"{folder.name} is a folder without .png frames")
    return files


def in_order(names: Any) -> list[str]:
    """The names of PNG frames among `names`, frame 2 before frame 10; hidden ones are passed over."""
    frames = [
        name
        for name in names
        if name.lower().endswith(".png") and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    ]
    return sorted(frames, key=lambda name: ([int(run) for run in re.findall(r"\d+", name)], name))


def folder_digest(frames: list[File]) -> str:
    """Of a folder's frames: their names and digests."""
    lines = [f"{file.path.rpartition('/')[2]}\0{file.digest(IMAGE_BYTES)}" for file in frames]
    return digest_of("\n".join(["folder", *lines]).encode())


def read_image(media: Media) -> bytes:
    """The bytes of an image; ItemError if they are gone, too many, or not those that were planned."""
    if media.data is not None:
        data, digest = _limited(media.data, "the data", IMAGE_BYTES), ""
    elif media.url.startswith(CELL):
        data, digest = read_cell(media.url, IMAGE_BYTES), ""
    else:
        file = find(media.url)
        data = file.read(IMAGE_BYTES)
        digest = file.digest(IMAGE_BYTES) if file.tag else ""
    check_digest(media, digest or digest_of(data))
    return data


@contextmanager
def open_video(media: Media) -> Iterator[Path | list[File]]:
    """A video as a file on the local disk (a temporary one, if it comes from elsewhere), or the frames of a folder;
    ItemError as for an image."""
    data = media.data
    if data is None and media.url.startswith(CELL):
        data = read_cell(media.url, VIDEO_BYTES)
    if data is not None:
        check_digest(media, digest_of(_limited(data, "the data", VIDEO_BYTES)))
        with _temporary(iter([data])) as place:
            yield place
        return
    file = find(media.url)
    if file.folder:
        frames = frames_in(file)
        check_digest(media, folder_digest(frames))
        yield frames
    elif file.local:
        check_digest(media, file.digest(VIDEO_BYTES))
        yield Path(file.path)
    else:
        digest = file.digest(VIDEO_BYTES) if file.tag else ""
        file.check_size(VIDEO_BYTES)
        seen = hashlib.sha256()
        with _temporary(_counted(file, seen, VIDEO_BYTES)) as place:
            check_digest(media, digest or seen.hexdigest())
            yield place


def check_digest(media: Media, found: str) -> None:
    """ItemError if a medium is not the one that was planned; one without a digest was not planned."""
    if media.digest and found != media.digest:
        raise ItemError(
            f"{shown(media.url) or 'the data'} is not what was planned: its digest is {found[:12]}, "
            f"the plan has {media.digest[:12]}"
        )


def _limited(data: bytes, name: str, most: int) -> bytes:
    if len(data) > most:
        raise ItemError(f"{name} has {len(data):,} bytes or more; allowed: at most {most:,}")
    return data


def _counted(file: File, seen: Any, most: int) -> Iterator[bytes]:
    size = 0
    with file.fs.open(file.path, "rb") as handle:
        while block := handle.read(BLOCK):
            size += len(block)
            if size > most:
                raise ItemError(f"{file.name} has more than {most:,} bytes")
            seen.update(block)
            yield block


@contextmanager
def _temporary(blocks: Iterator[bytes]) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix="vidgen-", suffix=".video")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            for block in blocks:
                handle.write(block)
        yield Path(name)
    finally:
        os.unlink(name)
