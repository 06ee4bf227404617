"""Conditioning media of a stranger's making: where a cell may lead, and files that are larger than they look."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.plan.conftest import dataset, items_of, job, rejections
from vidgen import conditioning
from vidgen.conditioning import clips, limits, places
from vidgen.errors import ItemError, PlanError
from vidgen.plan.build import build
from vidgen.store.objects import Objects
from vidgen.types import Media, Request

SIDE = 64
REQUEST = Request("i2v", "p", "", 1, SIDE, SIDE, 5, 8.0, 1, 1.0, "x", resize="cover")


def png(level: int = 9, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def looked_at(source: Path, cells: list[Any], task: str = "i2v", **rooms: Any) -> tuple[list[int], list[str]]:
    """Rows that became items, and the reasons of the others; each cell in a row of its own beside one that is right."""
    name = {"i2v": "image", "v2v": "video"}[task]
    objects = Objects(f"memory://hostile/{source.parent.name}-{os.urandom(4).hex()}")
    dataset(source, {"prompt": ["a"] * len(cells), "pic": cells})
    rooms = {"columns": {"prompt": "prompt", name: "pic"}, "resize": "cover", **rooms}
    model = {"family": "testcard", "task": task}
    result = build(
        job(source, model=model, dataset={"path": str(source), **rooms}, sampling={"num_frames": 5}), objects
    )
    told = [row["reason"] for row in rejections(objects, result)]
    label = f"{name} (column 'pic')"
    assert all(reason.startswith(label) and reason.isprintable() for reason in told), told
    return [item.origin_row for item in items_of(objects, result)], [reason.removeprefix(label) for reason in told]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset's folder with pictures inside, one beside it, and links that lead there."""
    inside = tmp_path / "data"
    (inside / "pics").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "a.png").write_bytes(png())
    for name in ("a.png", "pics/b.png", "..c.png", "pics/%2e%2e"):
        (inside / name).write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    (inside / "near.png").symlink_to(inside / "a.png")
    return inside


# ---------------------------------------------------------------- where a cell may lead


def test_without_media_schemes_a_dataset_is_trusted_to_name_any_place(folder: Path) -> None:
    """The contract: absolute, or relative to the dataset, `..` and links included."""
    cells = ["a.png", "../secret.png", "up/secret.png", "link.png", str(folder.parent / "secret.png"), "pics/../a.png"]
    assert looked_at(folder / "p.parquet", cells) == ([0, 1, 2, 3, 4, 5], [])


def test_relative_lets_pass_what_lies_below_the_dataset_and_nothing_else(folder: Path) -> None:
    out = [
        *("../secret.png", "pics/../../secret.png", "./../secret.png", "..", "../data/a.png", "../database/a.png"),
        *("link.png", "up/secret.png", "up/data/../secret.png", "..\\secret.png", "%2e%2e/secret.png"),
        *(
            str(folder / "a.png"),
            "/etc/passwd",
            f"file://{folder}/a.png",
            "~/a.png/../../../a.png",
            "local:///etc/passwd",
        ),
        *(
            "https://example.org/a.png",
            "zip://a.png::file:///x.zip",
            "simplecache::a.png",
            "data:image/png;base64,AAAA",
        ),
        *("FILE:///etc/passwd", "a://b.png", "::", "a.png::", "memory://a.png"),
    ]
    cells = ["a.png", "pics/../a.png", "..c.png", "near.png", "./pics//b.png", "pics/%2e%2e", *out]
    kept, told = looked_at(folder / "p.parquet", cells, media_schemes=["relative"])
    assert kept == [0, 1, 2, 3, 4, 5]
    for cell, reason in zip(out, told, strict=True):
        assert reason.startswith(": ") and reason.endswith("; allowed (dataset.media_schemes): relative"), (
            cell,
            reason,
        )
    assert told[0].startswith(f": {folder}/../secret.png lies outside the dataset's folder")
    assert "https://example.org/a.png is of the scheme https" in told[out.index("https://example.org/a.png")]


def test_relative_and_a_scheme_allow_either(folder: Path) -> None:
    cells = ["a.png", "../secret.png", "memory://nowhere/a.png", "https://example.org/a.png"]
    kept, told = looked_at(folder / "p.parquet", cells, media_schemes=["relative", "memory"])
    assert (
        kept == [0] and "lies outside" in told[0] and "there is no such file" in told[1] and "scheme https" in told[2]
    )


def test_every_scheme_of_a_chain_must_be_allowed(folder: Path) -> None:
    zip_of({"a.png": png()}, folder.parent / "x.zip")
    chain = f"zip://a.png::file://{folder.parent}/x.zip"
    assert looked_at(folder / "p.parquet", [chain], media_schemes=["zip", "file"])[0] == [0]
    kept, told = looked_at(folder / "p.parquet", ["a.png", chain], media_schemes=["zip", "relative"])
    assert kept == [0] and "is of the scheme file; allowed (dataset.media_schemes): zip, relative" in told[0]


def test_file_means_any_file_of_the_disk(folder: Path) -> None:
    kept, told = looked_at(folder / "p.parquet", ["a.png", "../secret.png", "memory://a/b.png"], media_schemes=["file"])
    assert kept == [0, 1] and told[0].endswith("is of the scheme memory; allowed (dataset.media_schemes): file")


def test_a_folder_of_frames_may_not_lead_out_by_a_link(folder: Path) -> None:
    for name in ("clip", "led"):
        (folder / name).mkdir()
        for number in range(5):
            (folder / name / f"{number}.png").write_bytes(png(number))
    (folder / "led" / "3.png").unlink()
    (folder / "led" / "3.png").symlink_to(folder.parent / "secret.png")
    kept, told = looked_at(folder / "p.parquet", ["clip", "led"], "v2v", media_schemes=["relative"])
    assert kept == [0] and "led lies outside the dataset's folder" in told[0]


@pytest.mark.parametrize(
    "way",
    [
        "../x.png",
        "a/../../x.png",
        "%2e%2e/x.png",
        "%2E%2e/x.png",
        "..\\x.png",
        "s3://b/x.png",
        "https://h/y.png",
        "/x.png",
    ],
)
def test_a_remote_dataset_is_not_left_either(way: str) -> None:
    assert places.leaves(way, "https://host/data/")


@pytest.mark.parametrize("way", ["x.png", "a/../x.png", "a%20b.png", "..x/..y.png", "?x=..", "a b#c.png"])
def test_what_lies_below_a_remote_dataset_is_below_it(way: str) -> None:
    assert not places.leaves(way, "https://host/data/")


def test_a_link_that_is_turned_after_planning_is_noticed_by_its_digest(folder: Path) -> None:
    objects = Objects(f"memory://hostile/{folder.parent.name}")
    source = folder / "p.parquet"
    dataset(source, {"prompt": ["a"], "pic": ["near.png"]})
    rooms = {"columns": {"prompt": "prompt", "image": "pic"}, "media_schemes": ["relative"]}
    model = {"family": "testcard", "task": "i2v"}
    (item,) = items_of(objects, build(job(source, model=model, dataset={"path": str(source), **rooms}), objects))
    (folder.parent / "secret.png").write_bytes(png(200))
    (folder / "near.png").unlink()
    (folder / "near.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(ItemError, match=r"image: .*near.png is not what was planned: its digest is"):
        conditioning.read(item.request)


def test_places_that_are_no_files_are_reasons(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    cells = [
        "pipe.png",
        "/dev/zero",
        "/dev/stdin",
        "loop.png",
        "a\0b.png",
        "x" * 5_000,
        "a.png/b.png",
        "pics",
        "\x1b[2J",
        "\u202egnp.a",
    ]
    kept, told = looked_at(folder / "p.parquet", ["a.png", *cells])
    assert kept == [0] and len(told) == len(cells)
    for reason, words in zip(
        told,
        [
            "neither",
            "neither",
            "",
            "",
            "null byte",
            "too long",
            "no such file",
            "is a folder",
            "\\x1b[2J: there is no",
            "\\u202egnp.a: ",
        ],
        strict=True,
    ):
        assert words in reason, (words, reason)
    (folder / "frames").mkdir()
    os.close(os.open(os.fsencode(folder / "frames") + b"/\xff.png", os.O_CREAT))
    with pytest.raises(PlanError, match=r"frames has a file whose name is not UTF-8: '\\udcff.png'"):
        looked_at(folder / "p.parquet", ["frames"], "v2v")


# ---------------------------------------------------------------- bombs


@cache
def bombs() -> dict[str, bytes]:
    """Pictures that are small on the disk and would be huge, or never end, in memory."""
    found: dict[str, bytes] = {}
    row = b"\0" * (1 + 30_000 * 3)
    wide = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    found["2.7 GB of black"] = (
        b"\x89PNG\r\n\x1a\n" + wide + chunk(b"IDAT", zlib.compress(row * 40, 9)) + chunk(b"IEND", b"")
    )
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 80_000_000, 9))
    found["text of 80 MB in a chunk"] = b"\x89PNG\r\n\x1a\n" + small + text + png()[33:]
    colours = chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * 80_000_000, 9))
    found["a profile of 80 MB"] = b"\x89PNG\r\n\x1a\n" + small + colours + png()[33:]
    found["a chunk of 4 GB"] = b"\x89PNG\r\n\x1a\n" + small + struct.pack(">I", 0x7FFFFFFF) + b"IDAT"
    found["a gif of 4 gigapixels"] = (
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;"
    )
    found["a bitmap of 2^62 pixels"] = b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0
    )
    entries = [
        (256, 4, 1, 60_000),
        (257, 4, 1, 60_000),
        (258, 3, 1, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 9),
    ]
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    found["a tiff of 3.6 gigapixels"] = (
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + tags + struct.pack("<I", 8)
    )
    found["a tiff with 4 billion values of one tag"] = (
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 273, 4, 2**32 - 1, 8) + b"\0\0\0\0"
    )
    return found


PROGRAM = """
import resource, sys
from pathlib import Path
from vidgen.conditioning import inspect, pictures
from vidgen.errors import ItemError
from PIL import Image, PngImagePlugin, GifImagePlugin, BmpImagePlugin, TiffImagePlugin
now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + (600 << 20),) * 2)
for place in sys.argv[1:]:
    for look in (lambda: inspect.at(place, False), lambda: pictures.decode(Path(place).read_bytes())):
        try:
            look()
            print("seen")
        except ItemError as error:
            print(error)
"""


def test_a_picture_that_would_burst_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """In a process of its own, that may not have more than 600 MB beyond what it began with."""
    made = bombs()
    for number, data in enumerate(made.values()):
        assert len(data) < 2_000_000
        (tmp_path / f"{number}").write_bytes(data)
    places = [str(tmp_path / f"{number}") for number in range(len(made))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *places], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    for name, seen, decoded in zip(made, told[::2], told[1::2], strict=True):
        if name.startswith(("text", "a profile")):  # what is beside the picture is passed over, or too much
            assert decoded == "seen" or "picture" in decoded, (name, decoded)
            continue
        refused = (f"allowed: at most {limits.PIXELS:,}", "is not a picture", "is damaged")
        assert any(words in decoded for words in refused), (name, seen, decoded)


def test_bombs_in_cells_and_files_are_rejections_and_the_others_go_on(folder: Path) -> None:
    names = ["2.7 GB of black", "a gif of 4 gigapixels", "a bitmap of 2^62 pixels", "a tiff of 3.6 gigapixels"]
    made = bombs()
    for number, name in enumerate(names):
        (folder / f"{number}.bin").write_bytes(made[name])
    kept, told = looked_at(folder / "p.parquet", ["a.png", *(f"{n}.bin" for n in range(len(names)))])
    assert kept == [0] and len(told) == len(names)
    assert all("pixels; allowed: at most 67,108,864" in reason or "picture" in reason for reason in told), told
    kept, told = looked_at(folder / "q.parquet", [png(), *(made[name] for name in names)])
    assert kept == [0] and len(told) == len(names)


def zip_of(entries: dict[str, bytes], place: Path) -> Path:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return place


def test_zips_that_would_burst_or_climb_are_refused_or_harmless(folder: Path) -> None:
    """A frame too large, one that lies about its size, a directory of a million names, names that climb (hidden, as
    all that begin with a dot) or stand at the root: frames are read in memory, so a name is nothing but an order."""
    zeros = b"\0" * (limits.IMAGE_BYTES + 1)
    zip_of({"\x1b[2J.png": zeros}, folder / "huge.zip")
    lying = zip_of({f"{n}.png": zeros[: 30 << 20] for n in range(5)}, folder / "lying.zip").read_bytes()
    (folder / "lying.zip").write_bytes(lying.replace(struct.pack("<I", 30 << 20), struct.pack("<I", 999)))
    zip_of({f"/etc/{n}.png": png(n) for n in range(5)}, folder / "rooted.zip")
    zip_of({f"../../../{n}.png": png(n) for n in range(5)}, folder / "climbing.zip")
    empty = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65_534, 65_534, 1 << 30, 4, 0)
    (folder / "many.zip").write_bytes(b"PK\3\4" + empty)
    (folder / "nested.zip").write_bytes(zip_of({"inner.zip": png()}, folder / "inner.zip").read_bytes())
    cells = ["rooted.zip", "huge.zip", "lying.zip", "many.zip", "nested.zip", "climbing.zip"]
    before = sorted(path for path in folder.parent.rglob("*"))
    kept, told = looked_at(folder / "p.parquet", cells, "v2v")
    assert kept == [0]
    assert "frame \\x1b[2J.png has 134,217,729 bytes; allowed: at most 134,217,728" in told[0]
    assert "lying.zip " in told[1] and "damaged" in told[1]
    assert "is a zip of 65,534 files with a directory of 1,073,741,824 bytes; allowed: 50,000" in told[2]
    assert all("is a zip without .png frames" in reason for reason in told[3:])
    clip = conditioning.read(_video(folder / "rooted.zip")).video
    assert clip is not None and [int(frame[0, 0, 0]) for frame in clip] == list(range(5))
    assert sorted(path for path in folder.parent.rglob("*")) == sorted([*before, folder / "p.parquet"])


def test_a_zip_entry_is_unpacked_no_further_than_it_declares(folder: Path) -> None:
    lying = zip_of({"0.png": b"\0" * (60 << 20)}, folder / "lying.zip").read_bytes()
    lying = lying.replace(struct.pack("<I", 60 << 20), struct.pack("<I", 999))
    tracemalloc.start()
    try:
        with pytest.raises(ItemError, match="damaged"):
            clips.header(io.BytesIO(lying))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def _video(place: Path) -> Request:
    return Request("v2v", "p", "", 1, SIDE, SIDE, 5, 8.0, 1, 1.0, "x", video=Media(str(place), ""), resize="cover")


def _ffmpeg(*arguments: str) -> None:
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-loglevel", "error", "-y", *arguments], check=True, timeout=60)


def test_a_video_of_too_many_pixels_or_frames_ends_at_the_limit(tmp_path: Path) -> None:
    wide, long = tmp_path / "wide.gif", tmp_path / "long.mp4"
    wide.write_bytes(bombs()["a gif of 4 gigapixels"])
    _ffmpeg("-f", "lavfi", "-i", "color=s=16x16:r=100:d=2", "-c:v", "libx264", "-preset", "ultrafast", str(long))
    with pytest.raises(ItemError, match=r"video: .*wide.gif could not be decoded"):
        conditioning.read(_video(wide))
    with pytest.raises(ItemError, match=r"video: .*long.mp4 has 6 frames or more; num_frames is 5"):
        conditioning.read(_video(long))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"),
        ("a.ffconcat", "ffconcat version 1.0\nfile '{secret}'\n"),
        ("a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ("a.mpd", '<?xml version="1.0"?><MPD><Period><BaseURL>file://{secret}</BaseURL></Period></MPD>'),
        ("a.svg", '<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{secret}"/></svg>'),
        ("a.mp4", "#EXTM3U\n#EXTINF:1,\n{secret}\n"),
        ("a.avi", "[playlist]\nFile1={secret}\n"),
    ],
)
def test_a_file_that_names_other_files_opens_none_of_them(name: str, text: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    _ffmpeg("-f", "lavfi", "-i", f"color=s={SIDE}x{SIDE}:r=8:d=0.625", str(secret))
    assert len(conditioning.read(_video(secret)).video) == 5  # type: ignore[arg-type]
    (tmp_path / name).write_text(text.format(secret=secret))
    with pytest.raises(ItemError, match=rf"video: .*{name}"):
        conditioning.read(_video(tmp_path / name))


def test_a_picture_of_noise_with_one_bit_wrong_is_itself_or_refused(tmp_path: Path) -> None:
    """Any damage in any format is an ItemError, whatever the library raised."""
    drawn = np.random.default_rng(0)
    pixels = Image.fromarray(drawn.integers(0, 255, (24, 24, 3), np.uint8))
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        pixels.save(buffer, format)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            data[int(drawn.integers(len(data)))] ^= 1 << int(drawn.integers(8))
            (tmp_path / "a").write_bytes(data)
            request = Request("i2v", "p", "", 1, 24, 24, 5, 8.0, 1, 1.0, "x", image=Media(str(tmp_path / "a"), ""))
            try:
                found = conditioning.read(request).image
                assert found is not None and found.shape == (24, 24, 3)
            except ItemError as error:
                assert str(error).startswith("image: ")
