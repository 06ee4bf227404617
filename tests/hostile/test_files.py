"""Parquet as other tools write it is read; what is cut, damaged, encrypted or odd is refused by file and reason.

DuckDB and Polars write their files themselves; pandas and Spark are followed in their conventions by pyarrow, which is
pandas' own writer.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from tests.plan.conftest import items_of, job, rejections, rows_of
from vidgen import prompts
from vidgen.errors import PlanError
from vidgen.plan.build import PlanResult, build
from vidgen.plan.files import part_table
from vidgen.store.objects import Objects


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(str(tmp_path / "output"))


def planned(source: Path, objects: Objects, **dataset: Any) -> PlanResult:
    return build(job(source, dataset={"path": str(source), **dataset}), objects)


def refused(source: Path | str, **dataset: Any) -> str:
    with pytest.raises(PlanError) as caught:
        build(job(Path(source), dataset={"path": str(source), **dataset}), None, dry_run=True)
    return str(caught.value)


# ---------------------------------------------------------------- other tools


def test_a_file_of_duckdb_is_read_with_its_own_types(tmp_path: Path, objects: Objects) -> None:
    """Literals are decimals there, ids UUIDs or HUGEINTs, categories ENUMs; intervals, JSON and maps come along."""
    source = tmp_path / "duck.parquet"
    duckdb.sql(f"""copy (select format('a fox, take {{}}', i) as prompt, uuid() as id, i::hugeint as huge,
        (3 + i) / 2.0 as halves, 7.5 as guidance, (5 + i)::decimal(20, 0) as own, 'en'::enum('en', 'de') as lang,
        {{'a': i, 'b': [1, 2]}} as nested, map {{'k': i}} as pairs, interval 1 day as span,
        timestamp_ns '2024-01-01 00:00:00.123456789' as at, '{{"a": 1}}'::json as js, 'x'::blob as raw
        from range(3) r(i)) to '{source}' (format parquet, row_group_size 2048)""")
    ids = [str(row[0]) for row in duckdb.sql(f"select id from '{source}'").fetchall()]
    columns = {"prompt": "prompt", "seed": "own", "guidance_scale": "guidance"}
    result = planned(source, objects, columns=columns, id_column="id", where="lang = 'en' and halves > 0")
    items = items_of(objects, result)
    assert [item.row_id for item in items] == ids and result.rejected == 0
    assert [(item.request.prompt, item.request.seed, item.request.guidance_scale) for item in items] == [
        (f"a fox, take {i}", 5 + i, 7.5) for i in range(3)
    ]
    assert {"huge", "lang", "nested", "pairs", "at", "js"} <= set(result.plan.carried)
    assert not {"raw", "span"} & set(result.plan.carried)
    (part,) = result.plan.parts
    assert part_table(objects, part).column("nested").to_pylist()[2] == {"a": 2, "b": [1, 2]}


def test_a_file_of_polars_is_read_with_its_large_text_categories_and_enums(tmp_path: Path, objects: Objects) -> None:
    source = tmp_path / "polars.parquet"
    polars.DataFrame(
        {
            "prompt": ["a fox", "ein Fuchs", None],
            "id": ["a", "b", "c"],
            "mood": polars.Series(["calm", "wild", "calm"], dtype=polars.Categorical),
            "kind": polars.Series(["x", "y", "x"], dtype=polars.Enum(["x", "y"])),
            "tags": [["a"], [], None],
            "price": polars.Series(["1.5", "2", "3"]).cast(polars.Decimal(38, 2)),
            "empty": [None, None, None],
        }
    ).write_parquet(source)
    columns = {"prompt": "prompt", "negative_prompt": "mood"}
    result = planned(source, objects, columns=columns, id_column="id", where="kind = 'x' or mood = 'wild'")
    assert [(item.row_id, item.request.negative_prompt) for item in items_of(objects, result)] == [
        ("a", "calm"),
        ("b", "wild"),
    ]
    (row,) = rejections(objects, result)
    assert (row["row_id"], row["origin_row"], row["reason"]) == ("c", 2, "prompt (column 'prompt') is null")
    assert [row["tags"] for row in rows_of(objects, result)] == [["a"], []]
    again = Objects(str(tmp_path / "again"))
    only = items_of(again, build(job(source, dataset={"columns": {"prompt": "kind"}}), again))
    assert [item.request.prompt for item in only] == ["x", "y", "x"]


def test_integers_of_more_bits_than_pyarrow_has_are_named_as_that(tmp_path: Path) -> None:
    source = tmp_path / "wide.parquet"
    polars.DataFrame({"prompt": ["a"], "n": polars.Series([2**100], dtype=polars.Int128)}).write_parquet(source)
    assert (
        refused(source) == f"{source}: uses what pyarrow cannot read: Integers with more than 64 bits not implemented"
    )


def test_a_file_in_the_manner_of_pandas_is_read(tmp_path: Path, objects: Objects) -> None:
    """An index column, metadata of its own, categories as dictionaries, whole numbers with gaps as floats, NaN in
    text columns as null, timestamps of nanoseconds."""
    source = tmp_path / "pandas.parquet"
    meta = {"index_columns": ["__index_level_0__"], "columns": [], "pandas_version": "2.2.0"}
    table = pa.table(
        {
            "prompt": pa.array(["a", None, "c"]).dictionary_encode(),
            "seed": [3.0, float("nan"), 4.5],
            "at": pa.array([1, None, 3], pa.timestamp("ns")),
            "__index_level_0__": [10, 20, 30],
        }
    ).replace_schema_metadata({"pandas": json.dumps(meta)})
    pq.write_table(table, source)
    result = planned(
        source, objects, columns={"prompt": "prompt", "seed": "seed"}, id_column="__index_level_0__", carry=[]
    )
    assert [(item.row_id, item.request.seed) for item in items_of(objects, result)] == [("10", 3)]
    assert [row["reason"] for row in rejections(objects, result)] == [
        "prompt (column 'prompt') is null",
        "seed (column 'seed') is 4.5; allowed: whole numbers",
    ]


def test_a_folder_in_the_manner_of_spark_is_read(tmp_path: Path, objects: Objects) -> None:
    """A folder called .parquet with _SUCCESS, checksums, leftovers of attempts, an empty part, escaped partition
    values, timestamps of 96 bits, decimal ids and page checksums."""
    source = tmp_path / "job.parquet"
    name = "part-{:05d}-7f1d0c1e-1111-2222-3333-444455556666.c000.snappy.parquet"
    schema = pa.schema([("id", pa.decimal128(38, 0)), ("prompt", pa.string()), ("at", pa.timestamp("ns"))])
    rows = {"lang=en%2FUS/day=2024-01-01": (1, 2), "lang=__HIVE_DEFAULT_PARTITION__/day=2024-01-02": (3,)}
    for number, (folder, ids) in enumerate({**rows, "lang=de/day=2024-01-03": ()}.items()):
        table = pa.table({"id": list(ids), "prompt": [f"p{n}" for n in ids], "at": [0] * len(ids)}, schema)
        place = source / folder / name.format(number)
        place.parent.mkdir(parents=True)
        options: dict[str, Any] = {"use_deprecated_int96_timestamps": True, "store_schema": False}
        pq.write_table(table, place, write_page_checksum=True, **options)
        place.with_name(f".{place.name}.crc").write_bytes(b"crc")
    for left in ("_SUCCESS", "_metadata", "_temporary/0/part-00000.snappy.parquet", "_common_metadata"):
        (source / left).parent.mkdir(parents=True, exist_ok=True)
        (source / left).write_bytes(b"no Parquet")
    result = planned(source, objects, id_column="id")
    assert [(item.row_id, item.request.prompt) for item in items_of(objects, result)] == [
        ("3", "p3"),
        ("1", "p1"),
        ("2", "p2"),
    ]
    (part,) = result.plan.parts
    places = part_table(objects, part).select(["lang", "day"]).to_pylist()
    assert [(place["lang"], place["day"]) for place in places] == [
        (None, "2024-01-02"),
        ("en/US", "2024-01-01"),
        ("en/US", "2024-01-01"),
    ]


@pytest.mark.parametrize(
    ("kind", "values", "ids"),
    [
        (pa.int64(), [-(2**63), 2**63 - 1], [str(-(2**63)), str(2**63 - 1)]),
        (pa.uint64(), [0, 2**64 - 1], ["0", str(2**64 - 1)]),
        (pa.decimal128(38, 0), [-7, 10**37], ["-7", str(10**37)]),
        (pa.decimal256(60, 0), [1, 10**50], ["1", str(10**50)]),
        (pa.large_string(), ["a", "ä"], ["a", "ä"]),
        (pa.string_view(), ["a", "ä" * 50], ["a", "ä" * 50]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b"], ["a", "b"]),
    ],
)
def test_ids_of_every_type_that_holds_one_are_their_text(
    kind: pa.DataType, values: list[Any], ids: list[str], tmp_path: Path, objects: Objects
) -> None:
    source = tmp_path / "a.parquet"
    column = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    pq.write_table(pa.table({"prompt": ["x", "y"], "id": column}), source)
    assert [item.row_id for item in items_of(objects, planned(source, objects, id_column="id"))] == ids


@pytest.mark.parametrize("values", [[{"a": 1}], [["a"]], pa.array([1.5]), pa.array([150], pa.decimal128(5, 2)), [True]])
def test_columns_that_cannot_be_ids_are_named_with_their_type(values: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["x"], "id": values}), source)
    told = refused(source, id_column="id")
    assert told.startswith(f"{source}: column 'id' (dataset.id_column) is ") and told.endswith(
        "allowed: text, whole numbers"
    )


@pytest.mark.parametrize(
    "column", [[{"text": "a"}], [["a"]], pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), [b"a"]]
)
def test_a_nested_or_binary_prompt_column_is_refused_by_file_and_type(column: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": column}), source)
    told = refused(source)
    assert told.startswith(f"{source}: column 'prompt' (dataset.columns.prompt) is ") and told.endswith("allowed: text")


# ---------------------------------------------------------------- nothing in it


def test_files_without_rows_or_row_groups_add_nothing(tmp_path: Path, objects: Objects) -> None:
    schema = pa.schema([("prompt", pa.string()), ("n", pa.int64())])
    folder = tmp_path / "data"
    folder.mkdir()
    pq.ParquetWriter(folder / "a.parquet", schema).close()
    pq.write_table(schema.empty_table(), folder / "b.parquet")
    pq.write_table(pa.table({"prompt": ["x"], "n": [1]}, schema), folder / "c.parquet")
    assert pq.read_metadata(folder / "a.parquet").num_row_groups == 0
    result = planned(folder, objects)
    assert [item.origin_file for item in items_of(objects, result)] == [str(folder / "c.parquet")]
    for name in ("a", "b"):
        assert "no rows; the dataset has 0" in refused(folder / f"{name}.parquet")
    pq.write_table(pa.table({}), folder / "d.parquet")
    assert refused(folder) == f"{folder}/d.parquet: no column 'prompt' (dataset.columns.prompt); known: "


# ---------------------------------------------------------------- damaged


def _bytes(rows: int = 2000, **options: Any) -> bytes:
    sink = io.BytesIO()
    columns = {"prompt": [f"prompt number {n}" for n in range(rows)], "id": list(range(rows))}
    pq.write_table(pa.table(columns), sink, compression="none", use_dictionary=False, **options)
    return sink.getvalue()


def test_a_file_cut_at_any_place_is_refused_by_name(tmp_path: Path) -> None:
    data, source = _bytes(), tmp_path / "a.parquet"
    for length in (0, 1, 4, 7, 8, 12, 100, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1):
        source.write_bytes(data[:length])
        assert refused(source).startswith(f"{source}: not a Parquet file, or a truncated or damaged one: "), length
    source.write_bytes(data[:4] + data[-500:])
    assert refused(source).startswith(f"{source}: ")


def test_one_damaged_file_of_a_folder_is_the_one_that_is_named(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.parquet").write_bytes(_bytes(3))
    (tmp_path / "b.parquet").write_bytes(_bytes(3)[:-20])
    assert refused(tmp_path).startswith(f"{tmp_path}/b.parquet: not a Parquet file")


def test_a_changed_letter_is_found_where_pages_have_checksums(tmp_path: Path) -> None:
    data = _bytes(write_page_checksum=True)
    place = data.index(b"prompt number 1500")
    source = tmp_path / "a.parquet"
    source.write_bytes(data[:place] + b"P" + data[place + 1 :])
    told = refused(source)
    assert told.startswith(f"{source}: not a Parquet file, or a truncated or damaged one: ") and "CRC" in told


def test_a_footer_that_promises_other_rows_than_there_are_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.parquet"
    source.write_bytes(_bytes(10))
    whole = pq.ParquetFile.iter_batches

    def fewer(self: pq.ParquetFile, *rest: Any, **more: Any) -> Any:
        for batch in whole(self, *rest, **more):
            yield batch.slice(0, batch.num_rows - 3)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fewer)
    assert refused(source) == f"{source}: damaged: its footer says 10 rows, and there are 7"


def test_names_of_columns_that_are_no_text_are_a_damaged_file(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"], "nnnnn": [1]}), sink, store_schema=False)
    source.write_bytes(sink.getvalue().replace(b"nnnnn", b"\xff\xfe\xff\xfe\xff"))
    assert refused(source).startswith(f"{source}: not a Parquet file, or a truncated or damaged one: ")


class _Keys(pe.KmsClient):
    """Wraps keys in nothing."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return key_bytes.hex().encode()

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key.decode())


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_file_is_called_so(plaintext_footer: bool, tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    keys = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["prompt"]}, plaintext_footer=plaintext_footer
    )
    factory = pe.CryptoFactory(lambda connection: _Keys())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), keys)
    table = pa.table({"prompt": ["secret"], "n": [1]})
    with pq.ParquetWriter(source, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    told = refused(source)
    assert told.startswith(f"{source}: {'has' if plaintext_footer else 'is'} encrypted") and told.endswith(
        "encrypted Parquet is not read, write it without"
    )


# ---------------------------------------------------------------- odd


def test_a_value_that_the_common_type_of_two_files_cannot_hold_is_refused_by_file_and_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "n": [2**53 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "n": [0.5]}), tmp_path / "b.parquet")
    told = refused(tmp_path)
    assert told.startswith(f"{tmp_path}/a.parquet: column 'n' does not become double: Integer value 9007199254740993")


def test_columns_of_any_name_are_selected_and_carried(tmp_path: Path, objects: Objects) -> None:
    source = tmp_path / "a.parquet"
    odd = {
        "": [1, 2],
        "a.b": [3, 4],
        "a": [{"b": 5}, {"b": 6}],
        "\0row": [7, 8],
        "\u202egpj": ["x", "y"],
        "<b>": ["q", "r"],
    }
    pq.write_table(pa.table({"prompt": ["one", "two"], **odd}), source)
    result = planned(source, objects, where='"a.b" = 4 and "\0row" = 8')
    (row,) = rows_of(objects, result)
    assert {name: row[name] for name in odd} == {name: values[1] for name, values in odd.items()}


def test_file_names_that_are_no_text_are_refused_and_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")  # opening it would wait for ever
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "round").symlink_to(tmp_path)
    assert "has no files ending in" in refused(tmp_path)
    (tmp_path / "a.parquet").write_bytes(_bytes(3))
    assert build(job(tmp_path), None, dry_run=True).items == 3
    os.rename(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/lang=\xff.parquet")
    told = refused(tmp_path)
    assert told.startswith(f"dataset.path: '{tmp_path}' has a file whose name is not UTF-8: ") and told.endswith(
        "rename it"
    )


def test_long_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts.rows, "BATCH_BYTES", 1 << 20)
    source = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"{n} " + "fox " * 5_000 for n in range(200)], "n": list(range(200))})
    pq.write_table(table, source, use_dictionary=False)
    opened = prompts.open_dataset(str(source))
    sizes = [len(rows.row) for rows in prompts.read(opened, ["prompt"])]
    assert sum(sizes) == 200 and 40 <= max(sizes) <= 53
    assert [len(rows.row) for rows in prompts.read(opened, ["n"])] == [200]
