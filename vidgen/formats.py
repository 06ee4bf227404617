"""The containers there are: extension, codecs, limits, and what ffmpeg must be told. A format is one function.

Standard library only, so that a plan can refuse what cannot be stored. Refuses to run anything; `vidgen.media` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vidgen.errors import UserError

# Browsers take untagged video for BT.601 or BT.709 as they like, so the matrix is converted and tagged explicitly.
_COLOUR = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)


@dataclass(frozen=True, slots=True)
class Codec:
    """An encoder of ffmpeg: its crf range (None: it has no quality setting), and whether sides must be even."""

    name: str
    crf: tuple[int, int] | None = None
    even: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """A container: file extension, codecs (the first is the default), the highest frame rate it can show,
    and ffmpeg's output arguments for (codec, crf); `arguments` None means a zip of PNG frames."""

    name: str
    extension: str
    codecs: tuple[Codec, ...]
    arguments: Callable[[str, int], list[str]] | None
    max_fps: float = 1000.0


def _mp4(codec: str, crf: int) -> list[str]:
    quiet = ["-x265-params", "pools=none:frame-threads=1:log-level=error", "-tag:v", "hvc1"]
    return [
        *("-vf", _COLOUR, "-c:v", codec, "-crf", str(crf), "-preset", "medium"),
        *(quiet if codec == "libx265" else ()),
        *("-movflags", "+faststart", "-f", "mp4"),
    ]


def _webm(codec: str, crf: int) -> list[str]:
    # -b:v 0 makes crf the only target; cpu-used 4 costs about a tenth of the default's time at nearly its size.
    speed = ["-deadline", "good", "-cpu-used", "4", "-row-mt", "0", "-tile-columns", "0"]
    return ["-vf", _COLOUR, "-c:v", codec, "-crf", str(crf), "-b:v", "0", *speed, "-f", "webm"]


def _gif(codec: str, crf: int) -> list[str]:
    # A palette a frame: better colours, and ffmpeg need not hold the whole clip to find one for all.
    palette = "split[a][b];[a]palettegen=stats_mode=single[palette];[b][palette]paletteuse=new=1:dither=sierra2_4a"
    return ["-filter_complex", palette, "-c:v", codec, "-loop", "0", "-f", "gif"]


FORMATS: dict[str, Format] = {
    "mp4": Format("mp4", ".mp4", (Codec("libx264", (1, 51), even=True), Codec("libx265", (1, 51), even=True)), _mp4),
    "webm": Format("webm", ".webm", (Codec("libvpx-vp9", (0, 63)),), _webm),
    # A delay is a whole number of 1/100 s and browsers slow delays below 2 down to 10.
    "gif": Format("gif", ".gif", (Codec("gif"),), _gif, max_fps=50.0),
    "png": Format("png", ".zip", (Codec("png"),), None),
}


def codec_of(format: str, codec: str | None) -> Codec:
    """The codec of that name in that format, the format's first for None; UserError lists what is allowed."""
    if format not in FORMATS:
        raise UserError(f"output.format: {format!r} is not a format; allowed: {', '.join(FORMATS)}")
    known = FORMATS[format].codecs
    for candidate in known:
        if codec in (None, candidate.name):
            return candidate
    allowed = ", ".join(c.name for c in known)
    raise UserError(f"output.codec: {codec!r} does not go into {format}; allowed: {allowed}")


def problems(format: str, codec: str | None, crf: int, size: tuple[int, int], fps: float) -> list[str]:
    """Each reason why frames of `size` (height, width) at `fps` cannot be stored so, as a sentence; [] if none.

    Raises UserError where format and codec do not go together, whatever the size.
    """
    found = codec_of(format, codec)
    height, width = size
    broken = []
    if found.crf is not None and not found.crf[0] <= crf <= found.crf[1]:
        broken.append(f"output.crf: {crf} is not within {found.crf[0]} to {found.crf[1]}, the range of {found.name}")
    if height < 1 or width < 1:
        broken.append(f"size {height}x{width} (height x width): both sides must be at least 1")
    elif found.even and (height % 2 or width % 2):
        others = ", ".join(f.name for f in FORMATS.values() if not f.codecs[0].even)
        broken.append(
            f"size {height}x{width} (height x width): {found.name} needs even sides to play in browsers; "
            f"use even sizes, or output.format {others}"
        )
    if not 0 < fps <= FORMATS[format].max_fps:
        broken.append(
            f"fps: {fps:g} is not above 0 and at most {FORMATS[format].max_fps:g}, the most {format} can show"
        )
    return broken
