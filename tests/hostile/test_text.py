"""Prompts and ids of any letters: planned as they are, told apart as they are, and never a name of anything."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from tests.plan.conftest import dataset, items_of, job, planned, rejections
from vidgen import manifest
from vidgen.errors import printable
from vidgen.plan.build import build
from vidgen.store.objects import Objects
from vidgen.types import Item

PROMPTS = {
    "control characters": "a fox\0\x07\x1b[31m\x1b]0;owned\x07\r\n\t\x7f",
    "a megabyte": "the quick brown fox " * 52_429,
    "right to left": "\u202eثعلب يقفز\u202c فوق \u2066الكلب\u2069 \u05e9\u05d5\u05e2\u05dc",
    "markup": "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}${7*7}[/bold]",
    "unseen letters": "a\u200bb\u200cc\ufeffd\u00ad\u2028\u2029",
    "not assigned": "\U000e0001\ufffe\uffff\U0010ffff",
    "many marks": "z" + "\u0335\u0301\u0489" * 300,
    "pictures": "👩‍👩‍👧‍👦🏳️‍🌈🦊",
    "a formula": "=cmd|'/c calc'!A0",
    "a statement": "'; drop table items; --",
}
IDS = (
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "~",
        "C:\\x",
        "con",
        "%2e%2e%2f",
        "a\0b",
        "x" * 100_000,
    ),
    *("\u202egpj.exe", "é", unicodedata.normalize("NFD", "é"), "ﬁ", "fi", "K", "\u212a", "SS", "ß", " a", "a", "a "),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "prompts.parquet"


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(str(tmp_path / "output"))


def test_a_prompt_of_any_letters_is_planned_letter_by_letter(tmp_path: Path) -> None:
    items = planned(tmp_path, {"prompt": list(PROMPTS.values())})
    assert [item.request.prompt for item in items] == list(PROMPTS.values())
    assert len({item.item_id for item in items}) == len(PROMPTS)


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000\u2003", "\x1c\x1f"])
def test_a_prompt_of_nothing_but_space_is_empty(blank: str, source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a fox", blank]})
    result = build(job(source), objects)
    assert len(items_of(objects, result)) == 1
    assert [row["reason"] for row in rejections(objects, result)] == ["prompt (column 'prompt') is empty"]


def test_bytes_that_are_no_text_are_told_by_column_wherever_they_stand(source: Path, objects: Objects) -> None:
    """In a prompt, an id, a number of the family, a path, and the path of a struct; surrogates are not text either."""
    bad = pa.array([b"\xff\xfe", b"ok", b"ok", b"ok", b"ok", b"\xed\xa0\x80"])
    columns: dict[str, Any] = {"prompt": bad}
    for position, name in enumerate(("id", "neg", "fail", "pic"), start=1):
        cells = [b"" if name in ("neg", "fail") else str(n).encode() for n in range(6)]
        cells[position] = b"\xc3("
        columns[name] = pa.array(cells)
    texts = {name: column.view(pa.string()) for name, column in columns.items()}
    path = texts.pop("pic")
    texts["pic"] = pa.StructArray.from_arrays([pa.nulls(6, pa.binary()), path], ["bytes", "path"])
    dataset(source, texts)
    mapped = {"prompt": "prompt", "negative_prompt": "neg", "params.fail": "fail", "image": "pic"}
    rooms: dict[str, Any] = {"columns": mapped, "id_column": "id", "media_schemes": []}
    with pytest.raises(ValueError, match="no valid row among 6") as caught:
        build(job(source, dataset={"path": str(source), **rooms}, model={"family": "testcard", "task": "i2v"}), objects)
    told = str(caught.value)
    for label in ("prompt (column 'prompt')", "id (column 'id')", "negative_prompt (column 'neg')"):
        assert f"{label} is not valid UTF-8" in told
    assert (
        "params.fail (column 'fail') is not valid UTF-8" in told and "image (column 'pic') is not valid UTF-8" in told
    )


def test_reasons_quote_strangers_so_that_no_terminal_obeys_and_no_book_is_repeated(
    source: Path, objects: Objects
) -> None:
    dataset(
        source,
        {"prompt": ["a"] * 4, "f": ["\x1b[2J", "\u202e", "x" * 10**6, ""], "id": ["\x1b]0;a\x07"] * 2 + ["b", "c"]},
    )
    rooms = {"columns": {"prompt": "prompt", "params.fail": "f"}, "id_column": "id"}
    result = build(job(source, dataset={"path": str(source), **rooms}), objects)
    assert [item.row_id for item in items_of(objects, result)] == ["c"]
    reasons = [row["reason"] for row in rejections(objects, result)]
    assert all(reason.isprintable() and len(reason) < 5_000 for reason in reasons)
    assert (
        "'\\x1b[2J'" in reasons[0]
        and "'\\u202e'" in reasons[1]
        and reasons[2].startswith("params.fail (column 'f') is 'xxx")
    )
    assert rejections(objects, result)[0]["row_id"] == "\x1b]0;a\x07"


def test_what_is_printed_is_printable_and_nothing_else_is_changed() -> None:
    assert printable("Füchse 狐 🦊 \\n") == "Füchse 狐 🦊 \\n"
    assert printable("a\x1b[0m\u202e\n\ud800") == "a\\x1b[0m\\u202e\\n\\ud800"


# ---------------------------------------------------------------- ids


def by_id(folder: Path, ids: list[str]) -> list[Item]:
    return planned(
        folder, {"prompt": ["same"] * len(ids), "id": ids}, dataset={"path": f"{folder}/run.parquet", "id_column": "id"}
    )


def test_an_id_is_its_letters_and_two_unicode_forms_of_one_word_are_two_ids(tmp_path: Path) -> None:
    """Nothing is normalised, folded, trimmed or taken for a path: what a user's own tables join on stays what it is."""
    items = by_id(tmp_path, list(IDS))
    assert [item.row_id for item in items] == list(IDS)
    assert len({item.item_id for item in items}) == len({item.request.seed for item in items}) == len(IDS)


def test_equal_ids_are_equal_bytes(source: Path, objects: Objects) -> None:
    composed, apart = "é", unicodedata.normalize("NFD", "é")
    dataset(source, {"prompt": ["a"] * 3, "id": [composed, apart, composed]})
    result = build(job(source, dataset={"path": str(source), "id_column": "id"}), objects)
    assert [item.row_id for item in items_of(objects, result)] == [apart]
    assert [row["origin_row"] for row in rejections(objects, result)] == [0, 2]


def test_no_id_or_prompt_is_part_of_the_name_of_any_file(tmp_path: Path) -> None:
    """Every file of a run lies below its output, under names of digits, letters, dots and dashes; nothing else is
    written beside it."""
    ids = [*IDS, "\U0001f98a"]
    source = write_prompts(tmp_path / "p.parquet", [f"{name[:50]}/../x" for name in ids], id=ids)
    output = tmp_path / "a" / "out"
    config = config_for(source, str(output), dataset__id_column="id", sampling__num_frames=1, sampling__height=16)
    config.sampling.width, config.sampling.params = 16, {"ready": True}
    outcome, _ = drive(config)
    assert (outcome.code, outcome.counts["done"]) == (0, len(ids))
    (table,) = manifest.read(Objects(str(output)))
    assert table.column("row_id").to_pylist() == ids
    for item_id, video, digest in zip(
        *(table.column(n).to_pylist() for n in ("item_id", "video", "sha256")), strict=True
    ):
        assert video == f"data/{item_id[:2]}/{item_id}-{digest[:12]}.mp4" and item_id.isalnum() and len(item_id) == 32
        assert hashlib.sha256((output / video).read_bytes()).hexdigest() == digest
    letters = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")
    assert all(set(part) <= letters for path in output.rglob("*") for part in path.relative_to(output).parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "p.parquet"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_bytes_carried_along_that_are_no_text_stay_what_they_are(tmp_path: Path) -> None:
    source, output = tmp_path / "p.parquet", str(tmp_path / "out")
    note = pa.array([b"\xff\xfe", b"ok"]).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a", "b"], "note": note}), source)
    assert drive(config_for(str(source), output))[0].code == 0
    (table,) = manifest.read(Objects(output))
    assert table.column("note").combine_chunks().view(pa.binary()).to_pylist() == [b"\xff\xfe", b"ok"]
