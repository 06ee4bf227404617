"""The static gallery, read back from its files as a browser would get them."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from PIL import Image

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen import media
from vidgen.errors import PlanError
from vidgen.models.testcard import backend, spec
from vidgen.plan.build import build
from vidgen.report import gallery
from vidgen.store.objects import Objects
from vidgen.types import Hooks, Request

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \"q\" 'a' \u2028 é"


def _mp4(folder: Path) -> bytes:
    values = spec.defaults("t2v", spec.read({})) | {"task": "t2v", "prompt": "p", "seed": 1, "num_frames": 3}
    (video,) = backend.load().generate([Request(**values | {"params": ()})], Hooks())
    return media.write(video, folder / "card.mp4").path.read_bytes()


def _row(number: int, status: str = "done", **more: Any) -> dict[str, Any]:
    item_id = f"{number:024x}"
    video = f"data/{item_id[:2]}/{item_id}-abc.mp4" if status == "done" else None
    made = {"encode_s": 0.1, "denoise_s": 1.0, "decode_s": 0.2, "write_s": 0.1, "created_at": 1e9 + number, "bytes": 10}
    sizes = {"seed": number, "width": 64, "height": 48, "num_frames": 3, "fps": 8.0}
    row = {
        "item_id": item_id,
        "row_id": f"row-{number}",
        "status": status,
        "video": video,
        "prompt": f"prompt {number}",
    }
    return row | sizes | {name: value if status == "done" else None for name, value in made.items()} | more


def _tables(rows: list[dict[str, Any]], part: int = 700) -> list[pa.Table]:
    schema = pa.Table.from_pylist(rows).schema
    return [pa.Table.from_pylist(rows[k : k + part], schema) for k in range(0, len(rows), part)]


def _write(folder: Path, rows: list[dict[str, Any]], **options: Any) -> gallery.Gallery:
    return gallery.write_gallery(_tables(rows), Objects(str(folder)), title="a <b>run</b>", **options)


def _scripts(folder: Path, name: str) -> list[Any]:
    """What the page's data scripts hand over, in order; each must be one call of plain JSON."""
    found = []
    for number, path in enumerate(sorted((folder / "report" / name).iterdir())):
        call = re.fullmatch(r"vidgenReport\.(rows|more)\((\d+), (\[.*\])\);\n", path.read_text("ascii"), re.DOTALL)
        assert call is not None and call[1] == name and int(call[2]) == number
        found += json.loads(call[3])
    return found


class _Page(html.parser.HTMLParser):
    """Tags, attributes and text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._script: list[str] = []
        self.feed(text)
        self.meta = json.loads("".join(self._script))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "meta"}):
            self._script.append(data)
        else:
            self.text += data


def _page(folder: Path) -> _Page:
    return _Page((folder / "report" / "index.html").read_text())


def test_every_row_is_in_the_page_once_and_in_order(tmp_path: Path) -> None:
    rows = [_row(k, ("done", "failed", "quarantined", "rejected", "pending")[k % 5], error="e") for k in range(2345)]
    written = _write(tmp_path, rows, posters=0)
    meta = _page(tmp_path).meta
    assert (written.rows, meta["rows"], meta["total"], meta["chunks"]) == (2345, 2345, 2345, 3)
    grid = [dict(zip(meta["columns"], row, strict=True)) for row in _scripts(tmp_path, "rows")]
    assert [row["row_id"] for row in grid] == [row["row_id"] for row in rows]
    assert [meta["statuses"][row["status"]] for row in grid] == [row["status"] for row in rows]
    more = _scripts(tmp_path, "more")
    assert [row["row_id"] for row in more] == [row["row_id"] for row in rows]
    assert more[0]["denoise_s"] == 1.0 and "denoise_s" not in more[1]


def test_no_file_of_the_report_asks_for_anything_from_a_network(tmp_path: Path) -> None:
    _write(tmp_path, [_row(0)], posters=0)
    for path in (tmp_path / "report").rglob("*.*"):
        if path.suffix != ".jpg":
            assert not re.search(r"(https?:)?//[a-z]|fetch\(|@import|XMLHttpRequest", path.read_text()), path
    for tag, attributes in _page(tmp_path).tags:
        for name in ("src", "href"):
            link = attributes.get(name)
            if link and not link.startswith("data:"):
                assert (tmp_path / "report" / link.split("?")[0]).is_file(), f"{tag} {link}"


def test_what_a_prompt_or_an_error_says_never_becomes_markup(tmp_path: Path) -> None:
    rows = [_row(0, prompt=EVIL, row_id=EVIL), _row(1, "failed", prompt=EVIL, error=EVIL, error_class="item")]
    _write(tmp_path, rows, posters=0)
    page = _page(tmp_path)
    assert [attributes.get("src", "").split("?")[0] for tag, attributes in page.tags if tag == "script"] == [
        "",
        "gallery.js",
    ]
    assert "img" not in {tag for tag, _ in page.tags}
    assert "a <b>run</b>" in page.text and EVIL[:60] in page.text
    assert _scripts(tmp_path, "more")[0]["prompt"] == EVIL
    # The behaviour file enters values as text: nothing in it parses a string as markup or code.
    code = (tmp_path / "report" / "gallery.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code)


def test_values_that_javascript_cannot_hold_are_written_as_text(tmp_path: Path) -> None:
    row = _row(
        0, big=2**60, ratio=float("nan"), tags=["a", "b"], blob=b"\x00\xff", day=pa.scalar(0, pa.date32()).as_py()
    )
    _write(tmp_path, [row], posters=0)
    (more,) = _scripts(tmp_path, "more")
    assert (more["big"], more["ratio"], more["tags"]) == (str(2**60), "nan", '["a", "b"]')
    assert more["day"] == "1970-01-01" and "blob" not in more


def test_failures_are_grouped_with_an_example_and_each_row_knows_its_group(tmp_path: Path) -> None:
    rows = [_row(0, "rejected", error="height is 7", error_class="rejected")]
    rows += [_row(k, "failed", error=f"holds {k} frames", error_class="item") for k in range(1, 4)]
    _write(tmp_path, rows, posters=0)
    page = _page(tmp_path)
    groups = [attributes["data-failure"] for _, attributes in page.tags if "data-failure" in attributes]
    assert groups == ["1", "0"]  # the larger group first, by its number
    assert page.meta["failures"] == {"0": "rejected: height is #", "1": "item: holds # frames"}
    place = page.meta["columns"].index("failure")
    assert [row[place] for row in _scripts(tmp_path, "rows")] == [0, 1, 1, 1]
    assert "holds 1 frames" in page.text and "row-1" in page.text


def test_totals_and_stages_are_readable_without_a_script(tmp_path: Path) -> None:
    _write(tmp_path, [*(_row(k) for k in range(4)), _row(4, "failed", error="e", error_class="item")], posters=0)
    text = " ".join(_page(tmp_path).text.split())
    assert "4of 5" in text and "denoise" in text and "64×48×3: 4" in text


def test_posters_are_made_up_to_the_limit_once_and_kept(tmp_path: Path) -> None:
    data, rows = _mp4(tmp_path), [_row(k) for k in range(5)]
    for row in rows:
        place = tmp_path / row["video"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    first = _write(tmp_path, rows, posters=3)
    assert (first.made, first.kept) == (3, 0)
    marks = [row[_page(tmp_path).meta["columns"].index("poster")] for row in _scripts(tmp_path, "rows")]
    assert marks == [1, 1, 1, 0, 0]
    made = tmp_path / gallery.poster_path(rows[0]["video"])
    with Image.open(made) as picture:
        assert picture.format == "JPEG"
    before = made.stat().st_mtime_ns
    again = _write(tmp_path, rows, posters=3)
    assert (again.made, again.kept) == (2, 3) and made.stat().st_mtime_ns == before
    assert (_write(tmp_path, rows).made, _write(tmp_path, rows).kept) == (0, 5)


def test_a_video_that_is_gone_or_damaged_spoils_only_its_own_poster(tmp_path: Path) -> None:
    rows = [_row(k) for k in range(3)]
    for row, data in zip(rows, (_mp4(tmp_path), b"no video"), strict=False):
        place = tmp_path / row["video"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    written = _write(tmp_path, rows)
    assert (written.made, written.impossible) == (1, 2) and _page(tmp_path).meta["rows"] == 3


def test_beyond_the_limit_failures_are_still_shown_and_the_totals_count_all(tmp_path: Path) -> None:
    rows = [_row(k, "failed" if k == 90 else "done", error="e" if k == 90 else None) for k in range(100)]
    written = _write(tmp_path, rows, posters=0, most=10)
    shown = [row[1] for row in _scripts(tmp_path, "rows")]
    assert shown == [*(f"row-{k}" for k in range(10)), "row-90"]
    meta = _page(tmp_path).meta
    assert (written.rows, meta["rows"], meta["total"]) == (11, 11, 100)


def test_it_lies_in_the_store_wherever_that_is(tmp_path: Path) -> None:
    url = f"memory://gallery-{tmp_path.name}"
    objects, row = Objects(url), _row(0)
    objects.put(row["video"], _mp4(tmp_path))
    written = gallery.write_gallery(_tables([row]), objects, title="remote")
    assert written.made == 1
    files = fsspec.filesystem("memory")
    root = f"/gallery-{tmp_path.name}"
    assert b"remote" in files.cat_file(f"{root}/report/index.html")
    with Image.open(io.BytesIO(files.cat_file(f"{root}/{gallery.poster_path(row['video'])}"))) as picture:
        assert picture.format == "JPEG"
    files.rm(root, recursive=True)


def test_a_finished_run_is_reported_from_its_manifest_and_links_its_videos(tmp_path: Path) -> None:
    dataset, output = write_prompts(tmp_path / "p.parquet", 4), str(tmp_path / "out")
    drive(config_for(dataset, output))
    page = gallery.report(output)
    assert page == f"{output}/report/index.html" and Path(page).is_file()
    columns = _page(Path(output)).meta["columns"]
    grid = [dict(zip(columns, row, strict=True)) for row in _scripts(Path(output), "rows")]
    assert sorted(row["prompt"] for row in grid) == [f"prompt number {k}" for k in range(4)]
    for row in grid:
        assert (Path(output) / row["video"]).is_file() and row["poster"] == 1
        assert (Path(output) / gallery.poster_path(row["video"])).is_file()


def test_a_run_that_has_not_begun_is_reported_as_pending(tmp_path: Path) -> None:
    dataset, output = write_prompts(tmp_path / "p.parquet", 3), str(tmp_path / "out")
    build(config_for(dataset, output), Objects(output))
    gallery.report(output)
    meta = _page(Path(output)).meta
    assert [meta["statuses"][row[meta["columns"].index("status")]] for row in _scripts(Path(output), "rows")] == [
        "pending"
    ] * 3


def test_a_folder_without_a_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no run here"):
        gallery.report(str(tmp_path))
