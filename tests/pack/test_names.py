"""File names from rows: one each, safe on any disk, and never outside the pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.errors import UserError
from vidgen.pack import names

Pack = Callable[..., tuple[Path, Any]]
COLUMNS = ["item_id", "row_id", "sample", "topic", "video"]


def fill(pattern: str, **values: Any) -> str:
    row = {"video": "data/ab/ab-1.mp4", "row_id": "r", "sample": 0, **values}
    return names.pattern(pattern, COLUMNS).fill(row)


def test_a_colliding_name_is_an_error_that_names_both_rows_before_the_first_write(packed: Pack, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'train/r00\.mp4': row 'r00', sample 1 and row 'r00', sample 0"):
        packed("folder", name="{row_id}.mp4")
    with pytest.raises(UserError, match="gives several videos one name"):
        packed("folder", name="{topic}.mp4")
    assert not (tmp_path / "pack").exists()


def test_names_that_some_disks_do_not_tell_apart_collide() -> None:
    given_, rows = names.Names(), [("A.mp4", "é"), ("a.mp4", "e"), ("\u00e9.mp4", "x"), ("e\u0301.mp4", "y")]
    pairs = [(name, {"row_id": row, "sample": 0}) for name, row in rows]
    for name, _ in pairs:
        given_.add(name)
    found = names.collisions(pairs, given_.suspects())
    assert len(found) == 2 and all("some disks do not tell them apart" in text for text in found)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("a/b", "slash"),
        ("a\\b", "slash"),
        ("../../etc", "slash"),
        ("a\nb", "control"),
        ("a\x00b", "control"),
        ("a\u202eb", "does not show"),
        ("x" * 260, "longer than 255"),
        (" a", "space"),
        (None, "is null"),
    ],
)
def test_an_unsafe_value_is_refused_with_the_reason(value: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        fill("{row_id}.mp4", row_id=value)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("../{row_id}.mp4", r"\.\. segment"),
        ("/{row_id}.mp4", "empty"),
        ("con{extension}", "device"),
        ("{row_id}.webm", r"does not end with \.mp4"),
        ("index/{row_id}.mp4", "pack's own names"),
        ("Data/{row_id}.mp4", "pack's own names"),
        (".tmp-{row_id}.mp4", "unfinished"),
        ("{row_id:05d}.mp4", "cannot be written as"),
    ],
)
def test_an_unsafe_pattern_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        fill(pattern)


@pytest.mark.parametrize("pattern", ["{row_idd}.mp4", "{row_id.__class__}.mp4", "{}.mp4", "{row_id!r}.mp4", "{row_id"])
def test_a_pattern_is_columns_and_formats_and_nothing_else(pattern: str) -> None:
    with pytest.raises(UserError, match="--name"):
        names.pattern(pattern, COLUMNS)


def test_rows_without_a_safe_name_are_listed_and_nothing_is_written(packed: Pack, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)20 rows have no safe name.*row 'r00', sample 0.*slash.*and 10 more"):
        packed("folder", name="{shot_file_name}-{item_id}.mp4")
    assert not (tmp_path / "pack").exists()


@given(st.text(), st.text(), st.integers(0, 99))
def test_no_accepted_name_leaves_its_place(row_id: str, topic: str, sample: int) -> None:
    try:
        name = fill("{topic}/{row_id}_{sample}{extension}", row_id=row_id, topic=topic, sample=sample)
    except UserError:
        return
    parts = PurePosixPath(name).parts
    assert len(parts) == 2 and ".." not in parts and not name.startswith("/") and name.isprintable()
    assert "\\" not in name and all(part.strip(" ") for part in parts)
