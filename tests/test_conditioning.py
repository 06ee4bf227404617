"""Pictures as conditioning: every kind of file becomes the right pixels at the right size, and a bad one a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vidgen import conditioning
from vidgen.conditioning import limits, pictures
from vidgen.errors import ItemError
from vidgen.types import Media, Request

HEIGHT, WIDTH = 24, 40
REQUEST = Request("i2v", "p", "", 1, HEIGHT, WIDTH, 5, 8.0, 1, 1.0, "x")


def colours(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(np.uint8)


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def image(data: bytes, **changes: Any) -> np.ndarray:
    """The image of a request whose medium holds these bytes."""
    read = conditioning.read(replace(REQUEST, image=Media("", "", data), **changes)).image
    assert read is not None and read.dtype == np.uint8
    return read


def refused(data: bytes, **changes: Any) -> str:
    with pytest.raises(ItemError) as caught:
        image(data, **changes)
    return str(caught.value)


def test_a_request_without_media_has_none() -> None:
    assert conditioning.read(REQUEST) == conditioning.Conditioning(None, None, None)


def test_image_and_last_image_are_read_from_where_they_lie(tmp_path: Path) -> None:
    for name, level in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (WIDTH, HEIGHT), (level, 0, 0)).save(tmp_path / name)
    media = [Media(str(tmp_path / name), "") for name in ("a.png", "b.png")]
    read = conditioning.read(replace(REQUEST, image=media[0], last_image=media[1]))
    assert read.image is not None and read.last_image is not None and read.video is None
    assert read.image.shape == (HEIGHT, WIDTH, 3)
    assert (read.image[0, 0, 0], read.last_image[0, 0, 0]) == (10, 200)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_a_lossless_file_comes_back_exactly(format: str, options: dict[str, Any]) -> None:
    assert np.array_equal(image(encoded(Image.fromarray(colours()), format, **options)), colours())


def test_a_jpeg_is_near_and_a_photo_with_extras_is_its_photo() -> None:
    # Smooth gradients at the best quality: within rounding of the colour conversion and the transform.
    jpeg = encoded(Image.fromarray(colours()), "JPEG", quality=100, subsampling=0)
    assert np.abs(image(jpeg).astype(int) - colours()).max() <= 4
    other = Image.new("RGB", (8, 8))
    photo = encoded(Image.fromarray(colours()), "MPO", quality=100, subsampling=0, save_all=True, append_images=[other])
    assert np.array_equal(image(photo), image(jpeg))


def test_grey_and_palette_and_bits_become_rgb() -> None:
    grey = Image.fromarray(colours()[..., 0])
    assert np.array_equal(image(encoded(grey)), np.repeat(colours()[..., :1], 3, -1))
    palette = Image.fromarray(colours()).quantize(16)
    assert np.array_equal(image(encoded(palette)), np.asarray(palette.convert("RGB")))
    assert set(np.unique(image(encoded(grey.convert("1"))))) == {0, 255}


def test_sixteen_bits_are_scaled_to_eight_not_clipped() -> None:
    wide = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    expected = np.round(wide / 65535 * 255).astype(np.uint8)
    for format in ("PNG", "TIFF"):
        read = image(encoded(Image.fromarray(wide), format))
        assert np.array_equal(read, np.repeat(expected[..., None], 3, -1)), format


def test_sixteen_bit_colours_keep_their_high_byte() -> None:
    rows = b"".join(b"\0" + struct.pack(f">{3 * WIDTH}H", *([0x1234, 0x8000, 0xFFFF] * WIDTH)) for _ in range(HEIGHT))
    png = _png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0), zlib.compress(rows))
    assert (image(png) == (0x12, 0x80, 0xFF)).all()


def test_a_clear_colour_of_sixteen_bits_is_white() -> None:
    rows = b"".join(b"\0" + struct.pack(f">{WIDTH}H", *([1000] + [2000] * (WIDTH - 1))) for _ in range(HEIGHT))
    png = _png(
        struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 0, 0, 0, 0), zlib.compress(rows), tRNS=struct.pack(">H", 1000)
    )
    read = image(png)
    assert (read[:, 0] == 255).all() and (read[:, 1:] == 8).all()


@pytest.mark.parametrize("alpha", [0, 1, 128, 254, 255])
def test_transparency_is_over_white(alpha: int) -> None:
    picture = Image.new("RGBA", (WIDTH, HEIGHT), (200, 100, 0, alpha))
    expected = [round((c * alpha + 255 * (255 - alpha)) / 255) for c in (200, 100, 0)]
    assert (image(encoded(picture)) == expected).all()
    assert (image(encoded(picture, "WEBP", lossless=True, exact=True)) == expected).all()
    grey = Image.new("LA", (WIDTH, HEIGHT), (100, alpha))
    assert (image(encoded(grey)) == expected[1]).all()


def test_a_clear_colour_of_a_palette_or_grey_is_white() -> None:
    palette = Image.new("P", (WIDTH, HEIGHT), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        read = image(encoded(palette, format, transparency=0))
        assert tuple(read[0, 0]) == (255, 255, 255) and tuple(read[1, 1]) == (10, 20, 30), format
    grey = Image.new("L", (WIDTH, HEIGHT), 50)
    grey.putpixel((0, 0), 7)
    read = image(encoded(grey, transparency=7))
    assert tuple(read[0, 0]) == (255, 255, 255) and tuple(read[1, 1]) == (50, 50, 50)


def test_a_cmyk_jpeg_is_the_colour_that_was_printed() -> None:
    cmyk = Image.new("RGB", (WIDTH, HEIGHT), (180, 60, 20)).convert("CMYK")
    assert np.abs(image(encoded(cmyk, "JPEG", quality=100)).astype(int) - (180, 60, 20)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(format: str, orientation: int) -> None:
    upright = Image.fromarray(colours())
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # values of Image.Transpose that lay the picture as a camera did
    lying = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    data = encoded(lying, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(image(data), expected)
    assert np.abs(expected.astype(int) - colours()).max() <= (60 if format == "JPEG" else 0)
    assert pictures.header_size(io.BytesIO(data)) == (HEIGHT, WIDTH)


# ---------------------------------------------------------------- sizes


def test_exact_refuses_another_size_with_both() -> None:
    message = refused(encoded(Image.fromarray(colours(25, 40))))
    assert message.startswith("image: the data is 25x40 (height x width), not 24x40")


def test_cover_fills_the_frame_from_the_middle() -> None:
    wide = np.zeros((24, 120, 3), np.uint8)
    wide[:, 40:80] = colours()
    assert np.array_equal(image(encoded(Image.fromarray(wide)), resize="cover"), colours())
    tall = np.zeros((72, 40, 3), np.uint8)
    tall[24:48] = colours()
    assert np.array_equal(image(encoded(Image.fromarray(tall)), resize="cover"), colours())


def test_contain_shows_the_whole_on_black() -> None:
    picture = Image.new("RGB", (20, 20), (255, 255, 255))
    read = image(encoded(picture), resize="contain")
    assert (read[:, 8:32] == 255).all() and not read[:, :8].any() and not read[:, 32:].any()


def test_scaling_is_lanczos_of_pil() -> None:
    picture = Image.fromarray(colours(48, 80))
    expected = np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    for how in ("cover", "contain"):
        assert np.array_equal(image(encoded(picture), resize=how), expected), how


@settings(deadline=None, max_examples=60)
@given(*(st.integers(1, 90) for _ in range(4)), st.sampled_from(["cover", "contain"]))
def test_any_picture_meets_any_size(height: int, width: int, high: int, wide: int, how: str) -> None:
    """White stays white to the edge: `cover` leaves no black, `contain` leaves it on one axis alone and evenly."""
    read = pictures.fitted(Image.new("RGB", (width, height), (255, 255, 255)), (high, wide), how)
    assert read.shape == (high, wide, 3) and read.dtype == np.uint8
    white = read.min(axis=2) == 255
    if how == "cover":
        assert white.all()
        return
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    assert white.sum() == len(rows) * len(columns) and (len(rows) == high or len(columns) == wide)
    assert abs(rows[0] - (high - 1 - rows[-1])) <= 1 and abs(columns[0] - (wide - 1 - columns[-1])) <= 1
    if high * width == height * wide:
        assert white.all()


def test_a_picture_of_one_row_covers_without_growing_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resize: Callable[..., Image.Image] = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert pictures.fitted(Image.new("RGB", (60_000, 1), (9, 9, 9)), (512, 512), "cover").shape == (512, 512, 3)
    assert sizes == [(512, 512)]


# ---------------------------------------------------------------- what is refused


def _animation(format: str) -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (n * 60, 0, 0)) for n in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_or_several_pages_are_refused(format: str) -> None:
    assert "is animated or has several pages; allowed: one picture" in refused(_animation(format))


def test_a_gif_of_one_frame_is_a_picture() -> None:
    assert (image(encoded(Image.new("P", (WIDTH, HEIGHT), 0), "GIF")) == 0).all()


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_that_are_no_colours_of_8_or_16_bits_are_refused(mode: str) -> None:
    assert f"has pixels of the kind {mode}" in refused(encoded(Image.new(mode, (WIDTH, HEIGHT)), "TIFF"))


@pytest.mark.parametrize("data", [b"", b"no picture", b"%PDF-1.7\n", b"P6 1 1 255 abc", b"<svg></svg>"])
def test_what_is_no_picture_is_refused_with_the_formats(data: bytes) -> None:
    assert "is not a picture, or its header is damaged; allowed: PNG, JPEG, WEBP, BMP, GIF, TIFF" in refused(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_cut_file_is_refused(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    data = encoded(Image.fromarray(noise), format)
    assert refused(data[: int(len(data) * share)]).startswith("image: the data ")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "MPO"]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 5000),
)
def test_whatever_is_done_to_a_file_it_is_pixels_or_a_reason(
    format: str, changes: list[tuple[int, int]], cut: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if format in ("BMP", "GIF") else {"exif": exif}
    data = bytearray(encoded(Image.fromarray(colours(12, 9)), format, **options))
    for place, value in changes:
        data[place % len(data)] = value
    if cut % 3 == 0:
        del data[cut % len(data) :]
    try:
        read = image(bytes(data), resize="contain")
    except ItemError as error:
        assert str(error).startswith("image: the data ")
    else:
        assert read.shape == (HEIGHT, WIDTH, 3)
    with contextlib.suppress(ItemError):
        pictures.header_size(io.BytesIO(bytes(data)))


def _png(header: bytes, pixels: bytes, **chunks: bytes) -> bytes:
    parts = [
        (b"IHDR", header),
        *((name.encode(), body) for name, body in chunks.items()),
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [8193, 30_000, 60_000])
def test_too_many_pixels_are_refused_by_the_header_whatever_pil_allows(
    side: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    bomb = _png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(bytes(1 << 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert f"is {side}x{side} (height x width), {side * side:,} pixels; allowed: at most" in refused(bomb)
    monkeypatch.undo()
    assert refused(bomb).startswith("image: the data ")


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "big.png"
    with place.open("wb") as file:
        file.truncate(limits.IMAGE_BYTES + 1)
    monkeypatch.setattr(LocalFileSystem, "open", lambda *rest, **more: pytest.fail("it was read"))
    with pytest.raises(ItemError, match=r"image: .*big.png has 134,217,729 bytes; allowed: at most 134,217,728"):
        conditioning.read(replace(REQUEST, image=Media(str(place), "")))


def test_text_that_unpacks_to_more_than_it_seems_is_refused() -> None:
    text = zlib.compress(bytes(80 << 20))
    bomb = _png(struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\0\0"), zTXt=b"k\0\0" + text)
    assert "Decompressed data too large" in refused(bomb, resize="contain")
