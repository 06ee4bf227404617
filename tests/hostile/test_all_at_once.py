"""One dataset of everything bad at once, planned, made, verified and shown: each row is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fleet.inline import config_for, drive
from tests.hostile.test_media import bombs, png, zip_of
from tests.hostile.test_report import Page
from tests.hostile.test_text import IDS, PROMPTS
from vidgen import manifest
from vidgen.report import gallery
from vidgen.report.status import read as status
from vidgen.report.verify import verify
from vidgen.store.objects import Objects

SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("text", pa.dictionary(pa.int32(), pa.string())),
        ("pic", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("steps", pa.float64()),
        ("fps", pa.decimal128(10, 3)),
        ("seed", pa.uint64()),
        ("fail", pa.string()),
        ("at", pa.timestamp("ns")),
        ("tags", pa.list_(pa.struct([("k", pa.string()), ("v", pa.int64())]))),
        ("<script>", pa.string()),
        ("status", pa.string()),
        ("raw", pa.binary()),
    ]
)
OK: dict[str, Any] = {
    "text": "a fox",
    "pic": {"bytes": png(side=16)},
    "steps": 2.0,
    "seed": 7,
    "at": 1,
    "tags": [{"k": "</script>", "v": 1}],
}


def good() -> list[dict[str, Any]]:
    rows = [{"id": f"prompt {name}", "text": text} for name, text in PROMPTS.items()]
    rows += [{"id": text} for text in IDS]
    rows += [
        {"id": "path", "pic": {"bytes": None, "path": "in.png"}},
        {"id": "relative", "pic": {"bytes": b"", "path": "./in.png"}},
    ]
    return [
        {**OK, "<script>": "<img src=x onerror=alert(1)>", "status": "\u202edone", "raw": b"\xff", **row}
        for row in rows
    ]


def bad() -> list[tuple[dict[str, Any], str]]:
    """Rows, and what the reason says: the field, its column, the value, what is allowed."""
    bomb = bombs()["2.7 GB of black"]
    return [
        ({"id": None}, "id (column 'id') is null"),
        ({"id": ""}, "id (column 'id') is empty"),
        ({"id": "twice"}, "id (column 'id') 'twice' stands in more than one row"),
        ({"id": "twice"}, "ids must be unique"),
        ({"id": "e1", "text": None}, "prompt (column 'text') is null"),
        ({"id": "e2", "text": " \n"}, "prompt (column 'text') is empty"),
        ({"id": "e3", "steps": 2.5}, "num_inference_steps (column 'steps') is 2.5; allowed: whole numbers"),
        ({"id": "e4", "steps": float("inf")}, "num_inference_steps (column 'steps') is inf; allowed: finite numbers"),
        (
            {"id": "e5", "steps": 1e18},
            "num_inference_steps (column 'steps') is 1000000000000000000; a test card can be 1 to",
        ),
        (
            {"id": "e6", "seed": 2**64 - 1},
            "seed (column 'seed') is 18446744073709551615; allowed: 0 to 281474976710655",
        ),
        ({"id": "e7", "fps": -1}, "fps (column 'fps'): -1 is not above 0"),
        ({"id": "e8", "fail": "\x1b[2J"}, "params.fail (column 'fail') is '\\x1b[2J'; allowed: ''"),
        ({"id": "e9", "pic": None}, "image (column 'pic') is empty; i2v needs one"),
        (
            {"id": "e10", "pic": {"path": "../secret.png"}},
            "secret.png lies outside the dataset's folder; allowed (dataset.media_schemes)",
        ),
        ({"id": "e11", "pic": {"path": "link.png"}}, "link.png lies outside the dataset's folder"),
        (
            {"id": "e12", "pic": {"path": "/etc/passwd"}},
            "/etc/passwd is of the scheme file; allowed (dataset.media_schemes): relative",
        ),
        ({"id": "e13", "pic": {"path": "https://169.254.169.254/latest"}}, "is of the scheme https; allowed"),
        ({"id": "e14", "pic": {"path": "no\x1b[31m.png"}}, "no\\x1b[31m.png: there is no such file"),
        (
            {"id": "e15", "pic": {"bytes": bomb}},
            "has 900,000,000 pixels; allowed: at most 67,108,864",
        ),
        (
            {"id": "e16", "pic": {"bytes": b"<svg onload=alert(1)>"}},
            "is not a picture, or its header is damaged; allowed: PNG",
        ),
        ({"id": "e17", "pic": {"path": "frames.zip"}}, "frames.zip is not a picture"),
        ({"id": "e18", "pic": {"bytes": png(side=24)}}, "is 24x24 (height x width), not 16x16 as the video"),
        (
            {"id": "e19", "text": "", "steps": 0.0, "pic": None},
            "image (column 'pic') is empty; i2v needs one; prompt (column 'text') is empty; num_inf",
        ),
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of files by several writers' conventions; the rows of `good`, `bad` and of damaged text among them."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(side=16))
    (folder / "in.png").write_bytes(png(side=16))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    zip_of({"0.png": png(side=16)}, folder / "frames.zip")
    rows = good()
    refused = [{**OK, **row} for row, _ in bad()]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "a.parquet", row_group_size=3)
    pq.write_table(
        pa.Table.from_pylist(refused, SCHEMA), folder / "b.parquet", store_schema=False, data_page_version="2.0"
    )
    pq.write_table(SCHEMA.empty_table(), folder / "c.parquet")
    pq.ParquetWriter(folder / "d.parquet", SCHEMA).close()
    broken = pa.Table.from_pylist([{**OK, "id": "f1"}, {**OK, "id": "f2"}], SCHEMA)
    text = pa.array([b"\xff\xfe", b"ok"]).view(pa.string())
    broken = broken.set_column(1, "text", text).set_column(9, "<script>", text)
    pq.write_table(broken, folder / "e.parquet")
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / ".hidden.parquet").write_bytes(b"no Parquet")
    return folder


def test_a_dataset_of_everything_bad_ends_with_every_row_accounted_for(data: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = config_for(str(data), output, name="<b>\u202ename[/x]", model__task="i2v", dataset__id_column="id")
    config.dataset.columns = {
        "prompt": "text",
        "image": "pic",
        "num_inference_steps": "steps",
        "seed": "seed",
        "fps": "fps",
    }
    config.dataset.columns["params.fail"] = "fail"
    config.dataset.media_schemes = ["relative"]
    config.sampling.height = config.sampling.width = 16
    config.sampling.num_frames, config.sampling.params = 1, {"ready": True}
    outcome, _ = drive(config, replicas=1)
    kept, refused = good(), bad()
    assert (outcome.code, outcome.counts["done"]) == (0, len(kept) + 1)

    tables = list(manifest.read(Objects(output)))
    ids = [name for table in tables for name in table.column("row_id").to_pylist()]
    statuses = [name for table in tables for name in table.column("status").to_pylist()]
    places = [
        pair
        for table in tables
        for pair in zip(*(table.column(n).to_pylist() for n in ("origin_file", "origin_row")), strict=True)
    ]
    assert len(set(places)) == len(places) == len(kept) + len(refused) + 2  # each row of each file, once
    done = [name for name, state in zip(ids, statuses, strict=True) if state == "done"]
    assert done == [*(row["id"] for row in kept), "f2"]
    rejected = tables[-1]
    reasons = rejected.column("error").to_pylist()
    assert len(reasons) == len(refused) + 1 and all(reason.isprintable() for reason in reasons)
    for (row, words), reason, number in zip(refused, reasons, rejected.column("origin_row").to_pylist(), strict=False):
        assert words in reason and refused[number][0] is row, reason
    assert reasons[-1] == "prompt (column 'text') is not valid UTF-8"
    assert tables[0].column("input_status").to_pylist()[0] == "\u202edone" and "raw" not in tables[0].column_names

    verdict = verify(output, strict=True)
    assert verdict.ok and (verdict.done, verdict.rejected) == (len(kept) + 1, len(refused) + 1), verdict.problems
    assert status(output).rejected == len(refused) + 1
    page = Path(gallery.report(output))
    tags = Page(page.read_text("utf-8")).tags
    assert not any(name.startswith("on") for _, own in tags for name in own)
    assert next(own["id"] for tag, own in tags if tag == "script") == "meta"
    assert sum(tag == "script" for tag, _ in tags) == 2 and not any(tag == "img" for tag, _ in tags)
    shown = json.loads((page.parent / "more/00000.js").read_text("ascii").partition(", ")[2].rpartition(")")[0])
    assert len(shown) == len(places)
