"""The dataset card: front matter that the Hub's own library reads, true counts, licences that somebody stated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard

from tests.pack.conftest import DONE, done_rows
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.pack.licence import NOT_STATED, Checkpoint, licence

Pack = Callable[..., tuple[Path, Any]]
DEMO = Path(__file__).parents[2] / "vidgen/demo/checkpoint"


@pytest.mark.parametrize("format", ["webdataset", "parquet", "hf", "folder"])
def test_the_front_matter_is_read_by_the_hubs_library(format: str, packed: Pack) -> None:
    place, _ = packed(format, split="train=0.5,test=0.5")
    card = DatasetCard.load(place / "README.md")
    assert card.data.size_categories == ["n<1K"] and card.data.task_categories == ["text-to-video"]
    assert "license" not in card.data.to_dict(), "nobody has stated the licence of the dataset"
    if format != "folder":
        files = card.data.configs[0]["data_files"]
        assert [file["split"] for file in files] == ["train", "test"]
        assert all(list(place.glob(file["path"])) for file in files)


def test_the_statistics_are_those_of_the_packed_rows(packed: Pack, finished: str) -> None:
    place, _ = packed("webdataset")
    columns = json.loads((place / "index.json").read_bytes())["columns"]
    rows = list(done_rows(finished).values())
    sizes = [row["bytes"] for row in rows]
    assert columns["bytes"] == {
        "type": "int64",
        "nulls": 0,
        "distinct": len(set(sizes)),
        "min": min(sizes),
        "max": max(sizes),
    }
    assert columns["late"]["nulls"] == sum(row["late"] is None for row in rows)
    assert columns["day"]["min"] == "2026-01-01" and columns["score"]["max"] == 11 / 4
    assert columns["topic"]["distinct"] == 2 and "status" not in columns


def test_a_card_shows_counts_and_no_markup_of_strangers(packed: Pack) -> None:
    place, _ = packed("webdataset", where="row_id = 'r00'")
    text = (place / "README.md").read_text()
    assert "<b>" not in text and "\\*bold\\*" in text and "\n`code`" not in text
    table = [line for line in text.splitlines() if line.startswith("| prompt |")]
    assert len(table) == 1 and "2 generated videos" in text and DONE == 20


def checkpoint_with(folder: Path, card: str) -> Checkpoint:
    shutil.copytree(DEMO, folder)
    (folder / "README.md").write_text(card)
    return Checkpoint(str(folder), None, open_checkpoint(str(folder)).hash())


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: some-community\n---\n", "other (some-community)"),
        ("---\ntags: [video]\n---\nlicense: mit", NOT_STATED),
        ("# A model\nThe licence is MIT.", NOT_STATED),
        ("---\n{[broken\n---\n", NOT_STATED),
    ],
)
def test_a_licence_is_what_the_checkpoints_own_card_says(card: str, said: str, tmp_path: Path) -> None:
    assert licence(checkpoint_with(tmp_path / "model", card)) == said


def test_a_checkpoint_without_metadata_is_no_reason_to_complain(caplog: pytest.LogCaptureFixture) -> None:
    demo = open_checkpoint("demo")
    assert licence(Checkpoint("demo", None, demo.hash())) == NOT_STATED and not caplog.records


def test_another_checkpoint_in_the_same_place_says_nothing_about_ours(tmp_path: Path) -> None:
    ours = checkpoint_with(tmp_path / "model", "---\nlicense: mit\n---\n")
    assert licence(Checkpoint(ours.name, None, "0" * 64)) == NOT_STATED
    assert licence(Checkpoint(str(tmp_path / "gone"), None, ours.hash)) == NOT_STATED
    assert licence(Checkpoint("", None, "")) == NOT_STATED
