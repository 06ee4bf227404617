"""Frames to a file: mp4, webm and gif through an ffmpeg process, png as a zip of lossless frames.

Equal frames give equal bytes, always: one thread, bit-exact flags, no clock. Refuses to know where a file goes
afterwards, and which model made the frames.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vidgen.errors import ItemError, UserError
from vidgen.formats import FORMATS, codec_of, problems
from vidgen.media import ffmpeg
from vidgen.media.reading import probe, read_frames
from vidgen.types import Video

FLAT = 2
"""Widest range of values (of 255) within each channel of a frame that still counts as one flat colour."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A finished file. `constant`: every raw frame was one flat colour; `mean`: brightness of the raw frames, 0 to
    255, over every fourth pixel each way."""

    path: Path
    format: str
    codec: str
    bytes: int
    sha256: str
    frames: int
    fps: float
    width: int
    height: int
    constant: bool
    mean: float


class _Sink(Protocol):
    """Where raw frames go: a process or a zip."""

    def put(self, frames: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class _Ffmpeg:
    """One ffmpeg process that reads raw RGB from its standard input and writes `path`."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, arguments: list[str]) -> None:
        height, width = size
        rate = Fraction(fps).limit_denominator(1001)
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", f"{rate}"]
        exact = ["-map_metadata", "-1", "-flags:v", "+bitexact", "-fflags", "+bitexact"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        # Its own session: Ctrl-C in a terminal is for us to handle; when we die, ffmpeg sees the end of its input.
        self._process = subprocess.Popen(
            [
                *(
                    ffmpeg.executable(),
                    "-hide_banner",
                    "-loglevel",
                    "level+error",
                    "-y",
                    *source,
                    "-i",
                    "pipe:0",
                    "-an",
                ),
                *("-threads", "1", "-filter_threads", "1", *arguments[:-2], *exact, *arguments[-2:], str(path)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def put(self, frames: np.ndarray) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frames.data.cast("B"))
        except BrokenPipeError:
            self.close()
            raise ItemError("ffmpeg stopped reading before the last frame") from None

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit status, below, tells why
            self._process.stdin.close()
        status = self._process.wait()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        self._errors.close()
        if status != 0:
            raise ffmpeg.failure("ffmpeg could not encode", status, text)

    def abort(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was still buffered has no reader
            self._process.stdin.close()
        self._errors.close()


class _Zip:
    """PNG frames 00000.png, 00001.png, ... in one uncompressed zip with a fixed date; the comment holds the fps."""

    def __init__(self, path: Path, fps: float) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._zip.comment = json.dumps({"fps": fps}).encode()
        self._count = 0

    def put(self, frames: np.ndarray) -> None:
        for frame in frames:
            png = io.BytesIO()
            Image.fromarray(frame).save(png, "PNG", compress_level=6)
            entry = zipfile.ZipInfo(f"{self._count:05d}.png", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            self._zip.writestr(entry, png.getvalue())
            self._count += 1

    def close(self) -> None:
        self._zip.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written before cannot be written now
            self._zip.close()


class Encoder:
    """One file being written: `frames(chunk)` any number of times, then `finish()` or `abort()`, one call at a time
    but from any thread."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, format: str, codec: str, sink: _Sink) -> None:
        self._path, self._size, self._fps, self._format, self._codec = path, size, fps, format, codec
        self._sink = sink
        self._count = 0
        self._constant = True
        self._mean = 0.0

    def frames(self, chunk: Any) -> None:
        """Appends uint8 RGB frames [f, H, W, 3]; returns when ffmpeg has taken them. ItemError on another shape."""
        array = np.ascontiguousarray(chunk)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (*self._size, 3):
            wanted = f"uint8 [f, {self._size[0]}, {self._size[1]}, 3]"
            raise ItemError(f"frames are {array.dtype} {list(array.shape)}, expected {wanted}")
        if len(array) == 0:
            return
        self._constant = self._constant and all(_flat(frame) for frame in array)
        self._mean += float(array[:, ::4, ::4].mean()) * len(array)
        self._count += len(array)
        self._sink.put(array)

    def finish(self) -> Encoded:
        """Closes, checks and hashes the file; ItemError with ffmpeg's last lines if it could not be made."""
        if self._count == 0:
            self.abort()
            raise ItemError("no frames were generated")
        self._sink.close()
        size, digest = _hash(self._path)
        return Encoded(
            path=self._path,
            format=self._format,
            codec=self._codec,
            bytes=size,
            sha256=digest,
            frames=self._count,
            fps=self._fps,
            width=self._size[1],
            height=self._size[0],
            constant=self._constant,
            mean=round(self._mean / self._count, 3),
        )

    def abort(self) -> None:
        """Gives up: ends ffmpeg and removes what it wrote so far."""
        self._sink.abort()
        self._path.unlink(missing_ok=True)


def start(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    fps: float,
    *,
    format: str = "mp4",
    codec: str | None = None,
    crf: int = 18,
) -> Encoder:
    """Begins a file for frames of `size` (height, width); UserError naming what the format cannot hold."""
    broken = problems(format, codec, crf, size, fps)
    if broken:
        raise UserError("; ".join(broken))
    name = codec_of(format, codec).name
    arguments = FORMATS[format].arguments
    place = Path(path)
    sink: _Sink = _Zip(place, fps) if arguments is None else _Ffmpeg(place, size, fps, arguments(name, crf))
    return Encoder(place, size, fps, format, name, sink)


def write(
    video: Video, path: str | os.PathLike[str], *, format: str = "mp4", codec: str | None = None, crf: int = 18
) -> Encoded:
    """Streams `video.chunks` into a file, or adopts `video.encoded`. Nothing is left at `path` on an error."""
    if video.encoded is not None:
        return adopt(video.encoded, path, format=format)
    request = video.request
    encoder = start(path, (request.height, request.width), request.fps, format=format, codec=codec, crf=crf)
    try:
        for chunk in video.chunks:
            encoder.frames(chunk)
        return encoder.finish()
    except BaseException:
        encoder.abort()
        raise


_adopted: dict[tuple[str, str], Encoded] = {}


def adopt(data: bytes, path: str | os.PathLike[str], *, format: str = "mp4") -> Encoded:
    """Writes bytes that a backend encoded itself. Decoded to learn what they hold, once per content and process;
    ItemError if they are not a whole video of that format."""
    place = Path(path)
    place.write_bytes(data)
    try:
        digest = hashlib.sha256(data).hexdigest()
        if (digest, format) not in _adopted:
            if len(_adopted) >= 64:
                _adopted.clear()
            _adopted[digest, format] = _inspect(place, digest, format)
        return replace(_adopted[digest, format], path=place)
    except BaseException:
        place.unlink(missing_ok=True)
        raise


def _inspect(place: Path, digest: str, format: str) -> Encoded:
    seen = probe(place)
    expected = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9"}
    names = {expected.get(c.name, c.name): c.name for c in FORMATS[format].codecs}
    if seen.codec not in names:
        raise ItemError(f"ready bytes hold {seen.codec}, which is not {format}: expected {', '.join(names)}")
    frames = read_frames(place)
    return Encoded(
        path=place,
        format=format,
        codec=names[seen.codec],
        bytes=place.stat().st_size,
        sha256=digest,
        frames=seen.frames,
        fps=seen.fps,
        width=seen.width,
        height=seen.height,
        constant=all(_flat(frame) for frame in frames),
        mean=round(float(frames[:, ::4, ::4].mean()), 3),
    )


def _flat(frame: np.ndarray) -> bool:
    # A pixel far from the first one settles nearly every real frame without reading the rest of it.
    if int(np.ptp(frame[:: max(1, len(frame) // 8), ::8, 1])) > FLAT:
        return False
    pixels = frame.reshape(-1, 3)
    return bool((pixels.max(0).astype(int) - pixels.min(0)).max() <= FLAT)


def _hash(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
