"""A conditioning video: a video file, a zip of PNG frames, or a folder of them, frame by frame at a request's size.

Refuses to know where the file came from, and to run ffmpeg itself: `vidgen.media` does.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from vidgen import media
from vidgen.conditioning import pictures
from vidgen.conditioning.limits import DIRECTORY_BYTES, ENTRIES, IMAGE_BYTES, PIXELS
from vidgen.conditioning.sources import File, in_order
from vidgen.errors import ItemError

ZIP = b"PK\x03\x04"
"""How a zip begins that holds anything."""
_END, _LOCATOR = b"PK\x05\x06", b"PK\x06\x07"
_END_BYTES, _LOCATOR_BYTES, _COMMENT_BYTES = 22, 20, 65_535


def decode(clip: Path | Sequence[File], frames: int, size: tuple[int, int], how: str) -> np.ndarray:
    """All frames at `size` (height, width), uint8 RGB [F, H, W, 3]; ItemError unless there are exactly `frames`, all of
    one size, which `how` lets stand for the wanted one."""
    result = np.empty((frames, *size, 3), np.uint8)
    found = 0
    first: tuple[int, ...] | None = None
    with closing(_frames(clip, frames)) as stream:  # so that ffmpeg is gone when a frame is refused
        for number, frame in enumerate(stream):
            if number == frames:
                raise ItemError(f"has {frames + 1} frames or more; num_frames is {frames}")
            first = first or frame.shape
            if frame.shape != first:
                sizes = f"{first[0]}x{first[1]}", f"{frame.shape[0]}x{frame.shape[1]}"
                raise ItemError(f"has frames of different sizes: {sizes[0]}, and {sizes[1]} for frame {number}")
            result[number] = pictures.fitted(Image.fromarray(frame), size, how)
            found = number + 1
    if found != frames:
        raise ItemError(f"has {found} frames; num_frames is {frames}")
    return result


def header(file: IO[bytes]) -> tuple[int, tuple[int, int]] | None:
    """(frames, (height, width) of the first one) of a zip of frames, from its headers; None for any other file.
    ItemError for a zip that is not one of frames, and for a picture: one is not a video."""
    start = file.read(16)
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM")) or start[8:12] == b"WEBP":
        raise ItemError("is a picture, not a video, nor a zip or folder of PNG frames")
    if not start.startswith(ZIP):
        return None
    with _archive(file) as (archive, names), io.BytesIO(_frame_bytes(archive, names[0])) as frame:
        return len(names), pictures.header_size(frame)


def wrong_count(found: int, frames: int) -> str | None:
    """Why a clip of `found` frames cannot stand for one of `frames`; None if it can."""
    return None if found == frames else f"has {found} frames; num_frames is {frames}"


def _frames(clip: Path | Sequence[File], wanted: int) -> Generator[np.ndarray]:
    """Frames in order; of a video file at most one more than wanted, of others only if there are as many as wanted."""
    if not isinstance(clip, Path):
        _refuse_count(len(clip), wanted)
        for number, still in enumerate(clip):
            yield _still(still.read(IMAGE_BYTES), f"frame {number} ({still.name})")
        return
    with clip.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            with _archive(file) as (archive, names):
                _refuse_count(len(names), wanted)
                for name in names:
                    yield _still(_frame_bytes(archive, name), f"frame {name}")
            return
    try:
        yield from media.read_video(clip, wanted + 1, PIXELS)
    except ItemError as error:
        raise ItemError(str(error).removeprefix(f"{clip}").lstrip(": ").replace(str(clip), "the file")) from error


def _refuse_count(found: int, wanted: int) -> None:
    if (problem := wrong_count(found, wanted)) is not None:
        raise ItemError(problem)


def _still(data: bytes, name: str) -> np.ndarray:
    try:
        return np.asarray(pictures.decode(data))
    except ItemError as error:
        raise ItemError(f"{name} {error}") from error


@contextmanager
def _archive(file: IO[bytes]) -> Iterator[tuple[zipfile.ZipFile, list[str]]]:
    """A zip of PNG frames and their names in order; ItemError if its directory is too large to be opened, or damaged,
    or names no frame."""
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            names = in_order(archive.namelist())
            if not names:
                raise ItemError("is a zip without .png frames")
            yield archive, names
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ItemError(f"is a damaged zip: {error}") from error


def _check_directory(file: IO[bytes]) -> None:
    """Refuses, by the last bytes of a zip, a directory that could not be read at once."""
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - _LOCATOR_BYTES - _END_BYTES - _COMMENT_BYTES))
    tail = file.read()
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + _END_BYTES:
        raise ItemError("is a damaged zip: it ends before its directory")
    if tail[max(0, end - _LOCATOR_BYTES) : end].startswith(_LOCATOR):
        raise ItemError("is a zip64; allowed: zips of at most 65,534 files and 4 GiB")
    entries, size = (
        int.from_bytes(tail[end + 10 : end + 12], "little"),
        int.from_bytes(tail[end + 12 : end + 16], "little"),
    )
    if entries > ENTRIES or size > DIRECTORY_BYTES:
        raise ItemError(
            f"is a zip of {entries:,} files with a directory of {size:,} bytes; allowed: {ENTRIES:,} and "
            f"{DIRECTORY_BYTES:,}"
        )


def _frame_bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    """One entry, never more than it declares nor more than IMAGE_BYTES."""
    declared = archive.getinfo(name).file_size
    if declared > IMAGE_BYTES:
        raise ItemError(f"frame {name} has {declared:,} bytes; allowed: at most {IMAGE_BYTES:,}")
    try:
        with archive.open(name) as entry:
            return entry.read(declared + 1)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise ItemError(f"frame {name} is damaged: {error}") from error
