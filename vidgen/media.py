"""Frames to files and back: mp4, webm and gif through ffmpeg, png as a zip of lossless frames; probe and poster.

The only file that runs ffmpeg (the binary that imageio-ffmpeg ships). Equal frames give equal bytes, always: one
thread, bit-exact flags, no clock. Refuses to know where a file goes afterwards, which model made the frames, and what
the plan promised about them: callers compare.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import imageio_ffmpeg
import numpy as np
from PIL import Image

from vidgen.errors import GenerationError, InfrastructureError, ItemError, UserError
from vidgen.formats import FORMATS, codec_of, problems
from vidgen.types import Video

FLAT = 2
"""Widest range of values (of 255) within each channel of a frame that still counts as one flat colour."""
CONTAINERS = (
    "mov",
    "mp4",
    "m4a",
    "3gp",
    "3g2",
    "mj2",
    "matroska",
    "webm",
    "gif",
    "avi",
    "mpegts",
    "mpeg",
    "ogg",
    "flv",
)
"""What `read_video` opens, by ffmpeg's names. Playlists and the like are not among them: they name other files."""


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


@dataclass(frozen=True, slots=True)
class Probe:
    """What decoding a file from its first frame to its last showed. `duration` in seconds; `codec` in the words of
    ffmpeg's decoders (h264, hevc, vp9, gif, png)."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float
    codec: str


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
                *(_ffmpeg(), "-hide_banner", "-loglevel", "level+error", "-y", *source, "-i", "pipe:0", "-an"),
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
            raise _failure("ffmpeg could not encode", status, text)

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


def probe(path: str | os.PathLike[str]) -> Probe:
    """Decodes the whole file and counts; ItemError if any of it cannot be decoded or it holds no frame."""
    if zipfile.is_zipfile(path):
        with _frames_of(path) as (archive, names):
            sizes = {_png(archive, name).shape for name in names}
            if len(sizes) != 1:
                raise ItemError(f"{path}: frames of different sizes: {sorted(sizes)}")
            height, width, _ = sizes.pop()
            fps = _zip_fps(archive)
            return Probe(len(names), fps, width, height, len(names) / fps, "png")
    done = _decode(path, ["-progress", "pipe:1", "-f", "null"])
    shape = _stream(done.stderr, path)
    report = dict(line.split("=", 1) for line in done.stdout.decode().splitlines() if "=" in line)
    frames = int(report.get("frame", "0"))
    if frames == 0:
        raise ItemError(f"{path}: no frame could be decoded")
    duration = int(report["out_time_us"]) / 1e6
    return Probe(frames, round(frames / duration, 3), shape.width, shape.height, duration, shape.codec)


def read_frames(path: str | os.PathLike[str]) -> np.ndarray:
    """All frames as uint8 RGB [F, H, W, 3], of anything this file writes; ItemError if any cannot be decoded."""
    if zipfile.is_zipfile(path):
        with _frames_of(path) as (archive, names):
            return np.stack([_png(archive, name) for name in names])
    return _raw(path, None)


def read_video(path: str | os.PathLike[str], most_frames: int, most_pixels: int) -> Iterator[np.ndarray]:
    """Frames of a video file of anyone's making, one by one: uint8 RGB [H, W, 3], upright (the display matrix is
    applied), transparency over white, as they are stored: whatever the frame rate, none is dropped or repeated.

    At most `most_frames`; then ffmpeg is stopped, and what follows is not looked at. ItemError for a file that holds no
    video of CONTAINERS, is cut or damaged, or has frames of more than `most_pixels` (nothing of those is allocated) or
    of different sizes.
    """
    _check_readable(path)
    limits = ["-max_pixels", str(most_pixels), "-format_whitelist", ",".join(CONTAINERS), "-protocol_whitelist", "file"]
    exact = "scale=flags=bicubic+accurate_rnd+full_chroma_int+bitexact,format=rgba"
    output = ["-vf", exact, "-frames:v", str(most_frames), "-f", "image2pipe", "-c:v", "pam", "pipe:1"]
    source = ["-i", f"file:{os.path.abspath(path)}", "-map", "0:V:0", "-fps_mode", "passthrough"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [_ffmpeg(), *_STRICT, *limits, *source, *output],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout is not None
        size = None
        try:
            while (frame := _pam(process.stdout)) is not None:
                size = frame.shape[:2]
                yield over_white(frame)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        log = errors.read().decode(errors="replace")
    if "exceeds specified max pixel count" in log:
        raise ItemError(f"{path}: frames of more than {most_pixels:,} pixels")
    if "matches no streams" in log:
        raise ItemError(f"{path}: holds no video stream")
    if status != 0 or size is None:
        raise _failure(f"{path} could not be decoded", status, log)
    # ffmpeg scales what follows a change of size to the size before it; a turned video is reported as it lies.
    later = {(int(h), int(w)) for w, h in re.findall(r"video parameters changed to .*?, (\d+)x(\d+)", log)}
    if others := later - {size, size[::-1]}:
        raise ItemError(f"{path}: frames of different sizes: {sorted({size, *others})} (height, width)")


def over_white(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGBA [..., 4], alpha not premultiplied, over white: uint8 RGB [..., 3]."""
    alpha = pixels[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(pixels[..., :3])
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def poster(path: str | os.PathLike[str], width: int = 480) -> bytes:
    """A JPEG of the middle frame, at most `width` pixels wide; ItemError if it cannot be decoded."""
    if zipfile.is_zipfile(path):
        with _frames_of(path) as (archive, names):
            picture = Image.fromarray(_png(archive, names[len(names) // 2]))
    else:
        frames = _raw(path, f"scale=w='min({width},iw)':h='max(1,round(ih*ow/iw))'")
        picture = Image.fromarray(frames[len(frames) // 2])
    if picture.width > width:
        picture = picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.BOX)
    jpeg = io.BytesIO()
    small = picture.width <= 256  # enlarged by whoever shows it, so halved colour would be seen
    picture.save(jpeg, "JPEG", quality=92 if small else 85, subsampling=0 if small else 2)
    return jpeg.getvalue()


def _raw(path: str | os.PathLike[str], scale: str | None) -> np.ndarray:
    filters = [] if scale is None else ["-vf", scale]
    done = _decode(path, [*filters, "-pix_fmt", "rgb24", "-f", "rawvideo"])
    shape = _stream(done.stderr, path, output=True)
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, shape.height, shape.width, 3)
    if len(frames) == 0:
        raise ItemError(f"{path}: no frame could be decoded")
    return frames


_STRICT = (
    *("-hide_banner", "-loglevel", "level+info", "-nostdin", "-nostats"),
    *("-xerror", "-err_detect", "explode", "-threads", "1"),
)


def _check_readable(path: str | os.PathLike[str]) -> None:
    """ItemError for a file that is not there, or is cut where ffmpeg would not notice."""
    if not Path(path).is_file():
        raise ItemError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        if file.read(6) in (b"GIF87a", b"GIF89a"):  # ffmpeg takes a picture cut in half for a whole one
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b";":
                raise ItemError(f"{path}: a gif without its closing byte: it was cut")


def _pam(stream: IO[bytes]) -> np.ndarray | None:
    """The next frame of a stream of RGBA pictures in the PAM format, [H, W, 4]; None at its end."""
    fields: dict[bytes, bytes] = {}
    while (line := stream.readline().rstrip()) != b"ENDHDR":
        if not line:
            return None
        name, _, value = line.partition(b" ")
        fields[name] = value
    height, width = int(fields[b"HEIGHT"]), int(fields[b"WIDTH"])
    data = stream.read(height * width * 4)
    if len(data) != height * width * 4:  # ffmpeg died in the middle of a frame; its exit status says why
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 4)


def _decode(path: str | os.PathLike[str], output: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Runs ffmpeg over every frame of the first video stream; any damage is an error, frames are never invented."""
    _check_readable(path)
    target = "-" if output[-1] == "null" else "pipe:1"
    done = subprocess.run(
        [_ffmpeg(), *_STRICT, "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough", *output, target],
        capture_output=True,
        start_new_session=True,
    )
    if done.returncode != 0:
        raise _failure(f"{path} could not be decoded", done.returncode, done.stderr.decode(errors="replace"))
    return done


@dataclass(frozen=True, slots=True)
class _Stream:
    codec: str
    width: int
    height: int


def _stream(log: bytes, path: str | os.PathLike[str], output: bool = False) -> _Stream:
    """The first input (or output) video stream as ffmpeg's log describes it."""
    text = log.decode(errors="replace")
    start, end = text.find("Input #0"), text.find("Output #0")
    part = text[end:] if output else text[start:end]
    found = re.search(r"Stream #0:\d+.*?: Video: (\w+).*?, (\d+)x(\d+)[, \n]", part)
    if found is None:
        raise ItemError(f"{path}: ffmpeg reports no video stream")
    return _Stream(found[1], int(found[2]), int(found[3]))


@contextlib.contextmanager
def _frames_of(path: str | os.PathLike[str]) -> Iterator[tuple[zipfile.ZipFile, list[str]]]:
    """Opens a zip of PNG frames as (archive, names in order)."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ItemError(f"{path}: {error}") from error
    with archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        if not names:
            raise ItemError(f"{path}: the zip holds no .png frame")
        yield archive, names


def _png(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(archive.read(name))) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, zipfile.BadZipFile) as error:
        raise ItemError(f"{archive.filename}: frame {name}: {error}") from error


def _zip_fps(archive: zipfile.ZipFile) -> float:
    """The frame rate our own zips carry; a foreign zip of frames has none and counts as 1 a second."""
    return float(json.loads(archive.comment)["fps"]) if archive.comment.startswith(b'{"fps"') else 1.0


def _flat(frame: np.ndarray) -> bool:
    # A pixel far from the first one settles nearly every real frame without reading the rest of it.
    if int(np.ptp(frame[:: max(1, len(frame) // 8), ::8, 1])) > FLAT:
        return False
    pixels = frame.reshape(-1, 3)
    return bool((pixels.max(0).astype(int) - pixels.min(0)).max() <= FLAT)


def _hash(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for block in _blocks(file):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a disk, with which ffmpeg ends as 256 less the number."""


def _failure(what: str, status: int, log: str) -> GenerationError:
    # "[mov @ 0x55d0c3] [error] moov atom not found": the address differs each time and would split equal failures.
    errors = [line for line in log.splitlines() if "[error]" in line or "[fatal]" in line]
    lines = [re.sub(r" @ 0x[0-9a-f]+|\[(error|fatal)\] ", "", line).strip() for line in errors or log.splitlines()]
    # What came first is the cause; what follows comes from several threads, in an order of its own each time.
    # A full disk may hold no log either; of a file that is cut, EIO is what ffmpeg ends with, too, after a word on it.
    disk = [number for number in _DISK if number != errno.EIO or not lines]
    full = next((os.strerror(number) for number in disk if status == 256 - number), "")
    message = f"{what} (exit status {status}): {lines[0] if lines else full or 'no message'}"
    if full or os.strerror(errno.ENOSPC) in log or status in (-signal.SIGKILL, -signal.SIGTERM):
        return InfrastructureError(message)
    return ItemError(message)


@functools.lru_cache(maxsize=1)
def _ffmpeg() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"no ffmpeg: {error}") from error
