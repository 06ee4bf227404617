"""Identity: ids, seeds and hashes depend on a row's own values and on nothing around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plan.conftest import planned
from vidgen import identity
from vidgen.types import Item, Media, Request

REQUEST = Request("t2v", "a fox", "", 7, 64, 64, 17, 8.0, 4, 1.0, "card")
SPEC = identity.PixelSpec("wan", 1, "c0ffee", "unipc", 3.0, None, None, None, (), None, ("mp4", "libx264", 18))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a wolf"},
        {"negative_prompt": "blur"},
        {"seed": 8},
        {"height": 128},
        {"width": 128},
        {"num_frames": 33},
        {"fps": 16.0},
        {"num_inference_steps": 5},
        {"guidance_scale": 2.0},
        {"params": (("strength", 0.5),)},
        {"image": Media("x.png", "digest")},
    ],
)
def test_every_value_of_a_request_is_in_its_hash(change: dict[str, Any]) -> None:
    assert identity.request_hash(replace(REQUEST, **change)) != identity.request_hash(REQUEST)


@pytest.mark.parametrize("change", [{"sampler": "euler"}, {"shift": 5.0}, {"tiling": (256, 256, 192, 192)}])
def test_what_the_spec_hash_covers_is_not_in_the_request_hash(change: dict[str, Any]) -> None:
    assert identity.request_hash(replace(REQUEST, **change)) == identity.request_hash(REQUEST)


@pytest.mark.parametrize(
    "change",
    [
        {"family": "ltx"},
        {"revision": 2},
        {"checkpoint_hash": "beef"},
        {"sampler": "euler"},
        {"shift": 5.0},
        {"sigmas": (1.0, 0.5)},
        {"timesteps": (900.0,)},
        {"dtype": "bfloat16"},
        {"loras": ("x",)},
        {"tiling": (256, 256, 192, 192)},
        {"codec": ("mp4", "libx264", 20)},
        {"inexact": (("quantization", "fp8"),)},
    ],
)
def test_whatever_else_changes_pixels_is_in_the_spec_hash(change: dict[str, Any]) -> None:
    assert identity.spec_hash(replace(SPEC, **change)) != identity.spec_hash(SPEC)


def test_where_a_prompt_ends_and_a_negative_prompt_begins_matters() -> None:
    first = replace(REQUEST, prompt="ab", negative_prompt="c")
    second = replace(REQUEST, prompt="b", negative_prompt="ca")
    assert identity.request_hash(first) != identity.request_hash(second)


def test_the_hashes_are_what_they_were() -> None:
    """Changing these plans other items for every finished run: it must not happen by accident."""
    row = identity.row_id({"prompt": "a fox", "height": None, "seed": 7}, 0)
    request, spec = identity.request_hash(REQUEST), identity.spec_hash(SPEC)
    assert [row, request, spec, identity.item_id(row, 1, request, spec)] == PINNED
    assert [identity.sample_seed(0, "r", None, k) for k in (0, 1)] == PINNED_SEEDS
    assert [identity.sample_seed(0, "r", 7, k) for k in (0, 1)] == [7, PINNED_ROW_SEED]


PINNED = [
    "646df7a14952d8602da4fbb91748b5ca",
    "10662d0b34dd007871180fd7dd0c6826",
    "70c269c7269cb6f2935fe6da8c7989fd",
    "bd42a3b77ed4f0c9f1e351df24ed7542",
]
PINNED_SEEDS = [37111490235599, 167873420867730]
PINNED_ROW_SEED = 128186941406802


@settings(deadline=None)
@given(st.integers(0, 2**48 - 1), st.text(max_size=8), st.none() | st.integers(0, 2**48 - 1), st.integers(0, 50))
def test_seeds_lie_below_2_to_the_48_and_sample_0_is_the_rows_own(
    run: int, row: str, own: int | None, sample: int
) -> None:
    seed = identity.sample_seed(run, row, own, sample)
    assert 0 <= seed < 2**48
    if own is not None:
        assert sample or seed == own
        assert identity.sample_seed(run + 1, row + "x", own, sample) == seed
    else:
        assert identity.sample_seed(run + 1, row, None, sample) != seed
        assert identity.sample_seed(run, row + "x", None, sample) != seed
        assert identity.sample_seed(run, row, None, sample + 1) != seed


# ---------------------------------------------------------------- of whole plans

prompt = st.text("abc ", min_size=1, max_size=3).filter(str.strip)
table = st.lists(st.tuples(prompt, st.none() | st.integers(0, 9)), min_size=1, max_size=12)
slow = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def columns(rows: list[tuple[str, int | None]], order: list[int]) -> dict[str, Any]:
    return {
        "id": [f"r{number}" for number in order],
        "prompt": [rows[number][0] for number in order],
        "own": [rows[number][1] for number in order],
        "n": order,
    }


def by_id(items: list[Item]) -> dict[tuple[str, int], tuple[str, int]]:
    return {(item.row_id, item.sample): (item.item_id, item.request.seed) for item in items}


@slow
@given(table, st.randoms(use_true_random=False), st.integers(1, 12), st.integers(0, 11))
def test_rows_with_ids_keep_their_items_whatever_is_selected_and_in_whatever_order(
    tmp_path: Path, rows: list, random: Any, limit: int, threshold: int
) -> None:
    room = {"id_column": "id", "samples_per_row": 2, "columns": {"prompt": "prompt", "seed": "own"}}
    order = list(range(len(rows)))
    whole = by_id(planned(tmp_path, columns(rows, order), "whole", dataset=room))
    assert len(whole) == 2 * len(rows)
    random.shuffle(order)
    shuffled = columns(rows, order)
    assert by_id(planned(tmp_path, shuffled, "shuffled", dataset=room)) == whole
    some = by_id(planned(tmp_path, shuffled, "limited", dataset={**room, "limit": limit}))
    assert some.items() <= whole.items() and len(some) == 2 * min(limit, len(rows))
    chosen = {**room, "where": f"n <= {max(threshold, min(order))}"}
    some = by_id(planned(tmp_path, shuffled, "selected", dataset=chosen))
    assert some.items() <= whole.items() and {row for row, _ in some} == {
        f"r{n}" for n in order if n <= threshold or n == 0
    }


@slow
@given(table, st.randoms(use_true_random=False), st.integers(1, 12))
def test_rows_without_ids_are_told_apart_by_content_and_number(
    tmp_path: Path, rows: list, random: Any, limit: int
) -> None:
    """Equal rows are interchangeable, so a shuffled dataset has the same set of items; `limit` takes a part of it."""
    room = {"columns": {"prompt": "prompt", "seed": "own"}}
    order = list(range(len(rows)))
    whole = [item.item_id for item in planned(tmp_path, columns(rows, order), "whole", dataset=room)]
    assert len(set(whole)) == len(rows)
    limited = planned(tmp_path, columns(rows, order), "limited", dataset={**room, "limit": limit})
    assert [item.item_id for item in limited] == whole[:limit]
    random.shuffle(order)
    shuffled = planned(tmp_path, columns(rows, order), "shuffled", dataset=room)
    assert {item.item_id for item in shuffled} == set(whole)
    selected = planned(tmp_path, columns(rows, order), "selected", dataset={**room, "where": "n = 0"})
    assert len(selected) == 1 and selected[0].item_id in whole


def test_an_occurrence_is_counted_before_where(tmp_path: Path) -> None:
    table = {"prompt": ["same", "same"], "n": [1, 2]}
    first, second = planned(tmp_path, table, "both")
    (only,) = planned(tmp_path, table, "one", dataset={"where": "n = 2"})
    assert only.item_id == second.item_id != first.item_id


def test_an_empty_column_and_no_column_are_the_same_row(tmp_path: Path) -> None:
    (plain,) = planned(tmp_path, {"prompt": ["x"]}, "plain")
    mapped = {"columns": {"prompt": "prompt", "height": "h"}}
    (empty,) = planned(tmp_path, {"prompt": ["x"], "h": [None]}, "empty", dataset=mapped)
    assert empty.item_id == plain.item_id


def test_a_corrected_prompt_under_the_same_id_is_another_item(tmp_path: Path) -> None:
    room = {"id_column": "id"}
    (before,) = planned(tmp_path, {"id": ["a"], "prompt": ["a fxo"]}, "before", dataset=room)
    (after,) = planned(tmp_path, {"id": ["a"], "prompt": ["a fox"]}, "after", dataset=room)
    assert before.row_id == after.row_id and before.item_id != after.item_id


def test_an_items_hashes_are_those_of_its_request(tmp_path: Path) -> None:
    rooms: dict[str, Any] = {
        "dataset": {"columns": {"prompt": "prompt", "fps": "f"}, "samples_per_row": 2},
        "sampling": {"params": {"step_seconds": 1}},
        "sweep": {"over": {"height": [64, 128]}},
    }
    items = planned(tmp_path, {"prompt": ["x", "y"], "f": [8, None]}, **rooms)
    assert len(items) == 8
    for item in items:
        assert item.request_hash == identity.request_hash(item.request)
        assert item.item_id == identity.item_id(item.row_id, item.sample, item.request_hash, item.spec_hash)
    seeds = {(item.row_id, item.sample): item.request.seed for item in items}
    assert all(item.request.seed == seeds[item.row_id, item.sample] for item in items), "variants share their seed"
