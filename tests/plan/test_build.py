"""Planning: every row is an item or a rejection, values resolve in order, and exactly one plan is frozen."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.plan.conftest import dataset, items_of, job, planned, rejections, rows_of
from vidgen.errors import ConfigError, PlanError
from vidgen.plan import files
from vidgen.plan.build import build, changed_dataset
from vidgen.plan.files import check_resume, part_table, read_plan
from vidgen.store.objects import Objects
from vidgen.types import MANIFEST_COLUMNS

# ---------------------------------------------------------------- values


def test_a_sweep_wins_over_a_cell_a_cell_over_the_configuration_and_that_over_the_family(tmp_path: Path) -> None:
    items = planned(
        tmp_path,
        {"prompt": ["a", "b"], "h": [96, None], "w": [80, None], "neg": ["dull", None], "own": [5, None]},
        dataset={
            "columns": {"prompt": "prompt", "height": "h", "width": "w", "negative_prompt": "neg", "seed": "own"},
            "id_column": None,
        },
        sampling={"height": 32, "fps": 4, "negative_prompt": "blur", "seed": 3},
        sweep={"over": {"width": [16, 24]}},
    )
    values = [(r.height, r.width, r.fps, r.negative_prompt, r.num_frames) for r in (item.request for item in items)]
    assert values == [
        (96, 16, 4.0, "dull", 17),
        (96, 24, 4.0, "dull", 17),
        (32, 16, 4.0, "blur", 17),
        (32, 24, 4.0, "blur", 17),
    ]
    assert [item.request.seed == 5 for item in items] == [True, True, False, False]


def test_the_config_as_written_and_what_null_stood_for_are_both_kept(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})
    plan = build(job(source, sampling={"height": 32}), objects).plan
    assert plan.config["sampling"]["width"] is None and plan.resolved["sampling"]["width"] == 64
    assert plan.resolved["sampling"]["height"] == 32 and plan.resolved["output"]["codec"] == "libx264"


@pytest.mark.parametrize(("mode", "count"), [("product", 4), ("zip", 2)])
def test_sweeps_combine_as_product_or_zip(tmp_path: Path, mode: str, count: int) -> None:
    over = {"height": [32, 64], "params.step_seconds": [0.0, 1.0]}
    items = planned(tmp_path, {"prompt": ["a"]}, sweep={"over": over, "mode": mode})
    assert len({item.item_id for item in items}) == len(items) == count


def test_variants_that_resolve_alike_are_refused(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})
    with pytest.raises(ConfigError, match="resolve alike"):
        build(job(source, sweep={"over": {"fps": [8, 8.0]}}), objects)


def test_params_are_checked_by_name_and_type(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"], "s": ["x"]})
    for rooms, words in (
        ({"sampling": {"params": {"step_second": 1}}}, "sampling.params.step_second.*'step_seconds'"),
        ({"sampling": {"params": {"step_seconds": "fast"}}}, "sampling.params.step_seconds.*'fast'.*float"),
        ({"sweep": {"over": {"params.ready": [1]}}}, "sweep.over.params.ready.*bool"),
        ({"dataset": {"columns": {"prompt": "prompt", "params.strength": "s"}}}, "dataset.columns.params.strength"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(job(source, **rooms), objects)


def test_items_survive_being_written_and_read(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", "b\n\0ü"], "p": [3, None], "topic": ["x", None]})
    rooms: dict[str, Any] = {
        "dataset": {"path": str(source), "columns": {"prompt": "prompt", "priority": "p"}, "samples_per_row": 3},
        "sampling": {"params": {"step_seconds": 2}},
    }
    result = build(job(source, **rooms), objects)
    items = items_of(objects, result)
    assert [item.ordinal for item in items] == list(range(6))
    assert [item.sample for item in items] == [0, 1, 2] * 2
    assert [(item.priority, item.origin_row) for item in items] == [(3, 0)] * 3 + [(0, 1)] * 3
    assert items[3].request.prompt == "b\n\0ü" and items[0].request.param("step_seconds") == 2.0
    assert items[0].origin_file == str(source)
    assert [row["topic"] for row in rows_of(objects, result)] == ["x"] * 3 + [None] * 3


def test_parts_are_cut_and_listed_by_ordinal(source: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_ITEMS", 10)
    dataset(source, {"prompt": [f"p{n}" if n % 5 else "" for n in range(30)]})
    plan = build(job(source), objects).plan
    assert [(part.first, part.items) for part in plan.parts] == [(0, 10), (10, 10), (20, 4)]
    assert [(part.first, part.items) for part in plan.rejected] == [(0, 6)]
    for part in (*plan.parts, *plan.rejected):
        assert part.sha256[:12] in part.name and part_table(objects, part).num_rows == part.items


# ---------------------------------------------------------------- what is carried


def test_other_columns_are_carried_and_clashes_renamed(source: Path, objects: Objects) -> None:
    columns: dict[str, Any] = {
        "prompt": ["a", None],
        "topic": ["x", "y"],
        "status": ["old", "older"],
        "tags": [["a"], ["b", "c"]],
        "seed": [1, 2],
        "raw": pa.array([b"1", b"2"]),
        "pictures": pa.array([{"bytes": b"1"}, None]),
        "input_status": [1.0, 2.0],
    }
    dataset(source, columns)
    result = build(job(source), objects)
    assert set(result.plan.carried) == {"topic", "input_input_status", "tags", "input_seed", "input_status"}
    (row,) = rows_of(objects, result)
    assert (row["topic"], row["input_input_status"], row["tags"], row["input_seed"]) == ("x", "old", ["a"], 1)
    (refused,) = rejections(objects, result)
    assert (refused["topic"], refused["input_input_status"], refused["tags"]) == ("y", "older", ["b", "c"])
    assert any("dataset.columns.seed=seed" in note for note in result.notes)
    assert not set(result.plan.carried) & set(MANIFEST_COLUMNS)


def test_carry_names_the_columns_that_are_carried(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"], "x": [1], "y": [2], "raw": [b"1"]})
    assert build(job(source, dataset={"carry": ["y", "prompt"]}), objects).plan.carried == ("y", "input_prompt")
    for name, words in (("z", "no column 'z'"), ("raw", "binary")):
        with pytest.raises(PlanError, match=words):
            build(job(source, dataset={"carry": [name]}), None, dry_run=True)


# ---------------------------------------------------------------- bad input


def test_each_bad_row_is_rejected_with_its_column_and_rule_and_the_rest_is_planned(
    source: Path, objects: Objects
) -> None:
    rows: list[tuple[Any, Any, Any, Any, Any, str]] = [
        ("ok", "a fox", 64.0, 7, None, ""),
        (None, "a fox", None, None, None, "id (column 'id') is null"),
        ("", "a fox", None, None, None, "id (column 'id') is empty"),
        ("twice", "a fox", None, None, None, "id (column 'id') 'twice' stands in more than one row"),
        ("twice", "a wolf", None, None, None, f"({source}, row 3, {source}, row 4)"),
        ("r5", None, None, None, None, "prompt (column 'text') is null"),
        ("r6", " \n", None, None, None, "prompt (column 'text') is empty"),
        ("r7", "a fox", 64.5, None, None, "height (column 'h') is 64.5; allowed: whole numbers"),
        ("r8", "a fox", 5000.0, None, None, "height (column 'h') is 5000; a test card can be 8 to 4096"),
        ("r9", "a fox", float("inf"), None, None, "height (column 'h') is inf; allowed: finite numbers"),
        ("r10", "a fox", None, -1, None, "seed (column 'own') is -1; allowed: 0 to 281474976710655"),
        ("r11", "a fox", None, 2**48, None, "seed (column 'own') is 281474976710656"),
        ("r12", "a fox", None, None, 2**40, "priority (column 'p') is 1099511627776; allowed: -2147483647 to"),
        ("r13", "", 5000.0, None, None, "prompt (column 'text') is empty; height (column 'h') is 5000"),
    ]
    names = ("id", "text", "h", "own", "p")
    dataset(source, {name: [row[n] for row in rows] for n, name in enumerate(names)})
    columns = {"prompt": "text", "height": "h", "seed": "own", "priority": "p"}
    config = job(source, dataset={"columns": columns, "id_column": "id"})
    result = build(config, objects)
    assert [item.row_id for item in items_of(objects, result)] == ["ok"]
    refused = rejections(objects, result)
    assert [row["origin_row"] for row in refused] == list(range(1, len(rows)))
    for row, (row_id, prompt, *_, words) in zip(refused, rows[1:], strict=True):
        assert words in row["reason"], row
        assert (row["origin_file"], row["row_id"], row["prompt"]) == (str(source), row_id, prompt)
    assert result.plan.counts == {
        "rows": len(rows),
        "items": 1,
        "rejected": len(rows) - 1,
        "truncated_prompts": 0,
        "truncated_tokens": 0,
    }
    assert result.rejected == sum(result.reasons.values()) == len(rows) - 1


def test_a_row_is_rejected_once_a_variant_for_all_its_samples(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", ""]})
    config = job(source, dataset={"samples_per_row": 3}, sweep={"over": {"height": [32, 64]}})
    result = build(config, objects)
    assert len(items_of(objects, result)) == 6
    assert [row["variant"] for row in rejections(objects, result)] == ['{"height": 32}', '{"height": 64}']


@pytest.mark.parametrize("encoded", [False, True])
def test_a_prompt_that_is_not_utf8_is_rejected(encoded: bool, source: Path, objects: Objects) -> None:
    column = pa.array([b"ok", b"\xff"]).view(pa.string())
    dataset(source, {"prompt": column.dictionary_encode() if encoded else column})
    result = build(job(source), objects)
    assert [row["reason"] for row in rejections(objects, result)] == ["prompt (column 'prompt') is not valid UTF-8"]


@pytest.mark.parametrize(
    ("columns", "rooms", "words"),
    [
        ({"text": ["a"]}, {}, r"no column 'prompt' \(dataset.columns.prompt\)"),
        ({"prompt": [1]}, {}, r"column 'prompt' \(dataset.columns.prompt\) is int64; allowed: text"),
        ({"prompt": ["a"]}, {"dataset": {"id_column": "id"}}, r"no column 'id' \(dataset.id_column\)"),
        ({"prompt": ["a"], "id": [1.5]}, {"dataset": {"id_column": "id"}}, "is double; allowed: text, whole numbers"),
        (
            {"prompt": ["a"], "h": ["tall"]},
            {"dataset": {"columns": {"prompt": "prompt", "height": "h"}}},
            r"column 'h' \(dataset.columns.height\) is string; allowed: whole numbers",
        ),
        ({"prompt": pa.array([], pa.string())}, {}, "no rows; the dataset has 0"),
        ({"prompt": ["a"], "n": [1]}, {"dataset": {"where": "n = 2"}}, "no rows where n = 2; the dataset has 1"),
        ({"prompt": [None, ""]}, {}, r"no valid row among 2:\n  1 x prompt .* is null \(first: .*, row 0\)"),
        ({"prompt": pa.nulls(2)}, {}, "no valid row among 2:\n  2 x prompt"),
        ({"prompt": ["a", ""]}, {"dataset": {"max_rejected": 0}}, "1 rejected; dataset.max_rejected allows 0"),
    ],
)
def test_a_dataset_that_cannot_be_planned_stops_with_the_reason(
    source: Path, objects: Objects, columns: dict[str, Any], rooms: dict[str, Any], words: str
) -> None:
    dataset(source, columns)
    with pytest.raises(PlanError, match=words):
        build(job(source, **rooms), objects)
    assert read_plan(objects) == []


@pytest.mark.parametrize(
    ("rooms", "words"),
    [
        ({"dataset": {"where": "m = 1"}}, "dataset.where: unknown column m"),
        ({"dataset": {"where": "n ="}}, "dataset.where: .* at position 4"),
        (
            {"dataset": {"columns": {"prompt": "prompt", "image": "n"}}},
            "dataset.columns.image: 'n' is mapped, but task t2v",
        ),
        ({"sampling": {"height": 5000}}, "sampling: height is 5000"),
        ({"sweep": {"over": {"height": [64, 5000]}}}, r'sweep variant {"height": 5000}: height is 5000'),
        ({"sampling": {"height": 65}}, "sampling: size 65x64.*even"),
        ({"model": {"family": "nosuch"}}, "model.family: 'nosuch' is not a family"),
        ({"model": {"task": "s2v"}}, "model.task: 's2v' is not a task of testcard; allowed: t2v, i2v, v2v"),
        ({"output": {"codec": "av1"}}, "output.codec: 'av1' does not go into mp4"),
        ({"output": {"crf": 99}}, "output.crf: 99 is not allowed; libx264 takes"),
    ],
)
def test_a_configuration_that_no_row_can_mend_is_refused(
    source: Path, objects: Objects, rooms: dict[str, Any], words: str
) -> None:
    dataset(source, {"prompt": ["a"], "n": [1]})
    with pytest.raises(ConfigError, match=words):
        build(job(source, **rooms), objects)


def test_max_rejected_lets_as_many_pass(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", ""]})
    assert build(job(source, dataset={"max_rejected": 1}), objects).rejected == 1


# ---------------------------------------------------------------- a checkpoint and its tokenizer


def test_prompts_longer_than_the_encoder_takes_are_counted_or_rejected(
    source: Path, objects: Objects, wan: Path
) -> None:
    """The tokenizer has a token a letter and one at the end; the limit is 16."""
    dataset(source, {"prompt": ["a" * 15, "b" * 16, "c" * 20, "  spaces\n" + " " * 50 + "shrink"]})
    model = {"family": "auto", "checkpoint": str(wan)}
    truncated = build(job(source, model=model), None, dry_run=True)
    assert truncated.plan.counts["items"] == 4 and truncated.plan.family == "wan"
    assert (truncated.plan.counts["truncated_prompts"], truncated.plan.counts["truncated_tokens"]) == (2, 6)
    rejected = build(job(source, model=model, dataset={"on_long_prompt": "reject"}), objects)
    assert [row["reason"].split(" (dataset")[0] for row in rejections(objects, rejected)] == [
        "prompt (column 'prompt') has 17 tokens; allowed: at most 16",
        "prompt (column 'prompt') has 21 tokens; allowed: at most 16",
    ]


def test_a_negative_prompt_that_is_too_long_is_told_where_it_stands(source: Path, objects: Objects, wan: Path) -> None:
    dataset(source, {"prompt": ["a", "b"], "neg": ["x" * 30, None]})
    model = {"checkpoint": str(wan), "family": "wan"}
    rooms: dict[str, Any] = {"model": model, "sampling": {"negative_prompt": "y" * 20}}
    noted = build(job(source, **rooms), None, dry_run=True)
    assert any("sampling.negative_prompt: 5 tokens longer" in note for note in noted.notes)
    with pytest.raises(ConfigError, match=r"sampling.negative_prompt: 5 tokens longer"):
        build(job(source, **rooms, dataset={"on_long_prompt": "reject"}), objects)
    columns = {"columns": {"prompt": "prompt", "negative_prompt": "neg"}, "on_long_prompt": "reject"}
    result = build(job(source, model=model, dataset=columns), objects)
    (refused,) = rejections(objects, result)
    assert refused["reason"].startswith("negative_prompt (column 'neg') has 31 tokens; allowed: at most 16")


def test_a_wan_plan_has_the_checkpoints_recipe_tokens_and_cost(source: Path, objects: Objects, wan: Path) -> None:
    dataset(source, {"prompt": ["a"]})
    result = build(job(source, model={"family": "auto", "checkpoint": str(wan)}), objects)
    (item,) = items_of(objects, result)
    assert (item.request.height, item.request.num_frames, item.request.sampler) == (64, 17, "unipc")
    assert item.tokens == 5 * 8 * 8 and item.flops > 0
    assert result.plan.checkpoint_hash and result.plan.estimate["tflops"] == pytest.approx(item.flops / 1e12)


def test_a_missing_component_is_named(source: Path, objects: Objects, wan: Path) -> None:
    index = json.loads((wan / "model_index.json").read_text())
    del index["tokenizer"]
    (wan / "model_index.json").write_text(json.dumps(index))
    dataset(source, {"prompt": ["a"]})
    with pytest.raises(ConfigError, match="has no tokenizer"):
        build(job(source, model={"family": "auto", "checkpoint": str(wan)}), objects)


# ---------------------------------------------------------------- freezing


def test_a_plan_that_is_there_is_returned_and_a_changed_configuration_refused(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", ""]})
    first = build(job(source), objects)
    source.unlink()
    again = build(job(source, run={"max_attempts": 9}), objects)
    assert first.made and not again.made
    assert again.plan == first.plan and again.reasons == first.reasons
    with pytest.raises(ConfigError, match=r"sampling\.height: the plan has null, now 128"):
        build(job(source, sampling={"height": 128}), objects)


def test_a_family_whose_pixels_changed_is_refused_by_version(
    source: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(source, {"prompt": ["a"]})
    result = build(job(source), objects)
    monkeypatch.setattr("vidgen.models.testcard.spec.REVISION", 99)
    with pytest.raises(ConfigError, match=f"planned by vidgen {result.plan.vidgen_version} .* here it is 99"):
        check_resume(result.plans, job(source))


def test_a_dataset_that_changed_since_it_was_planned_is_reported(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})
    plans = build(job(source), objects).plans
    assert changed_dataset(plans, job(source)) is None
    dataset(source, {"prompt": ["a", "b"]})
    note = changed_dataset(plans, job(source))
    assert note is not None and "1 files with 2 rows, then 1 with 1" in note and "--extend" in note
    source.unlink()
    assert changed_dataset(plans, job(source)) is None


def test_reasons_are_told_most_frequent_first(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", "", None, None]})
    result = build(job(source), objects)
    again = build(job(source), objects)
    assert list(result.reasons.values()) == [2, 1] and again.reasons == result.reasons
    assert list(again.reasons) == list(result.reasons)


def test_a_dry_run_writes_nothing(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", ""]})
    result = build(job(source), objects, dry_run=True)
    assert (result.items, result.rejected, result.made) == (1, 1, False)
    assert list(objects.list("plan")) == []


def test_of_two_planners_at_once_one_freezes_and_both_go_on_with_it(source: Path, tmp_path: Path) -> None:
    dataset(source, {"prompt": [f"p{n}" for n in range(50)]})
    barrier = threading.Barrier(2)
    results = []

    def together() -> None:
        barrier.wait(30)

    def plan() -> None:
        objects = Objects(str(tmp_path / "output"))
        results.append(build(job(source), objects, before_freeze=together))

    threads = [threading.Thread(target=plan) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.made for result in results) == [False, True]
    assert results[0].plan == results[1].plan


def test_a_planner_with_other_values_that_loses_is_refused(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})

    def overtaken() -> None:
        build(job(source, sampling={"height": 32}), objects)

    with pytest.raises(ConfigError, match=r"sampling\.height"):
        build(job(source, sampling={"height": 64}), objects, before_freeze=overtaken)


def test_a_damaged_part_is_refused(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})
    (part,) = build(job(source), objects).plan.parts
    objects.put(part.name, objects.read(part.name)[:-1] + b"x")
    with pytest.raises(PlanError, match="sha256 differs"):
        part_table(objects, part)


# ---------------------------------------------------------------- extending


def test_an_extension_adds_what_no_earlier_plan_has(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", "", "b"], "n": [1, 2, 3]})
    first = build(job(source, dataset={"limit": 2}), objects)
    more = build(job(source, dataset={"samples_per_row": 2}), objects, extend=True)
    assert (first.items, more.items, more.plan.k, len(more.plans)) == (1, 4, 1, 2)
    assert more.plan.counts["rejected"] == 0 and more.rejected == 1
    items = items_of(objects, more)
    assert [item.ordinal for item in items] == [0, 1, 2, 3]
    assert [(item.request.prompt, item.sample) for item in items] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len({item.item_id for item in items}) == 4
    dataset(source, {"prompt": ["a", "", "b", "c", None], "n": [1, 2, 3, 4, 5]})
    grown = build(job(source, dataset={"samples_per_row": 2}), objects, extend=True)
    assert (grown.plan.k, grown.plan.counts["items"], grown.plan.counts["rejected"]) == (2, 2, 1)
    again = build(job(source, dataset={"samples_per_row": 2}), objects, extend=True)
    assert not again.made and again.plan == grown.plan and any("nothing new" in note for note in again.notes)
    assert [plan.k for plan in read_plan(objects)] == [0, 1, 2]


def test_an_extension_that_loses_the_race_records_only_what_is_still_new(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a", "b", "c"]})
    build(job(source, dataset={"limit": 1}), objects)
    overtook: list[bool] = []

    def overtaken() -> None:
        if not overtook:
            overtook.append(build(job(source, dataset={"limit": 2}), objects, extend=True).made)

    result = build(job(source), objects, extend=True, before_freeze=overtaken)
    assert overtook == [True] and result.plan.k == 2
    assert [item.request.prompt for item in items_of(objects, result)] == ["a", "b", "c"]


def test_an_extension_may_change_nothing_else_and_needs_a_plan(source: Path, objects: Objects) -> None:
    dataset(source, {"prompt": ["a"]})
    with pytest.raises(PlanError, match="no frozen plan"):
        build(job(source), objects, extend=True)
    build(job(source), objects)
    with pytest.raises(ConfigError, match=r"sampling.fps: the plan has null, now 9"):
        build(job(source, sampling={"fps": 9.0}), objects, extend=True)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_output_in_the_folder_of_prompts_is_refused_before_its_own_parquet_becomes_prompts(
    tmp_path: Path, scheme: str
) -> None:
    folder = tmp_path / "prompts"
    dataset(folder / "a.parquet", {"prompt": ["a"]})
    for output in (folder, folder / "runs" / "one"):
        objects = Objects(f"{scheme}{output}")
        with pytest.raises(ConfigError, match=r"output.path: .* lies in the folder dataset.path: .*\*\.parquet"):
            build(job(folder, output={"path": objects.url}), objects)
        assert not list(objects.list("plan"))
    beside = Objects(f"{scheme}{tmp_path}/prompts of mine")
    assert build(job(folder, output={"path": beside.url}), beside).items == 1
    within = Objects(str(folder / "runs"))
    files = job(folder / "*.parquet", output={"path": within.url})
    assert build(files, within).items == 1
    assert not build(files, within, extend=True).made
