"""Reading datasets: every way to name one gives its rows in order, and every bad one is named with file and column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt
import pytest

from vidgen import prompts
from vidgen.errors import PlanError


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def cells(path: str | Path, columns: Sequence[str] = ("prompt",)) -> list[tuple]:
    rows = prompts.read(prompts.open_dataset(str(path)), columns)
    return [tuple(row.values()) for batch in rows for row in batch.data.to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files in two partitions, and what is not data beside them."""
    write(tmp_path / "lang=de/year=2024/b.parquet", {"prompt": ["drei"]})
    write(tmp_path / "lang=en/year=2025/a.parquet", {"prompt": ["one", "two"]})
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".hidden.parquet").write_text("not Parquet")
    (tmp_path / "README.md").write_text("")
    return tmp_path


def test_a_folder_is_read_in_order_of_its_names_with_partition_columns(folder: Path) -> None:
    expected = [("drei", "de", 2024), ("one", "en", 2025), ("two", "en", 2025)]
    assert cells(folder, ("prompt", "lang", "year")) == expected
    assert cells(f"file://{folder}", ("prompt", "lang", "year")) == expected


def test_a_glob_is_its_files_with_partition_columns(folder: Path) -> None:
    assert cells(f"{folder}/lang=*/*/*.parquet", ("prompt", "lang")) == [("drei", "de"), ("one", "en"), ("two", "en")]
    assert cells(f"{folder}/**/a.parquet") == [("one",), ("two",)]


def test_a_file_of_any_store_is_read(folder: Path) -> None:
    data = (folder / "lang=en/year=2025/a.parquet").read_bytes()
    fsspec.filesystem("memory").pipe_file("/prompts-test/lang=fr/x.parquet", data)
    assert cells("memory://prompts-test", ("prompt", "lang")) == [("one", "fr"), ("two", "fr")]
    assert cells("memory://prompts-test/lang=fr/x.parquet") == [("one",), ("two",)]


def test_a_null_partition_is_an_empty_cell(tmp_path: Path) -> None:
    write(tmp_path / "lang=__HIVE_DEFAULT_PARTITION__/a.parquet", {"prompt": ["x"]})
    write(tmp_path / "lang=a%20b/a.parquet", {"prompt": ["y"]})
    assert sorted(cells(tmp_path, ("prompt", "lang"))) == [("x", None), ("y", "a b")]


def test_rows_know_their_place_in_the_file_and_in_the_dataset(tmp_path: Path) -> None:
    for name, count in (("a", 40_000), ("b", 3)):
        write(tmp_path / f"{name}.parquet", {"n": list(range(count))}, row_group_size=9_000)
    batches = list(prompts.read(prompts.open_dataset(str(tmp_path)), ["n"]))
    assert max(len(batch.row) for batch in batches) <= prompts.rows.BATCH_ROWS
    assert np.array_equal(np.concatenate([b.index for b in batches]), np.arange(40_003))
    for batch in batches:
        assert batch.row.tolist() == batch.data.column("n").to_pylist()
    assert [b.file for b in batches][-1].endswith("b.parquet")


@pytest.mark.parametrize("limit", [None, 0, 1, 5, 12_345, 99_999])
def test_where_comes_before_limit(tmp_path: Path, limit: int | None) -> None:
    path = write(tmp_path / "a.parquet", {"n": list(range(40_000)), "m": list(range(40_000))})
    read = prompts.read(prompts.open_dataset(str(path)), ["n", "m"])
    chosen = list(prompts.select(read, pc.field("n") > 99, limit, ["m"]))
    rows = [value for batch in chosen for value in batch.data.column("m").to_pylist()]
    assert rows == list(range(100, 40_000))[:limit]
    assert all(batch.data.schema.names == ["m"] for batch in chosen)
    assert [i for batch in chosen for i in batch.index.tolist()] == rows


def test_encodings_and_widths_of_different_files_become_one_type(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet",
        {
            "prompt": pa.array(["x", None, "x"]).dictionary_encode(),
            "n": pa.array([1], pa.int8()).take(pa.array([0, 0, 0])),
        },
    )
    write(tmp_path / "b.parquet", {"prompt": pa.array(["y"], pa.large_string()), "n": pa.array([2], pa.int64())})
    write(tmp_path / "c.parquet", {"prompt": pa.nulls(1), "extra": [1.5]})
    dataset = prompts.open_dataset(str(tmp_path))
    assert pt.is_string(dataset.schema.field("prompt").type) and pt.is_int64(dataset.schema.field("n").type)
    expected = [("x", 1, None), (None, 1, None), ("x", 1, None), ("y", 2, None), (None, None, 1.5)]
    assert cells(tmp_path, ("prompt", "n", "extra")) == expected


def test_text_that_is_not_utf8_is_found_cell_by_cell() -> None:
    raw = pa.array([b"fine", b"\xff\xfe", None, "schön".encode()])
    assert prompts.texts(raw.view(pa.string())) == (["fine", None, None, "schön"], [1])


def refused(path: str | Path) -> str:
    with pytest.raises(PlanError) as caught:
        cells(path)
    return str(caught.value)


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    assert "'nowhere.parquet' names no file (relative to " in refused("nowhere.parquet")
    assert f"'{tmp_path}/no.parquet' names no file" in refused(tmp_path / "no.parquet")
    assert "names no file" in refused(f"{tmp_path}/*.parquet")
    assert "has no files ending in .parquet" in refused(tmp_path)
    assert "cannot be read" in refused("nosuch://bucket/x.parquet")


def test_what_is_not_parquet_is_named_by_file(tmp_path: Path) -> None:
    good = write(tmp_path / "a.parquet", {"prompt": ["x"] * 1000})
    data = good.read_bytes()
    for name, content in (
        ("text", b"prompt\nx\n"),
        ("empty", b""),
        ("cut", data[: len(data) // 2]),
        ("tail", data[40:]),
    ):
        bad = tmp_path / f"{name}.parquet"
        bad.write_bytes(content)
        message = refused(tmp_path)
        assert f"{name}.parquet: not a Parquet file, or a truncated or damaged one" in message
        bad.unlink()


def test_a_damaged_page_is_named_by_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": [f"a prompt {n}" for n in range(5000)]}, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:2000] = b"\0" * 1900
    path.write_bytes(bytes(data))
    assert "a.parquet: not a Parquet file, or a truncated or damaged one" in refused(path)


def test_columns_of_types_that_do_not_go_together_are_named_with_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"prompt": ["x"], "n": [1]})
    write(tmp_path / "b.parquet", {"prompt": ["x"], "n": ["one"]})
    message = refused(tmp_path)
    assert "b.parquet: column 'n' is string, but int64 in" in message and "a.parquet" in message


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "a.parquet"
    )
    assert "column 'prompt' stands more than once" in refused(tmp_path / "a.parquet")


def test_a_required_column_must_be_in_every_file_in_a_fitting_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"prompt": ["x"]})
    write(tmp_path / "b.parquet", {"promt": ["x"]})
    dataset = prompts.open_dataset(str(tmp_path))
    with pytest.raises(
        PlanError, match=r"b.parquet: no column 'prompt' \(dataset.columns.prompt\); did you mean 'promt'"
    ):
        prompts.require(dataset, "prompt", "dataset.columns.prompt", "text", pt.is_string)
    with pytest.raises(PlanError, match=r"a.parquet: column 'prompt' \(key\) is string; allowed: whole numbers"):
        prompts.require(dataset, "prompt", "key", "whole numbers", pt.is_integer)
