"""Splits, sizes and shards."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pack.conftest import done_rows
from vidgen.errors import UserError
from vidgen.pack.options import MOST_ROWS, options
from vidgen.pack.shards import packed_names, shards
from vidgen.pack.source import Source, fitted, unified
from vidgen.store.objects import Objects

Pack = Callable[..., tuple[Path, Any]]


@pytest.mark.parametrize(
    ("given_", "why"),
    [
        ({"format": "zip"}, "allowed: webdataset, parquet, hf, folder"),
        ({"format": "hf", "name": "{row_id}"}, "only --format folder"),
        ({"format": "hf", "split": "train=0.9,test=0.2"}, "sum to 1.1"),
        ({"format": "hf", "split": "train"}, "NAME=SHARE"),
        ({"format": "hf", "split": "train=nan,test=1"}, "NAME=SHARE"),
        ({"format": "hf", "split": "a=0.5,A=0.5"}, "stands there twice"),
        ({"format": "hf", "split": "../x=1"}, "cannot name a split"),
        ({"format": "hf", "split": "index=1"}, "cannot name a split"),
        ({"format": "hf", "shard_size": "10 parsec"}, "not a size"),
        ({"format": "hf", "shard_size": "10"}, "1000 and more"),
    ],
)
def test_a_wrong_option_names_the_flag_and_what_is_allowed(given_: dict[str, str], why: str) -> None:
    with pytest.raises(UserError, match=f"--.*{why}"):
        options(**given_)


def test_sizes_are_read_as_written() -> None:
    assert options("hf", shard_size="1.5GB").shard_size == 1_500_000_000
    assert options("hf", shard_size="256MiB").shard_size == 256 * 2**20


def test_a_row_stays_in_its_split_and_splits_have_their_shares() -> None:
    split_of = options("hf", split="train=0.8,validation=0.1,test=0.1").splitter()
    found = Counter(split_of(f"row {i}") for i in range(20_000))
    # Three standard deviations of a binomial share of 0.1 among 20,000 are 0.0064.
    assert abs(found["train"] / 20_000 - 0.8) < 0.01 and abs(found["test"] / 20_000 - 0.1) < 0.0064
    assert [split_of(f"row {i}") for i in range(4, 9)] == ["test", "train", "train", "validation", "test"]
    shared = options("hf", split="a=1/3,b=1/3,c=1/3")
    assert shared.splits[0][1] == Fraction(1, 3) and shared.as_json()["split"] == "a=1/3,b=1/3,c=1/3"


def test_all_samples_of_a_row_are_in_one_split(packed: Pack, finished: str) -> None:
    place, _ = packed("folder", name="{row_id}_{sample}.mp4", split="train=0.5,test=0.5")
    homes: dict[str, set[str]] = {}
    for path in place.rglob("*.mp4"):
        homes.setdefault(path.name.split("_")[0], set()).add(path.parent.name)
    assert homes.keys() == {row["row_id"] for row in done_rows(finished).values()}
    assert all(len(home) == 1 for home in homes.values()) and set.union(*homes.values()) == {"train", "test"}


def rows_of(sizes: list[int]) -> pa.Table:
    count = len(sizes)
    return pa.table(
        {
            "item_id": [f"{i:032x}" for i in range(count)],
            "row_id": [f"r{i // 2}" for i in range(count)],
            "status": ["failed" if i % 7 == 3 else "done" for i in range(count)],
            "bytes": sizes,
            "text": [None if i % 3 else f"{i}" for i in range(count)],
        }
    )


def source_of(tables: list[pa.Table]) -> Source:
    return Source(Objects("memory://rows"), lambda: iter(tables), tables[0].schema, "rows", (), "")


@settings(max_examples=60)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_shards_hold_every_row_once_in_order_within_their_size_however_tables_are_cut(
    sizes: list[int], chance: random.Random
) -> None:
    whole = rows_of(sizes)
    wanted = options("webdataset", shard_size="4KB", split="a=0.5,b=0.5")
    cuts = sorted({0, len(sizes), *(chance.randrange(len(sizes) + 1) for _ in range(4))})
    pieces = [whole.slice(low, high - low) for low, high in pairwise(cuts)]
    one, many = list(shards(source_of([whole]), wanted)), list(shards(source_of(pieces), wanted))
    assert {s.name: s.digest() for s in one} == {s.name: s.digest() for s in many}
    assert all(s.bytes <= 4000 or s.rows.num_rows == 1 for s in one)
    for split in ("a", "b"):
        mine = sorted((s for s in one if s.split == split), key=lambda s: s.number)
        assert [s.number for s in mine] == list(range(len(mine)))
        ids = [item for s in mine for item in s.rows.column("item_id").to_pylist()]
        assert ids == sorted(ids)
    seen = [item for s in one for item in s.rows.column("item_id").to_pylist()]
    assert sorted(seen) == [f"{i:032x}" for i in range(len(sizes)) if i % 7 != 3]


def test_a_shard_has_a_bounded_number_of_rows() -> None:
    found = list(shards(source_of([rows_of([1] * 3000)]), options("hf", shard_size="1GB")))
    assert [s.rows.num_rows for s in found][:-1] == [MOST_ROWS["hf"]] * (len(found) - 1) and len(found) == 3


def test_columns_that_go_ill_together_become_text_and_empty_ones_too() -> None:
    tables = [pa.table({"a": [1], "b": [None], "c": [1]}), pa.table({"a": ["x"], "c": [1.5]})]
    schema = unified(table.schema for table in tables)
    assert schema == pa.schema([("a", pa.string()), ("b", pa.string()), ("c", pa.float64())])
    assert fitted(tables[0], schema).to_pylist() == [{"a": "1", "b": None, "c": 1.0}]
    assert fitted(tables[1], schema).to_pylist() == [{"a": "x", "b": None, "c": 1.5}]


def test_columns_with_a_name_of_ours_are_renamed_and_none_is_lost() -> None:
    names = ["video", "status", "error", "error_class", "file_name", "source_video", "input_source_video", "filename"]
    schema = pa.schema([(name, pa.string()) for name in [*names, "my_file_names", "x"]])
    found = packed_names(schema)
    assert found["video"] == "source_video" and found["x"] == "x" and found["my_file_names"] == "my_filename"
    assert found["source_video"] == "input_input_source_video" and found["file_name"] == "input_filename"
    assert len(set(found.values())) == len(found) == len(names) + 2 - 3
