"""What strangers wrote stays text: in the page, in its data, and in the terminal."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from tests.hostile.test_text import PROMPTS
from vidgen.report import gallery, page, status
from vidgen.store.objects import Objects

TEXTS = [
    *PROMPTS.values(),
    "]]>",
    "<!--",
    "-->",
    "*/",
    "\\u003c/script\\u003e",
    "`${alert(1)}`",
    "[/]",
    "[link=file:///x]y[/link]",
]


def row(number: int, text: str, **more: Any) -> dict[str, Any]:
    item_id = f"{number:032x}"
    made = {"seed": number, "width": 64, "height": 48, "num_frames": 3, "fps": 8.0}
    return (
        {
            "item_id": item_id,
            "row_id": text[:50],
            "status": "failed",
            "prompt": text,
            "error": text,
            "error_class": "item",
        }
        | made
        | more
    )


def written(folder: Path, rows: list[dict[str, Any]] | pa.Table, title: str = "t") -> Path:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    gallery.write_gallery([table], Objects(str(folder)), title=title, posters=0)
    return folder / "report"


def data(report: Path, name: str) -> list[Any]:
    text = (report / name / "00000.js").read_text("ascii")  # not a letter that a browser could read otherwise
    call = re.fullmatch(r"vidgenReport\.\w+\(0, (\[.*\])\);\n", text, re.DOTALL)
    assert call is not None
    found: list[Any] = json.loads(call[1])
    return found


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_no_text_adds_a_tag_or_an_attribute_to_the_page(tmp_path: Path) -> None:
    """The page of strange rows has the very tags of one of plain rows, but for their number of kinds of failure."""
    plain = Page((written(tmp_path / "a", [row(k, f"p{k} x") for k in range(1)]) / "index.html").read_text()).tags
    for number, text in enumerate(TEXTS):
        report = written(tmp_path / f"{number}", [row(0, text)], title=text)
        found = Page((report / "index.html").read_text("utf-8")).tags
        assert [(tag, sorted(own)) for tag, own in found] == [(tag, sorted(own)) for tag, own in plain], text
        assert not any(name.startswith("on") for _, own in found for name in own)


def test_every_letter_arrives_in_the_page_as_data(tmp_path: Path) -> None:
    report = written(tmp_path, [row(k, text) for k, text in enumerate(TEXTS)])
    prompts = [entry["prompt"] for entry in data(report, "more")]
    assert prompts == [text[: gallery.LONGEST] for text in TEXTS]
    assert max(len(json.dumps(entry)) for entry in data(report, "rows")) < 30_000  # a megabyte stays out of the page


def test_no_text_is_given_to_the_browser_as_markup_or_code() -> None:
    """Read in the script: nothing writes HTML, makes code of text, or sets an attribute that is one."""
    script = (Path(gallery.__file__).parent / "gallery.js").read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
        "DOMParser",
    ):
        assert word not in script, word
    for template in Path(page.__file__).parent.glob("*.html"):
        assert "|safe" not in template.read_text().replace(" ", ""), template.name
        assert "autoescape false" not in template.read_text(), template.name
    title = "<script>&\"'"
    assert "&lt;script&gt;&amp;&#34;&#39;" in page.render("head.html", title=title, page="", styles=[], stamp="")


def test_what_is_written_from_right_to_left_turns_nothing_beside_it(tmp_path: Path) -> None:
    """Foreign text stands in elements that are isolated: `bdi`, or `dir=auto`, which is."""
    report = written(tmp_path, [row(0, PROMPTS["right to left"])], title=PROMPTS["right to left"])
    page = (report / "index.html").read_text("utf-8")
    assert page.count("\u202e") >= 4
    for found in re.finditer("\u202e", page):
        before = page[max(0, found.start() - 60) : found.start()]
        opened = re.findall(r"<([a-z0-9]+)([^>]*)>[^<]*$", before)
        inside = opened and (opened[-1][0] in ("bdi", "title", "script") or 'dir="auto"' in opened[-1][1])
        assert inside or page.rfind("<script", 0, found.start()) > page.rfind("</script", 0, found.start()), before
    assert 'node.dir = "auto"' in (report / "gallery.js").read_text()


def test_cells_that_python_has_no_value_for_are_shown_as_arrow_writes_them(tmp_path: Path) -> None:
    columns = {
        "item_id": ["a", "b"],
        "status": ["pending", "pending"],
        "nanoseconds": pa.array([1_704_067_200_123_456_789, None], pa.timestamp("ns")),
        "year": pa.array([2**60, 0], pa.timestamp("s")),
        "zone": pa.array([0, 0], pa.timestamp("s", "Mars/Phobos")),
        "day": pa.array([2**31 - 1, 0], pa.date32()),
        "span": pa.array([2**62, 0], pa.duration("ns")),
        "text": pa.array([b"\xff", b"ok"]).view(pa.string()),
        "twice": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["k", "k"]),
        "pairs": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "deep": pa.array([[[["\u202e<b>"]]], None]),
        "wide": pa.array([2**63 - 1, 1]),
    }
    first, second = data(written(tmp_path, pa.table(columns)), "more")
    assert first["nanoseconds"] == "2024-01-01 00:00:00.123456789" and "nanoseconds" not in second
    assert first["text"] == "(string that cannot be shown)" and second["text"] == "ok"
    assert first["wide"] == str(2**63 - 1) and first["item_id"] == "a" and second["day"] == "1970-01-01"
    assert set(first) == set(columns)


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the report's data scripts")
def test_the_data_scripts_do_nothing_but_hand_over_their_rows(tmp_path: Path) -> None:
    report = written(tmp_path, [row(k, text) for k, text in enumerate(TEXTS)])
    program = (
        "const vm = require('vm'), fs = require('fs'); const got = [];"
        "const box = vm.createContext({vidgenReport: {rows: (k, l) => got.push(l), more: (k, l) => got.push(l)}});"
        "for (const file of process.argv.slice(1)) vm.runInContext(fs.readFileSync(file, 'utf8'), box);"
        "console.log(JSON.stringify([Object.keys(box), got[1].map((row) => row.prompt)]))"
    )
    files = [str(report / name / "00000.js") for name in ("rows", "more")]
    done = subprocess.run(["node", "-e", program, *files], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [["vidgenReport"], [text[: gallery.LONGEST] for text in TEXTS]]


@pytest.mark.parametrize("text", TEXTS)
def test_a_status_obeys_no_markup_and_no_escape_sequence(text: str) -> None:
    failures = [status.Failures(text, 1, "0" * 32, text, f"vidgen retry {text}")]
    found = status.Status(
        "out", text[:100], text[:100], text[:100], 1, 0, 1, 0, 0, 0, 0, "stopped", False, failures=failures
    )
    sink = io.StringIO()
    Console(file=sink, width=200, force_terminal=True, color_system=None).print(status.render(found), highlight=False)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", sink.getvalue())  # its own bold
    assert all(letter.isprintable() or letter == "\n" for letter in shown), ascii(shown)
    for mark in ("[/bold]", "[/]", "[link=file:///x]"):
        assert (mark in text[:100]) <= (mark in shown)
