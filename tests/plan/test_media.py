"""Conditioning media of a dataset: from cells to items, and from a plan to pixels."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
import uuid
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.fleet.inline import config_for, drive
from tests.plan.conftest import dataset, items_of, job, planned, rejections, rows_of
from vidgen import identity, manifest, media, prompts
from vidgen.conditioning import cells, inspect
from vidgen.conditioning.places import parse_cell
from vidgen.errors import ConfigError, InfrastructureError, PlanError
from vidgen.models.testcard.backend import inset
from vidgen.plan import files
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.store import state
from vidgen.store.objects import Objects
from vidgen.types import MANIFEST_COLUMNS, Media, Part

SIDE = 64
I2V: dict[str, Any] = {"family": "testcard", "task": "i2v"}
V2V: dict[str, Any] = {"family": "testcard", "task": "v2v"}
IMAGE = {"prompt": "prompt", "image": "pic"}


def png(level: int, height: int = SIDE, width: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level, 0, 255 - level)).save(buffer, "PNG")
    return buffer.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def i2v(**rooms: dict[str, Any]) -> dict[str, Any]:
    return {"model": I2V, **rooms, "dataset": {"columns": IMAGE, **rooms.get("dataset", {})}}


def frames_zip(place: Path, count: int, side: int = SIDE) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}.png", png(10 * number, side, side))
    return place


# ---------------------------------------------------------------- cells


def test_a_path_is_absolute_or_relative_to_the_datasets_folder_or_any_url(tmp_path: Path, objects: Objects) -> None:
    source, remote = tmp_path / "data/lang=en/a.parquet", f"memory://plan-media-{uuid.uuid4()}/r.png"
    fsspec.filesystem("memory").pipe_file(remote, png(4))
    for name, level in (("data/pics/one.png", 1), ("two.png", 2), ("data/lang=en/three.png", 3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(level))
    paths = ["pics/one.png", str(tmp_path / "two.png"), f"file://{tmp_path}/two.png", remote]
    dataset(source, {"prompt": list("abcd"), "pic": paths})
    for path in (str(tmp_path / "data"), f"{tmp_path}/data/", f"{tmp_path}/data/*/*.parquet"):
        store = Objects(f"memory://{uuid.uuid4()}")
        items = items_of(store, build(job(Path(path), **i2v()), store))
        found = [(item.request.image.url, item.request.image.digest) for item in items if item.request.image]
        places = [f"{tmp_path}/data/pics/one.png", *paths[1:]]
        assert found == [(place, sha(png(level))) for place, level in zip(places, (1, 2, 2, 4), strict=True)]
    dataset(source, {"prompt": ["a"], "pic": ["three.png"]})
    (item,) = items_of(objects, build(job(source, **i2v()), objects))
    assert item.request.image == Media(str(source.parent / "three.png"), sha(png(3)))


def test_relative_paths_of_a_remote_dataset_lie_beside_it(objects: Objects) -> None:
    folder = f"memory://plan-media-{uuid.uuid4()}"
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"], "pic": ["sub/x.png"]}), buffer)
    fsspec.filesystem("memory").pipe({f"{folder}/d/a.parquet": buffer.getvalue(), f"{folder}/d/sub/x.png": png(5)})
    for path in (f"{folder}/d/a.parquet", f"{folder}/d", f"{folder}/d/*.parquet"):
        config = config_for(path, "x", model__task="i2v", dataset__columns__image="pic")
        store = Objects(f"memory://{uuid.uuid4()}")
        (item,) = items_of(store, build(config, store))
        assert item.request.image == Media(f"{folder}/d/sub/x.png", sha(png(5)))


@pytest.mark.parametrize("kind", ["bytes", "large", "struct", "struct without path"])
def test_bytes_in_a_cell_are_planned_by_reference(kind: str, source: Path, objects: Objects) -> None:
    column = {
        "bytes": pa.array([png(1), png(2)]),
        "large": pa.array([png(1), png(2)], pa.large_binary()),
        "struct": pa.array([{"bytes": png(1), "path": "a.png"}, {"bytes": png(2), "path": None}]),
        "struct without path": pa.array([{"bytes": png(1)}, {"bytes": png(2)}]),
    }[kind]
    dataset(source, {"prompt": ["a", "b"], "pic": column})
    result = build(job(source, **i2v()), objects)
    for number, item in enumerate(items_of(objects, result)):
        assert item.request.image is not None and item.request.image.data is None
        assert parse_cell(item.request.image.url) == (str(source), number, "pic")
        assert item.request.image.digest == sha(png(number + 1))
    assert result.plan.carried == () and "pic" not in rows_of(objects, result)[0]


def test_a_struct_without_bytes_is_its_path(source: Path, objects: Objects) -> None:
    (source.parent / "x.png").write_bytes(png(3))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    dataset(source, {"prompt": ["a", "b"], "pic": pa.array([{"bytes": None, "path": "x.png"}, None], kind)})
    result = build(job(source, **i2v()), objects)
    assert [item.request.image for item in items_of(objects, result)] == [
        Media(str(source.parent / "x.png"), sha(png(3)))
    ]
    assert [row["reason"] for row in rejections(objects, result)] == ["image (column 'pic') is empty; i2v needs one"]


def test_a_media_column_has_a_type_that_can_be_one(source: Path) -> None:
    for values in ([1], [[b"x"]], [{"path": "x"}], [{"bytes": "text"}]):
        dataset(source, {"prompt": ["a"], "pic": pa.array(values)})
        with pytest.raises(
            PlanError, match=r"column 'pic' \(dataset.columns.image\) is .*allowed: text \(a path or URL\)"
        ):
            build(job(source, **i2v()), None, dry_run=True)


def test_all_media_of_a_row_travel_through_the_plan(source: Path, objects: Objects) -> None:
    for name, level in (("a.png", 1), ("b.png", 2)):
        (source.parent / name).write_bytes(png(level))
    dataset(source, {"prompt": ["x", "y"], "pic": ["a.png", "a.png"], "end": [None, "b.png"]})
    rooms = i2v(dataset={"columns": {**IMAGE, "last_image": "end"}, "samples_per_row": 2, "resize": "cover"})
    items = items_of(objects, build(job(source, **rooms), objects))
    assert [item.request.last_image is not None for item in items] == [False, False, True, True]
    assert items[2].request.last_image == Media(str(source.parent / "b.png"), sha(png(2)))
    assert all(item.request.image is not None and item.request.resize == "cover" for item in items)
    for item in items:
        assert item.request_hash == identity.request_hash(item.request)


def test_a_part_from_before_there_were_media_is_read(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", "b"]})
    plan = build(job(source), objects).plan
    (part,) = plan.parts
    table = pq.read_table(io.BytesIO(objects.read(part.name)))
    before = list(read_items(objects, plan, part))
    sink = io.BytesIO()
    pq.write_table(table.drop_columns(["image", "last_image", "video", "resize"]), sink)
    objects.put(part.name, sink.getvalue())
    old = Part(part.name, sha(sink.getvalue()), part.items, part.first)
    assert list(read_items(objects, plan, old)) == before


# ---------------------------------------------------------------- rejections


def test_each_bad_medium_is_a_rejection_with_its_reason_and_the_rest_goes_on(source: Path, objects: Objects) -> None:
    folder = source.parent
    for name, data in (
        ("ok.png", png(1)),
        ("small.png", png(1, 48, 32)),
        ("text.png", b"not a picture"),
        ("cut.png", png(1)[:30]),
        ("empty.png", b""),
    ):
        (folder / name).write_bytes(data)
    rows = [
        ("ok.png", None),
        (None, "is empty; i2v needs one"),
        ("", "is empty; i2v needs one"),
        ("no.png", "no.png: there is no such file"),
        ("small.png", "small.png is 48x32 (height x width), not 64x64 as the video; dataset.resize: cover or contain"),
        ("text.png", "text.png is not a picture, or its header is damaged; allowed: PNG, JPEG, WEBP"),
        ("cut.png", "cut.png is not a picture, or its header is damaged"),
        ("empty.png", "empty.png is not a picture"),
        (".", "is a folder, not a picture"),
        ("nosuch://x/a.png", "nosuch://x/a.png cannot be opened: Protocol not known"),
    ]
    dataset(source, {"prompt": ["x"] * len(rows), "pic": [path for path, _ in rows]})
    result = build(job(source, **i2v()), objects)
    assert [item.origin_row for item in items_of(objects, result)] == [0]
    refused = rejections(objects, result)
    assert [row["origin_row"] for row in refused] == list(range(1, len(rows)))
    for row, (_, words) in zip(refused, rows[1:], strict=True):
        assert row["reason"].startswith("image (column 'pic')") and str(words) in row["reason"], row["reason"]


def test_bad_bytes_are_told_by_their_column_alone(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", "b", "c"], "pic": [png(1), b"junk", png(1, 32, 32)]})
    result = build(job(source, **i2v()), objects)
    reasons = [row["reason"] for row in rejections(objects, result)]
    assert (
        reasons[0]
        == "image (column 'pic') is not a picture, or its header is damaged; allowed: PNG, JPEG, WEBP, BMP, GIF, TIFF"
    )
    assert reasons[1].startswith("image (column 'pic') is 32x32 (height x width), not 64x64")


def test_every_mistake_of_a_row_is_told(source: Path, objects: Objects) -> None:
    columns = {**IMAGE, "last_image": "end", "height": "h"}
    dataset(source, {"prompt": ["", "y"], "pic": ["no.png", None], "end": ["gone.png", None], "h": [5000, 5001]})
    with pytest.raises(PlanError) as caught:
        build(job(source, **i2v(dataset={"columns": columns})), objects)
    first, second = str(caught.value).splitlines()[1:]
    assert "image (column 'pic') is empty; i2v needs one" in second and "5001" in second
    for words in ("prompt (column 'prompt') is empty", "no.png: there is", "gone.png: there is", "height (column 'h')"):
        assert words in first


def test_a_size_is_held_against_each_variant(source: Path, objects: Objects) -> None:
    (source.parent / "a.png").write_bytes(png(1, 32, 64))
    dataset(source, {"prompt": ["a"], "pic": ["a.png"]})
    sweep = {"over": {"height": [32, 64]}}
    result = build(job(source, **i2v(sweep=sweep)), objects)
    assert [item.request.height for item in items_of(objects, result)] == [32]
    (refused,) = rejections(objects, result)
    assert refused["variant"] == '{"height": 64}' and "is 32x64 (height x width), not 64x64" in refused["reason"]
    for how in ("cover", "contain"):
        scaled = build(job(source, **i2v(sweep=sweep, dataset={"resize": how})), None, dry_run=True)
        assert (scaled.items, scaled.rejected) == (2, 0)


def test_a_zip_or_folder_of_frames_is_counted_and_measured(source: Path, objects: Objects) -> None:
    folder = source.parent
    for name, count, side in (("ok", 5, SIDE), ("long", 6, SIDE), ("small", 5, 32)):
        frames_zip(folder / f"{name}.zip", count, side)
        zipfile.ZipFile(folder / f"{name}.zip").extractall(folder / name)
    (folder / "pic.mp4").write_bytes(png(1))
    names = ["ok.zip", "ok", "long.zip", "long", "small.zip", "small", "pic.mp4", "source.zip"]
    (folder / "source.zip").write_bytes(b"PK\x03\x04 cut")
    dataset(source, {"prompt": ["x"] * len(names), "clip": names})
    rooms = {
        "model": V2V,
        "dataset": {"columns": {"prompt": "prompt", "video": "clip"}},
        "sampling": {"num_frames": 5},
    }
    result = build(job(source, **rooms), objects)
    assert [item.origin_row for item in items_of(objects, result)] == [0, 1]
    reasons = [row["reason"] for row in rejections(objects, result)]
    for reason, words in zip(
        reasons,
        [
            "long.zip has 6 frames; num_frames is 5",
            "long has 6 frames; num_frames is 5",
            "small.zip is 32x32",
            "small is 32x32",
            "pic.mp4 is a picture, not a video",
            "source.zip is a damaged zip",
        ],
        strict=True,
    ):
        assert words in reason, reason


def test_schemes_may_be_limited(source: Path, objects: Objects) -> None:
    remote = f"memory://plan-media-{uuid.uuid4()}/r.png"
    fsspec.filesystem("memory").pipe_file(remote, png(4))
    (source.parent / "a.png").write_bytes(png(1))
    dataset(source, {"prompt": ["a", "b", "c"], "pic": ["a.png", remote, f"simplecache::{remote}"]})
    result = build(job(source, **i2v(dataset={"media_schemes": ["file", "s3"]})), objects)
    assert len(items_of(objects, result)) == 1
    told = [row["reason"] for row in rejections(objects, result)]
    assert told[0].endswith(f"{remote} is of the scheme memory; allowed (dataset.media_schemes): file, s3")
    assert "is of the scheme simplecache" in told[1]
    both = ["file", "memory", "simplecache"]
    assert build(job(source, **i2v(dataset={"media_schemes": both})), None, dry_run=True).items == 3
    dataset(source, {"prompt": ["a"], "pic": [png(1)]})
    assert build(job(source, **i2v(dataset={"media_schemes": []})), None, dry_run=True).items == 1


def test_a_scheme_that_does_not_exist_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"dataset.media_schemes: 'htps' is not a scheme.*did you mean 'https'"):
        config_for("a", "b", dataset__media_schemes="[file, htps]")
    assert config_for("a", "b", dataset__media_schemes="[file, s3]").dataset.media_schemes == ["file", "s3"]
    with pytest.raises(
        ConfigError, match=r"dataset.resize: 'crop' is not allowed; allowed: 'exact', 'cover', 'contain'"
    ):
        config_for("a", "b", dataset__resize="crop")


@pytest.mark.parametrize(
    ("model", "columns", "words"),
    [
        (I2V, {}, "dataset.columns: task i2v of testcard needs image; map the column"),
        (I2V, {"last_image": "pic"}, "dataset.columns: task i2v of testcard needs image"),
        (I2V, {"image": "pic", "video": "pic"}, "dataset.columns.video: 'pic' is mapped, but task i2v"),
        (V2V, {"video": "pic", "image": "pic"}, "dataset.columns.image: 'pic' is mapped, but task v2v"),
        ({"family": "testcard"}, {"video": "pic"}, "dataset.columns.video: 'pic' is mapped, but task t2v of testcard"),
    ],
)
def test_which_media_are_mapped_is_a_matter_of_the_task(
    model: dict[str, Any], columns: dict[str, str], words: str, source: Path
) -> None:
    dataset(source, {"prompt": ["a"], "pic": ["a.png"]})
    with pytest.raises(ConfigError, match=words):
        build(job(source, model=model, dataset={"columns": {"prompt": "prompt", **columns}}), None, dry_run=True)


@pytest.mark.parametrize("error", [InfrastructureError("a.png cannot be reached"), RuntimeError("a library's own")])
def test_a_store_that_does_not_answer_is_asked_again_and_then_is_a_reason(
    error: Exception, source: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    at = inspect.at

    def fails(url: str, video: bool) -> inspect.Seen:
        asked.append(Path(url).name)
        if url.endswith("dead.png") or (asked.count("slow.png") == 1 and url.endswith("slow.png")):
            raise error
        return at(url, video)

    monkeypatch.setattr(inspect, "at", fails)
    monkeypatch.setattr("vidgen.plan.media.RETRY_SECONDS", 0.0)
    (source.parent / "slow.png").write_bytes(png(1))
    dataset(source, {"prompt": ["a", "b"], "pic": ["dead.png", "slow.png"]})
    result = build(job(source, **i2v()), objects)
    assert sorted(asked) == ["dead.png", "dead.png", "slow.png", "slow.png"]
    assert [item.origin_row for item in items_of(objects, result)] == [1]
    assert str(error) in rejections(objects, result)[0]["reason"]
    monkeypatch.setattr(inspect, "at", at)
    (source.parent / "dead.png").write_bytes(png(2))
    assert build(job(source, **i2v()), objects, extend=True).plan.counts["items"] == 1


# ---------------------------------------------------------------- work and memory


def test_a_file_is_looked_at_once_however_many_rows_name_it(
    source: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    at = inspect.at

    def noted(url: str, video: bool) -> inspect.Seen:
        looked.append(url)
        return at(url, video)

    monkeypatch.setattr(inspect, "at", noted)
    monkeypatch.setattr(prompts.rows, "BATCH_ROWS", 10)
    for name in ("a.png", "b.png"):
        (source.parent / name).write_bytes(png(1))
    dataset(source, {"prompt": [f"p{n}" for n in range(50)], "pic": ["a.png", "b.png"] * 25, "end": ["a.png"] * 50})
    result = build(job(source, **i2v(dataset={"columns": {**IMAGE, "last_image": "end"}})), objects)
    assert result.items == 50 and sorted(looked) == [f"{source.parent}/a.png", f"{source.parent}/b.png"]


def test_of_bytes_in_cells_only_a_few_are_held(source: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 pictures of a megabyte of noise; planned with batches of 4 MiB, twice (ids first, then items)."""
    noise = [Image.frombytes("RGB", (SIDE, SIDE), np.random.default_rng(n).bytes(3 * SIDE * SIDE)) for n in range(48)]
    values = []
    for picture in noise:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        values.append(buffer.getvalue() + bytes(1 << 20))
    dataset(source, {"prompt": ["x"] * 48, "pic": values}, compression="none", use_dictionary=False, write_batch_size=1)
    del noise, values
    most = 4 << 20
    monkeypatch.setattr(prompts.rows, "CELL_BATCH_BYTES", most)
    peak = 0
    held = inspect.held

    def noted(*arguments: Any) -> inspect.Seen:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes())
        return held(*arguments)

    monkeypatch.setattr(inspect, "held", noted)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        result = build(job(source, **i2v()), objects)
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.items == 48
    assert peak - before < 5 * most and python < 5 * most  # Arrow's batch and page; the cells as bytes, two batches


# ---------------------------------------------------------------- identity


def test_an_item_is_named_by_the_content_of_its_media_not_their_place(tmp_path: Path) -> None:
    rooms = i2v(dataset={"id_column": "id"})
    for name, level in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        (tmp_path / name).write_bytes(png(level))

    def item(cell: Any, **more: Any) -> Any:
        (found,) = planned(tmp_path, {"id": ["r"], "prompt": ["x"], "pic": [cell]}, **{**rooms, **more})
        return found

    first = item("a.png")
    assert item("b.png").item_id == item(png(1)).item_id == first.item_id
    assert item("c.png").item_id != first.item_id and item("c.png").request.seed == first.request.seed
    cover = item("a.png", dataset={**rooms["dataset"], "resize": "cover"})
    assert cover.item_id != first.item_id and cover.spec_hash == first.spec_hash


def test_how_media_are_resized_names_no_item_without_media(tmp_path: Path) -> None:
    exact, cover = (
        planned(tmp_path, {"prompt": ["x"]}, dataset={"resize": how})[0].item_id for how in ("exact", "cover")
    )
    assert exact == cover == PINNED


PINNED = "9dbfcbdaa83216c596ef3d6ad56b55d3"


def test_rows_without_ids_are_told_apart_by_their_media(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    columns = {"prompt": ["x"] * 4, "pic": ["a.png", "b.png", "a.png", "a.png"]}
    by_path = planned(tmp_path, columns, "paths", **i2v())
    assert len({item.row_id for item in by_path}) == 4
    by_bytes = planned(tmp_path, {"prompt": ["x"] * 3, "pic": [png(1), png(2), png(1)]}, "bytes", **i2v())
    assert len({item.row_id for item in by_bytes}) == 3
    limited = planned(tmp_path, columns, "limited", **i2v(dataset={"where": "pic = 'b.png'"}))
    assert [item.row_id for item in limited] == [by_path[1].row_id]


def test_an_extension_adds_the_rows_whose_media_are_new(source: Path, objects: Objects) -> None:
    for name, level in (("a.png", 1), ("b.png", 2)):
        (source.parent / name).write_bytes(png(level))
    dataset(source, {"prompt": ["x", "y"], "pic": ["a.png", "no.png"]})
    build(job(source, **i2v()), objects)
    dataset(source, {"prompt": ["x", "y", "z"], "pic": ["a.png", "no.png", "b.png"]})
    more = build(job(source, **i2v()), objects, extend=True)
    assert (more.plan.counts["items"], more.plan.counts["rejected"]) == (1, 0)
    assert items_of(objects, more)[-1].request.image == Media(str(source.parent / "b.png"), sha(png(2)))


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("height", [32, 64]),
        ("width", [32, 64]),
        ("num_frames", [3, 5]),
        ("fps", [4, 8.0]),
        ("num_inference_steps", [1, 2]),
        ("guidance_scale", [1, 3.5]),
        ("negative_prompt", ["bad", "worse"]),
        ("params.step_seconds", [0, 0.5]),
        ("params.ready", [False, True]),
        ("params.fail", ["", "item"]),
        ("params.fail_share", [0.5, 1]),
    ],
)
def test_whatever_may_be_swept_makes_its_variants_of_a_row_with_media(
    field: str, values: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    rooms = i2v(sweep={"over": {field: values}}, dataset={"resize": "cover", "samples_per_row": 2})
    items = planned(tmp_path, {"prompt": ["x", "y"], "pic": ["a.png", "a.png"]}, **rooms)
    assert len({item.item_id for item in items}) == len(items) == 8
    name = field.removeprefix("params.")
    found = [r.param(name) if field != name else getattr(r, name) for r in (item.request for item in items)]
    assert found == [value for value in values for _ in range(2)] * 2
    assert len({item.request.seed for item in items}) == 4


def test_a_sweep_wins_over_a_cell_of_params(tmp_path: Path) -> None:
    columns = {"prompt": "prompt", "params.step_seconds": "pause"}
    rooms: dict[str, Any] = {"dataset": {"columns": columns}, "sweep": {"over": {"params.step_seconds": [1, 2]}}}
    items = planned(tmp_path, {"prompt": ["x"], "pause": [9.0]}, **rooms)
    assert [item.request.param("step_seconds") for item in items] == [1.0, 2.0]


# ---------------------------------------------------------------- to pixels


def shown(output: Path, record: dict[str, Any], name: str = "image") -> np.ndarray:
    """What the finished video shows of a conditioning medium, [F, h, w, 3]."""
    frames = media.read_frames(output / record["video"])
    rows, columns = inset(name, SIDE, SIDE)
    return frames[:, rows, columns]


def manifest_of(output: Path) -> list[dict[str, Any]]:
    return [row for table in manifest.read(Objects(str(output))) for row in table.to_pylist()]


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
def test_a_picture_in_a_dataset_becomes_pixels(kind: str, source: Path, tmp_path: Path) -> None:
    levels = [10, 90, 170, 250, 30]
    for number, level in enumerate(levels):
        (tmp_path / f"{number}.png").write_bytes(png(level))
    pic = {
        "path": [f"{number}.png" for number in range(len(levels))],
        "bytes": [png(level) for level in levels],
        "struct": [{"bytes": png(level), "path": "x.png"} for level in levels],
    }[kind]
    dataset(source, {"prompt": [f"p{n}" for n in range(5)], "pic": pic, "n": list(range(5))}, row_group_size=2)
    config = config_for(str(source), str(tmp_path / "out"), model__task="i2v", dataset__columns__image="pic",
                        output__format="png", run__max_attempts=1)  # fmt: skip
    outcome, _ = drive(config)
    assert outcome.code == 0 and outcome.counts["done"] == 5
    rows = manifest_of(tmp_path / "out")
    assert len(rows) == 5 and set(rows[0]) - set(MANIFEST_COLUMNS) == {"n"}
    for row in rows:
        assert (shown(tmp_path / "out", row) == (levels[row["n"]], 0, 255 - levels[row["n"]])).all()


def test_a_video_this_program_made_conditions_another(source: Path, tmp_path: Path) -> None:
    dataset(source, {"prompt": ["first"]})
    first = config_for(str(source), str(tmp_path / "first"), output__format="png", sampling__num_frames=5)
    assert drive(first)[0].code == 0
    (row,) = manifest_of(tmp_path / "first")
    clip = tmp_path / "first" / row["video"]
    dataset(source, {"prompt": ["second"], "clip": [str(clip)]})
    second = config_for(str(source), str(tmp_path / "second"), model__task="v2v", dataset__columns__video="clip",
                        output__format="png", sampling__num_frames=5)  # fmt: skip
    assert drive(second)[0].code == 0
    (row,) = manifest_of(tmp_path / "second")
    for frame, made in zip(shown(tmp_path / "second", row, "video"), media.read_frames(clip), strict=True):
        small = Image.fromarray(made).resize(frame.shape[1::-1], Image.Resampling.BOX)
        assert np.array_equal(frame, np.asarray(small))


def test_media_that_changed_after_planning_fail_their_items_and_no_others(source: Path, tmp_path: Path) -> None:
    for name, level in (("a.png", 10), ("b.png", 20), ("c.png", 30)):
        (tmp_path / name).write_bytes(png(level))
    dataset(source, {"prompt": list("xyz"), "pic": ["a.png", "b.png", "c.png"]})
    config = config_for(str(source), str(tmp_path / "out"), model__task="i2v", dataset__columns__image="pic",
                        output__format="png", run__max_attempts=1)  # fmt: skip
    objects = Objects(str(tmp_path / "out"))
    build(config, objects)
    (tmp_path / "a.png").write_bytes(png(99))
    (tmp_path / "b.png").unlink()
    outcome, _ = drive(config, replicas=1)
    assert outcome.code == 3 and outcome.counts["done"] == 1
    by_prompt = {row["prompt"]: row for row in manifest_of(tmp_path / "out")}
    assert "is not what was planned" in by_prompt["x"]["error"] and by_prompt["x"]["error_class"] == "item"
    assert "there is no such file" in by_prompt["y"]["error"]
    assert (shown(tmp_path / "out", by_prompt["z"]) == (30, 0, 225)).all()


@pytest.mark.parametrize("how", ["cover", "contain"])
def test_a_resize_policy_reaches_the_pixels(how: str, source: Path, tmp_path: Path) -> None:
    wide = Image.new("RGB", (2 * SIDE, SIDE), (200, 200, 200))
    wide.save(tmp_path / "a.png")
    dataset(source, {"prompt": ["x"], "pic": ["a.png"]})
    config = config_for(str(source), str(tmp_path / "out"), model__task="i2v", dataset__columns__image="pic",
                        output__format="png", dataset__resize=how)  # fmt: skip
    assert drive(config, replicas=1)[0].code == 0
    (row,) = manifest_of(tmp_path / "out")
    seen = shown(tmp_path / "out", row)[0, :, :, 0]
    assert (seen == 200).all() if how == "cover" else (seen[0] == 0).all() and (seen[8] == 200).all()


def test_the_plan_holds_no_bytes(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": [f"p{n}" for n in range(20)], "pic": [png(n) for n in range(20)]})
    result = build(job(source, **i2v()), objects)
    for part in result.plan.parts:
        table = files.part_table(objects, part)
        assert not any(prompts.holds_binary(field.type) for field in table.schema)
    held = state.load(objects, 20)
    assert held.count("pending") == 20 and json.loads(objects.read("plan/0/PLAN.json"))["counts"]["items"] == 20
    cells.forget()
