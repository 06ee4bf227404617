"""What other people's libraries read from a pack: every done video once, its own bytes, its own columns."""

from __future__ import annotations

import datetime
import glob
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pyarrow.parquet as pq
import pytest
import webdataset

from tests.pack.conftest import DONE, done_rows

datasets.disable_progress_bars()
Pack = Callable[..., tuple[Path, Any]]


def test_the_webdataset_library_reads_every_video_with_its_caption_and_columns(packed: Pack, finished: str) -> None:
    place, made = packed("webdataset", split="train=0.5,test=0.5")
    rows, seen = done_rows(finished), {}
    for split in ("train", "test"):
        shards = sorted(glob.glob(str(place / f"data/{split}-*.tar")))
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            seen[sample["__key__"]] = sample
    assert seen.keys() == rows.keys() and len(seen) == DONE == made.videos and made.made > 2
    for key, sample in seen.items():
        assert hashlib.sha256(sample["mp4"]).hexdigest() == rows[key]["sha256"]
        assert sample["txt"].decode() == rows[key]["prompt"]
        columns = json.loads(sample["json"])
        assert columns["row_id"] == rows[key]["row_id"] and columns["day"] == rows[key]["day"]
        assert columns["source_video"] == rows[key]["video"] and columns["shot_filename"] == rows[key]["shot_file_name"]
        assert columns["score"] == (None if rows[key]["row_id"] == "r00" else rows[key]["score"])


def test_members_of_a_tar_have_no_time_and_no_owner(packed: Pack) -> None:
    place, _ = packed("webdataset")
    with tarfile.open(place / "data/train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar.getmembers()} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_parquet_holds_the_bytes_and_any_reader_finds_them(packed: Pack, finished: str) -> None:
    place, _ = packed("parquet")
    rows = done_rows(finished)
    tables = [pq.read_table(path) for path in sorted(place.glob("data/*.parquet"))]
    seen = {row["item_id"]: row for table in tables for row in table.to_pylist()}
    assert seen.keys() == rows.keys() and len(tables) > 2
    for key, row in seen.items():
        assert hashlib.sha256(row["video"]["bytes"]).hexdigest() == rows[key]["sha256"]
        assert row["day"] == datetime.date.fromisoformat(rows[key]["day"])
    found = duckdb.sql(
        f"select count(*), bool_and(sha256(video.bytes) = sha256) from '{place}/data/*.parquet' where topic = 'sky'"
    ).fetchall()
    assert found == [(sum(row["topic"] == "sky" for row in rows.values()), True)]
    group = pq.ParquetFile(next(place.glob("data/*.parquet"))).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["video.bytes"].compression == "UNCOMPRESSED" and columns["prompt"].compression == "ZSTD"


def test_a_parquet_file_has_row_groups_of_bounded_bytes(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidgen.pack.layouts.GROUP_BYTES", 11_000)
    place, _ = packed("parquet", shard_size="1GB")
    file = pq.ParquetFile(place / "data/train-000000.parquet")
    videos = [file.read_row_group(i).column("video").to_pylist() for i in range(file.num_row_groups)]
    assert len(videos) > 3 and sum(map(len, videos)) == DONE
    assert all(sum(len(video["bytes"]) for video in group) <= 11_000 for group in videos)
    rows = file.read().to_pylist()
    assert all(hashlib.sha256(row["video"]["bytes"]).hexdigest() == row["sha256"] for row in rows)


@pytest.mark.parametrize(("format", "column"), [("webdataset", "mp4"), ("parquet", "video"), ("hf", "video")])
def test_the_datasets_library_opens_it_as_a_video_dataset_with_its_splits(
    format: str, column: str, packed: Pack, finished: str, tmp_path: Path
) -> None:
    place, made = packed(format, split="train=0.6,test=0.4")
    opened = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
    rows = done_rows(finished)
    assert {name: split.num_rows for name, split in opened.items()} == made.splits
    seen = set()
    for split in opened.values():
        assert isinstance(split.features[column], datasets.Video)
        for row in split.cast_column(column, datasets.Video(decode=False)):
            data = row[column]["bytes"] or Path(row[column]["path"]).read_bytes()
            columns = row["json"] if format == "webdataset" else row
            assert hashlib.sha256(data).hexdigest() == columns["sha256"] == rows[columns["item_id"]]["sha256"]
            assert columns["prompt"] == rows[columns["item_id"]]["prompt"]
            assert columns["late"] == rows[columns["item_id"]]["late"]
            assert columns["shot_filename"].startswith("shots/")
            seen.add(columns["item_id"])
    assert seen == rows.keys()


def test_plain_files_are_named_by_the_pattern_and_listed(packed: Pack, finished: str) -> None:
    place, _ = packed("folder", name="{topic}/{row_id}_{sample:02d}.mp4")
    rows = done_rows(finished).values()
    videos = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*.mp4")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in videos.items()} == {
        f"{row['topic']}/{row['row_id']}_{row['sample']:02d}.mp4": row["sha256"] for row in rows
    }
    listed = [row for path in place.glob("index/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {row["file_name"]: row["sha256"] for row in listed} == {
        name: hashlib.sha256(data).hexdigest() for name, data in videos.items()
    }
    split, _ = packed("folder", "split", name="{row_id}_{sample}.mp4", split="a=0.5,b=0.5")
    assert {path.parent.name for path in split.rglob("*.mp4")} == {"a", "b"}


@pytest.mark.parametrize("format", ["webdataset", "parquet", "hf", "folder"])
def test_the_index_has_the_size_the_count_and_the_hash_of_each_shard(format: str, packed: Pack) -> None:
    place, made = packed(format)
    index = json.loads((place / "index.json").read_bytes())
    assert sum(shard["videos"] for shard in index["shards"]) == index["videos"] == made.videos == DONE
    for shard in index["shards"]:
        assert hashlib.sha256((place / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    for path in place.glob("index/*.json"):
        for file in json.loads(path.read_bytes())["files"]:
            data = (place / file["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    success = json.loads((place / "_SUCCESS.json").read_bytes())
    for name, digest in success["sha256"].items():
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() == digest


def test_what_a_video_folder_cannot_hold_is_refused_for_one(
    packed: Pack, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.pack.survey.VIDEO_FOLDER", (".mov",))
    with pytest.raises(ValueError, match=r"videos are \.mp4.*webdataset, parquet and folder take any"):
        packed("hf")
