"""One still picture: its size from the header, its pixels as upright RGB, and how it meets the size of a request.

Refuses to know where the bytes come from. Colour profiles are not applied, as the pipelines that the models were made
with do not either.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vidgen.conditioning.limits import PIXELS
from vidgen.errors import ItemError
from vidgen.media import over_white

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")

DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, KeyError, IndexError, TypeError),
    *(OverflowError, AttributeError, RuntimeError),
)
"""What PIL raises, somewhere, for bytes that are not what they say; all of it is the file's fault here."""
_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""EXIF orientations that turn the picture by a quarter."""


def header_size(file: IO[bytes]) -> tuple[int, int]:
    """(height, width) of a picture as a person sees it, from its header; nothing is decoded.

    ItemError for what `decode` would refuse by its header: another format, an animation, too many pixels, a mode
    without colours.
    """
    with _opened(file) as picture:
        turned = picture.format != "TIFF" and Image.Image.getexif(picture).get(_ORIENTATION) in _LYING
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def decode(data: bytes) -> Image.Image:
    """A picture as RGB: turned as its EXIF says, transparency over white, 16 bits rounded to 8; ItemError if it is
    damaged, cut, animated or too large."""
    with io.BytesIO(data) as file, _opened(file) as picture:
        return _rgb(ImageOps.exif_transpose(picture))


def fitted(picture: Image.Image, size: tuple[int, int], how: str) -> np.ndarray:
    """The picture at `size` (height, width), uint8 RGB [H, W, 3].

    exact: it must have that size (ItemError with both). cover: the largest centred part of that shape, scaled.
    contain: the whole, scaled, on black. Scaling is PIL's Lanczos.
    """
    height, width = size
    if (problem := misfit((picture.height, picture.width), size, how)) is not None:
        raise ItemError(problem)
    if (picture.height, picture.width) == size:
        return np.asarray(picture).copy()
    scale = (max if how == "cover" else min)(width / picture.width, height / picture.height)
    if how == "cover":  # cut first, then scale: a picture of one row would else grow beyond all memory
        across, down = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
        box = (max(0.0, across), max(0.0, down), picture.width - max(0.0, across), picture.height - max(0.0, down))
        return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box))
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    result = np.zeros((height, width, 3), np.uint8)
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    result[top : top + inner[1], left : left + inner[0]] = np.asarray(picture.resize(inner, Image.Resampling.LANCZOS))
    return result


def misfit(found: tuple[int, int], wanted: tuple[int, int], how: str) -> str | None:
    """Why a picture of the size `found` cannot stand for one of `wanted` (height, width); None if it can."""
    if how != "exact" or found == wanted:
        return None
    return (
        f"is {found[0]}x{found[1]} (height x width), not {wanted[0]}x{wanted[1]} as the video; "
        "dataset.resize: cover or contain would scale it"
    )


def too_large(height: int, width: int) -> str | None:
    """Why a picture of that size is not decoded; None if it is."""
    if height * width <= PIXELS:
        return None
    return f"is {height}x{width} (height x width), {height * width:,} pixels; allowed: at most {PIXELS:,}"


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """The picture in a file, its header checked; whatever PIL raises meanwhile is an ItemError."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            if problem := too_large(picture.height, picture.width):
                raise ItemError(problem)
            if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a photo and its extras
                raise ItemError("is animated or has several pages; allowed: one picture")
            if picture.mode not in (*PLAIN, *TRANSPARENT, *SIXTEEN_BITS):
                raise ItemError(f"has pixels of the kind {picture.mode}; allowed: 8 or 16 bits of grey, RGB or CMYK")
            yield picture
    except (ItemError, ConnectionError, TimeoutError):
        raise
    except UnidentifiedImageError as error:
        raise ItemError(f"is not a picture, or its header is damaged; allowed: {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # PIL's own limit, seen first
        found = re.search(r"\d+", str(error))
        pixels = f"{int(found[0]):,} pixels" if found else "too many pixels"
        raise ItemError(f"has {pixels}; allowed: at most {PIXELS:,}") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ItemError(f"cannot be read as a picture, or is damaged: {reason}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of any mode that `_opened` lets through."""
    clear = picture.info.get("transparency")
    if picture.mode in SIXTEEN_BITS:
        wide = np.asarray(picture).astype(np.uint32)
        grey = ((wide + 128) // 257).astype(np.uint8)  # 65535 is 257 x 255
        if isinstance(clear, int):
            grey[wide == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in TRANSPARENT or clear is not None:
        return Image.fromarray(over_white(np.asarray(picture.convert("RGBA"))))
    return picture.convert("RGB")
