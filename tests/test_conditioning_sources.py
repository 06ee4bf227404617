"""Where media lie: paths, URLs and cells are found again, and their digests tell what was changed."""

from __future__ import annotations

import hashlib
import io
import threading
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vidgen import conditioning
from vidgen.conditioning import cells, inspect, limits, places, sources
from vidgen.errors import InfrastructureError, ItemError
from vidgen.types import Media, Request

REQUEST = Request("i2v", "p", "", 1, 16, 16, 3, 8.0, 1, 1.0, "x")


def png(level: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def level(media: Media) -> int:
    image = conditioning.read(replace(REQUEST, image=media)).image
    assert image is not None
    return int(image[0, 0, 0])


class Tagged(MemoryFileSystem):
    """A store in memory that names its contents, as object stores do; `log` is what was asked of it."""

    protocol = "tagged"
    store: dict[str, Any] = {}  # noqa: RUF012 (fsspec's own)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    log: list[str] = []  # noqa: RUF012

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **kwargs)
        if found["type"] == "file":
            found["ETag"] = hashlib.md5(self.store[self._strip_protocol(path)].getvalue()).hexdigest()
        return found

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        names = super().ls(path, detail=False, **kwargs)
        return [self.info(name) for name in names] if detail else names

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "rb":
            self.log.append(path)
        return super()._open(path, mode, **kwargs)


fsspec.register_implementation("tagged", Tagged, clobber=True)


@pytest.fixture(params=["memory", "tagged"])
def bucket(request: pytest.FixtureRequest) -> str:
    """The URL of an empty folder of a remote store, with and without names of contents."""
    return f"{request.param}://media-{uuid.uuid4()}"


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    cells.forget()
    yield
    cells.forget()


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("text", "folder", "url"),
    [
        ("a.png", "/data/", "/data/a.png"),
        ("sub/a b?.png", "/data/", "/data/sub/a b?.png"),
        ("/x/a.png", "/data/", "/x/a.png"),
        ("/x/a.png", "s3://b/data/", "/x/a.png"),
        ("a.png", "s3://b/data/", "s3://b/data/a.png"),
        ("https://host/a.png", "/data/", "https://host/a.png"),
        ("zip://a.png::s3://b/c.zip", "/data/", "zip://a.png::s3://b/c.zip"),
        ("data:image/png;base64,AAAA", "/data/", "data:image/png;base64,AAAA"),
    ],
)
def test_a_cell_is_a_url_or_relative_to_the_datasets_folder(text: str, folder: str, url: str) -> None:
    assert places.located(text, folder) == url


@pytest.mark.parametrize(
    ("url", "schemes"),
    [
        ("/data/a.png", ("file",)),
        ("file:///data/a.png", ("file",)),
        ("s3://b/a.png", ("s3",)),
        ("zip://a.png::s3://b/c.zip", ("zip", "s3")),
        ("simplecache::https://host/a.png", ("simplecache", "https")),
        ("zip://a.png::/data/c.zip", ("zip", "file")),
        ("data:image/png;base64,AA//AA", ("data",)),
    ],
)
def test_every_scheme_that_opening_uses_is_told(url: str, schemes: tuple[str, ...]) -> None:
    assert places.schemes(url) == schemes


@given(st.text(min_size=1), st.integers(0, 2**40), st.text(min_size=1))
def test_the_place_of_a_cell_is_read_as_it_was_written(file: str, row: int, column: str) -> None:
    try:
        file.encode(), column.encode()
    except UnicodeEncodeError:
        return
    url = places.cell_url(file, row, column)
    assert url.startswith("cell:") and places.parse_cell(url) == (file, row, column)


@pytest.mark.parametrize(
    "url", ["s3://b/a", "cell:a", "cell:a?row=1", "cell:a?row=x&column=c", "cell:a?row=1&row=2&column=c"]
)
def test_what_is_no_place_of_a_cell_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the place of a cell"):
        places.parse_cell(url)


# ---------------------------------------------------------------- digests


def test_a_local_digest_is_the_sha256_of_the_bytes_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    expected = hashlib.sha256(png(7)).hexdigest()
    assert inspect.at(str(tmp_path / "a.png"), False).media.digest == expected
    assert inspect.at(f"file://{tmp_path}/a.png", False).media.digest == expected
    assert inspect.held(png(7), expected, "cell:x?row=0&column=c", False).media.digest == expected
    assert level(Media("", expected, png(7))) == 7


@pytest.mark.parametrize("name", ["a.png", "clip"])
def test_a_digest_changes_with_the_content_and_reading_notices(bucket: str, name: str, tmp_path: Path) -> None:
    for folder in (bucket, str(tmp_path)):
        video = name == "clip"
        names = [f"{name}/{n}.png" for n in range(3)] if video else [name]
        for file in names:
            with fsspec.open(f"{folder}/{file}", "wb") as handle:
                handle.write(png(7))
        seen = inspect.at(f"{folder}/{name}", video)
        assert seen.size == (16, 16) and seen.frames == (3 if video else None)
        request = replace(REQUEST, video=seen.media) if video else replace(REQUEST, image=seen.media)
        read = conditioning.read(request)
        picture = read.video[0] if read.video is not None else read.image
        assert picture is not None and picture[0, 0, 0] == 7
        with fsspec.open(f"{folder}/{names[-1]}", "wb") as handle:
            handle.write(png(8))
        assert inspect.at(f"{folder}/{name}", video).media.digest != seen.media.digest
        with pytest.raises(ItemError, match=r"is not what was planned: its digest is \w{12}, the plan has \w{12}"):
            conditioning.read(request)


def test_a_folder_with_another_name_for_a_frame_is_another_video(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png(7))
    before = inspect.at(str(tmp_path), True).media.digest
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    assert inspect.at(str(tmp_path), True).media.digest != before


def test_a_remote_image_whose_store_names_its_content_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"tagged://media-{uuid.uuid4()}/a.png"
    fsspec.filesystem("tagged").pipe_file(url, png(7))
    info = fsspec.filesystem("tagged").info(url)
    digest = inspect.at(url, False).media.digest
    assert digest == hashlib.sha256(f"remote\0{url}\0{info['size']}\0{info['ETag']}".encode()).hexdigest()
    Tagged.log.clear()
    assert sources.find(url).digest(limits.IMAGE_BYTES) == digest and Tagged.log == []


def test_a_remote_video_is_read_through_a_file_that_is_gone_afterwards(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = f"{bucket}/clip.gif"
    frames = [Image.new("RGB", (16, 16), (40 * n, 0, 0)) for n in range(3)]
    with fsspec.open(url, "wb") as handle:
        frames[0].save(handle, "GIF", save_all=True, append_images=frames[1:])
    seen = inspect.at(url, True)
    read = conditioning.read(replace(REQUEST, video=seen.media)).video
    assert read is not None and [int(f[0, 0, 0]) for f in read] == [0, 40, 80] and list(tmp_path.iterdir()) == []
    with pytest.raises(ItemError, match="not what was planned"):
        conditioning.read(replace(REQUEST, video=replace(seen.media, digest="0" * 64)))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize("video", [False, True])
def test_what_is_not_there_is_named(bucket: str, video: bool, tmp_path: Path) -> None:
    for url in (f"{bucket}/no.png", str(tmp_path / "no.png"), str(tmp_path / "no" / "no.png")):
        for look in (lambda url=url: inspect.at(url, video), lambda url=url: level(Media(url, ""))):
            with pytest.raises(ItemError, match=r"no.png: there is no such file"):
                look()


def test_places_that_cannot_be_understood_are_reasons(tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 300))
    for url, words in (("nosuch://a/b.png", "cannot be opened: Protocol not known"), (long, "cannot be opened")):
        with pytest.raises(ItemError, match=words):
            inspect.at(url, False)
    with pytest.raises(ItemError, match="is a folder, not a picture"):
        inspect.at(str(tmp_path), False)
    with pytest.raises(ItemError, match="is neither a file nor a folder"):
        inspect.at("/dev/zero", False)
    with pytest.raises(ItemError, match=r"is a folder without .png frames"):
        inspect.at(str(tmp_path), True)


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError("refused"), TimeoutError("slow"), FileNotFoundError("as http says it")]
)
def test_a_store_that_does_not_answer_says_nothing_of_the_item(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(error, FileNotFoundError):
        error.__cause__ = OSError("Cannot connect to host")

    def fails(self: Any, path: str, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Tagged, "info", fails)
    with pytest.raises(InfrastructureError, match=r"tagged://b/a.png cannot be reached"):
        level(Media("tagged://b/a.png", ""))


def test_a_picture_is_not_a_video() -> None:
    for format in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, format)
        with pytest.raises(ItemError, match="is a picture, not a video"):
            inspect.held(buffer.getvalue(), "", "cell:x?row=0&column=c", True)


# ---------------------------------------------------------------- cells


def written(place: Path, values: list[Any], kind: pa.DataType | None = None, **options: Any) -> Path:
    pq.write_table(pa.table({"n": list(range(len(values))), "pic": pa.array(values, kind)}), place, **options)
    return place


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_the_bytes_of_any_row_are_read_again(kind: pa.DataType, tmp_path: Path) -> None:
    values = [f"cell {n}".encode() if n % 7 else None for n in range(500)]
    array = pa.array(values, pa.binary())
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    place = tmp_path / "a.parquet"
    pq.write_table(pa.table({"pic": array}), place, row_group_size=130)
    order = [1, 2, 3, 130, 131, 499, 5, 64, 65, 200, 2, 499, 498]
    for row in order:
        assert cells.read_cell(places.cell_url(str(place), row, "pic"), 100) == values[row]


def test_a_struct_gives_its_bytes_and_a_column_may_have_any_name(tmp_path: Path) -> None:
    place = tmp_path / "a b%&?#.parquet"
    struct = pa.array([{"bytes": b"x", "path": "p"}, {"bytes": b"y", "path": None}])
    pq.write_table(pa.table({"my pic.1 &=?": struct, "plain.x": [b"1", b"2"]}), place)
    assert cells.read_cell(places.cell_url(str(place), 1, "my pic.1 &=?"), 9) == b"y"
    assert cells.read_cell(places.cell_url(str(place), 1, "plain.x"), 9) == b"2"


def test_neighbouring_rows_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "a.parquet", [bytes([n % 256]) * 50 for n in range(1000)], row_group_size=1000)
    passes: list[Any] = []
    batches = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, *rest: Any, **more: Any) -> Any:
        passes.append(more["row_groups"])
        return batches(self, *rest, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    for row in range(0, 1000, 3):
        assert cells.read_cell(places.cell_url(str(place), row, "pic"), 50) == bytes([row % 256]) * 50
    assert len(passes) == 1
    cells.read_cell(places.cell_url(str(place), 0, "pic"), 50)
    assert len(passes) == 2


def test_large_cells_are_held_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 cells of 1 MiB, all different, in one row group: held are those of a batch, and what Arrow reads ahead."""
    most = 4 << 20
    monkeypatch.setattr(cells, "CELL_BATCH_BYTES", most)
    place = tmp_path / "a.parquet"
    written(
        place, [bytes([n]) * (1 << 20) for n in range(40)], use_dictionary=False, compression="none", write_batch_size=1
    )
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for row in (0, 1, 20, 21, 39):
            assert cells.read_cell(places.cell_url(str(place), row, "pic"), 1 << 20) == bytes([row]) * (1 << 20)
            assert pa.total_allocated_bytes() - before < 3 * most
        assert tracemalloc.get_traced_memory()[1] < 3 * most
    finally:
        tracemalloc.stop()


def test_one_value_of_many_rows_is_not_held_once_a_row(tmp_path: Path) -> None:
    place = written(tmp_path / "a.parquet", [bytes(500_000)] * 400)
    before = pa.total_allocated_bytes()
    assert len(cells.read_cell(places.cell_url(str(place), 399, "pic"), 500_000)) == 500_000
    assert pa.total_allocated_bytes() - before < 3 * limits.CELL_BATCH_ROWS * 500_000


def test_few_files_are_held_open(tmp_path: Path) -> None:
    for number in range(10):
        written(tmp_path / f"{number}.parquet", [b"x"])
    for number in range(10):
        cells.read_cell(places.cell_url(str(tmp_path / f"{number}.parquet"), 0, "pic"), 9)
    assert len(cells._cursors) == cells.CURSORS


def test_threads_share_the_cursors(tmp_path: Path) -> None:
    place = written(tmp_path / "a.parquet", [f"{n}".encode() for n in range(300)], row_group_size=100)
    wrong: list[int] = []

    def read(start: int) -> None:
        for row in range(start, 300, 7):
            if cells.read_cell(places.cell_url(str(place), row, "pic"), 9) != f"{row}".encode():
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_dataset_that_was_changed_is_told_and_a_later_read_looks_again(tmp_path: Path) -> None:
    place = written(tmp_path / "a.parquet", [png(n) for n in range(3)])
    digest = hashlib.sha256(png(1)).hexdigest()
    media = Media(places.cell_url(str(place), 1, "pic"), digest)
    assert level(media) == 1
    cells.forget()
    written(place, [png(5), png(6), png(7)])
    with pytest.raises(ItemError, match=r"image: cell:.*pic is not what was planned"):
        level(media)
    cells.forget()
    written(place, [png(5)])
    with pytest.raises(ItemError, match=r"a.parquet: no row 1 any more: the dataset was changed"):
        level(media)
    pq.write_table(pa.table({"other": [1]}), place)
    with pytest.raises(ItemError, match="no column 'pic' any more"):
        level(media)
    place.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ItemError, match="cannot be read"):
        level(media)
    place.unlink()
    with pytest.raises(ItemError, match="there is no such file any more"):
        level(media)
    written(place, [None, png(1)], pa.binary())
    assert level(media) == 1
    with pytest.raises(ItemError, match="holds no bytes any more"):
        level(replace(media, url=places.cell_url(str(place), 0, "pic")))


def test_a_cell_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "a.parquet", [b"x" * 100])
    with pytest.raises(ItemError, match="has 100 bytes; allowed: at most 99"):
        cells.read_cell(places.cell_url(str(place), 0, "pic"), 99)


def test_a_cell_of_a_remote_dataset_is_read(bucket: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"pic": [png(9)]}), buffer)
    with fsspec.open(f"{bucket}/a.parquet", "wb") as handle:
        handle.write(buffer.getvalue())
    assert level(Media(places.cell_url(f"{bucket}/a.parquet", 0, "pic"), "")) == 9


class Answers(BaseHTTPRequestHandler):
    """A picture at /a.png; /here leads to it, /away to a server of another scheme."""

    def do_GET(self) -> None:
        target = {"/here": "/a.png", "/away": "https://127.0.0.1:9/a.png", "/out": "ftp://127.0.0.1/a.png"}.get(
            self.path
        )
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        self.send_header("Content-Length", "0" if target else str(len(png(7))))
        self.end_headers()
        if not target and self.command == "GET":
            self.wfile.write(png(7))

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_redirect_is_followed_within_its_scheme(web: str) -> None:
    assert sources.find(f"http://{web}/here").read(limits.IMAGE_BYTES) == png(7)


@pytest.mark.parametrize("url", ["http://{}/away", "http://{}/out", "simplecache::http://{}/away"])
def test_a_redirect_to_another_scheme_is_refused_before_that_is_asked(url: str, web: str) -> None:
    with pytest.raises(
        ItemError, match=r"http://.* leads to another scheme, (https|ftp)://127.0.0.1.*, which is not followed"
    ):
        sources.find(url.format(web)).read(limits.IMAGE_BYTES)


def test_a_medium_whose_size_nobody_says_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * 100)
    unknown = replace(sources.find(str(tmp_path / "long")), size=None)
    assert unknown.digest(100) == hashlib.sha256(b"x" * 100).hexdigest()
    with pytest.raises(ItemError, match="long has more than 99 bytes"):
        unknown.digest(99)
