"""A file to frames: what it holds, all of its frames or the first so many of anyone's video, one picture of it.

Any damage is an error: no frame is invented, dropped or repeated. Refuses to know what the plan promised: callers
compare.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from vidgen.errors import ItemError
from vidgen.media import ffmpeg

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
class Probe:
    """What decoding a file from its first frame to its last showed. `duration` in seconds; `codec` in the words of
    ffmpeg's decoders (h264, hevc, vp9, gif, png)."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float
    codec: str


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
            [ffmpeg.executable(), *_STRICT, *limits, *source, *output],
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
        raise ffmpeg.failure(f"{path} could not be decoded", status, log)
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
        [ffmpeg.executable(), *_STRICT, "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough", *output, target],
        capture_output=True,
        start_new_session=True,
    )
    if done.returncode != 0:
        raise ffmpeg.failure(f"{path} could not be decoded", done.returncode, done.stderr.decode(errors="replace"))
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
