"""The order in which the plan is taken: by priority, and as a sample where a run may be stopped early."""

from __future__ import annotations

import math
import random
import uuid
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet.inline import config_for, write_prompts
from vidgen.config import from_dict, to_dict
from vidgen.fleet import supply
from vidgen.fleet.rules import Rules
from vidgen.fleet.run import order_of
from vidgen.fleet.supply import Supply, places
from vidgen.plan import files
from vidgen.plan.build import build
from vidgen.store.objects import Objects
from vidgen.store.state import DONE, State
from vidgen.types import Item

PART = 100
SHAPES = (5, 9, 13)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_ITEMS", PART)


def supplied(tmp_path: Any, order: str, rows: int = 600, rules: Rules | None = None, **columns: list[Any]) -> Supply:
    """The supply of a plan whose rows have these columns: frames and priority are mapped."""
    config = config_for(write_prompts(tmp_path / "p.parquet", rows, **columns), f"memory://{uuid.uuid4().hex}")
    mapped = {"frames": "num_frames", "priority": "priority"}
    config.dataset.columns |= {mapped[name]: name for name in columns}
    objects = Objects(config.output.path)
    plan = build(config, objects).plan
    assert plan is not None and len(plan.parts) == -(-rows // PART)
    return Supply(objects, [plan], State(rows), rules or Rules(order=order))


def taken(source: Supply, band: int = 0) -> list[Item]:
    return [item for item, _ in source.read(band)]


def arranged(how: str) -> list[int]:
    """Frames of 600 rows: 60 %, 39 % and 1 % of each shape."""
    rows = [5] * 360 + [9] * 234 + [13] * 6
    if how == "turned":
        return [rows[index * 7 % 600] for index in range(600)]
    if how == "shuffled":
        random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize("how", ["sorted", "turned", "shuffled"])
@pytest.mark.parametrize("round_items", [2048, 37])
def test_after_any_number_of_items_each_shape_has_its_share(
    how: str, round_items: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "ROUND_ITEMS", round_items)
    frames = arranged(how)
    items = taken(supplied(tmp_path, "stratified", frames=frames))
    assert sorted(item.ordinal for item in items) == list(range(600))
    share, seen = {shape: frames.count(shape) / 600 for shape in SHAPES}, Counter[int]()
    for k, item in enumerate(items, 1):
        seen[item.request.num_frames] += 1
        for shape in SHAPES:
            bound = 6 * (1 + len(SHAPES) * share[shape])  # P (1 + S p), as the module says
            assert abs(seen[shape] - k * share[shape]) <= bound
    # What the bound lets through at worst, this plan does not come near.
    tenth = Counter(item.request.num_frames for item in items[:60])
    assert all(abs(tenth[shape] - 60 * share[shape]) <= 4 for shape in SHAPES)


@pytest.mark.parametrize("how", ["sorted", "turned", "shuffled"])
def test_after_any_number_of_items_each_stretch_of_the_input_has_its_share(how: str, tmp_path: Any) -> None:
    items = taken(supplied(tmp_path, "stratified", frames=arranged(how)))
    for k in (60, 150, 300, 450):
        sixths = Counter(item.ordinal // 100 for item in items[:k])
        assert all(abs(sixths[number] - k / 6) <= 6 for number in range(6))


def test_the_order_is_the_same_every_time_and_a_resume_goes_on_in_it(tmp_path: Any) -> None:
    first = supplied(tmp_path, "stratified", frames=arranged("shuffled"))
    ordinals = [item.ordinal for item in taken(first)]
    assert [item.ordinal for item in taken(first)] == ordinals
    state = State(600)
    state.status[ordinals[:250]] = DONE
    again = Supply(first.objects, first.plans, state, first.rules)
    assert [item.ordinal for item in taken(again)] == ordinals[250:]


def test_a_plan_of_more_parts_than_are_read_at_once_is_sampled_all_over(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "PARTS_AT_ONCE", 4)
    monkeypatch.setattr(supply, "ROUND_ITEMS", 20)
    source = supplied(tmp_path, "stratified", rows=1200, frames=[5] * 700 + [9] * 500)
    read: list[str] = []
    reading = source.objects.read
    monkeypatch.setattr(source.objects, "read", lambda path: read.append(path) or reading(path))
    stream = source.read(0)
    some = [next(stream)[0] for _ in range(60)]
    assert len(read) <= 3 * 2 * 4, "each of three cohorts once for its places and once for a round"
    assert {item.ordinal // 100 for item in some} == set(range(12))
    assert abs(sum(item.request.num_frames == 5 for item in some) - 35) <= 5
    assert sorted(item.ordinal for item in [*some, *(item for item, _ in stream)]) == list(range(1200))


@pytest.mark.parametrize("order", supply.ORDERS)
def test_priority_goes_first_over_the_whole_plan(order: str, tmp_path: Any) -> None:
    priority = [0] * 599 + [7]
    priority[300] = -3
    ordinals = [item.ordinal for item in taken(supplied(tmp_path, order, priority=priority))]
    assert (ordinals[0], ordinals[-1]) == (599, 300) and sorted(ordinals) == list(range(600))


def test_many_priorities_go_by_level(tmp_path: Any) -> None:
    priority = [index * 7 % 600 for index in range(600)]
    found = [item.priority for item in taken(supplied(tmp_path, "input", priority=priority))]
    width = -(-600 // supply.PRIORITY_LEVELS)
    levels = [(599 - value) // width for value in found]
    assert levels == sorted(levels) and len(set(levels)) == supply.PRIORITY_LEVELS


@pytest.mark.parametrize("order", supply.ORDERS)
def test_each_band_gets_its_items_and_no_other(order: str, tmp_path: Any) -> None:
    frames = arranged("shuffled")
    whole = supplied(tmp_path, order, frames=frames)
    tokens = {item.request.num_frames: item.tokens for item in taken(whole)}
    rules = Rules(order=order, bands=(tokens[5], tokens[9]))
    source = Supply(whole.objects, whole.plans, whole.state, rules)
    assert [{i.request.num_frames for i in taken(source, band)} for band in range(3)] == [{5}, {9}, {13}]
    assert sum(len(taken(source, band)) for band in range(3)) == 600


def test_items_that_may_share_a_batch_share_a_place_where_there_are_batches(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = supplied(tmp_path, "stratified", frames=arranged("turned"))
    most = max(item.tokens for item in taken(alone))

    def sizes(batch_tokens: int) -> Counter[int]:
        """How many places there are of each size."""
        rules = Rules(order="stratified", batch_items=32, batch_tokens=batch_tokens)
        together = Supply(alone.objects, alone.plans, alone.state, rules)
        found = [place for _, place in together.read(0)]
        assert found == sorted(found)
        return Counter(Counter(found).values())

    assert sizes(0) == {1: 600}
    assert max(sizes(3 * most)) >= 3 and min(sizes(3 * most)) <= 3, "as many as fit into a batch"
    assert sizes(10**9) == {600 // supply.PLACES: 66, 6: 1}, "but there are many places, however small the plan"
    monkeypatch.setattr(supply, "PLACES", 1)
    assert sizes(10**9) == {32: 18, 24: 1}
    assert {place for _, place in supplied(tmp_path, "longest").read(0)} == {0}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=400), st.integers(0, 5000), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_places_are_even_in_every_stratum_and_its_first_items_lie_all_over_it(
    strata: list[int], number: int, until: float
) -> None:
    kinds = np.array(strata)
    found = places(kinds, number)
    assert ((found >= 0) & (found < 1)).all()
    for kind in set(strata):
        at = found[kinds == kind]
        first = at < until
        assert abs(first.sum() - until * len(at)) <= 1
        halves = first[: len(at) // 2].sum(), first[len(at) // 2 :].sum()
        assert abs(int(halves[0]) - int(halves[1])) <= 3 + math.log2(len(at)), "golden ratio: logarithmic discrepancy"


@pytest.mark.parametrize(
    ("written", "order"),
    [
        ({}, "longest"),
        ({"max_gpu_hours": 2}, "stratified"),
        ({"deadline": "06:00"}, "stratified"),
        ({"max_gpu_hours": 2, "order": "longest"}, "longest"),
        ({"order": "input"}, "input"),
    ],
)
def test_auto_takes_a_sample_where_a_run_may_be_stopped_early(written: dict[str, Any], order: str) -> None:
    config = to_dict(config_for("p.parquet", "memory://x"))
    assert order_of(from_dict({**config, "run": {**config["run"], **written}})) == order


@pytest.mark.parametrize("order", ["longest", "stratified"])
def test_a_driver_can_show_life_at_every_part_that_is_read(tmp_path: Any, order: str) -> None:
    """A plan of a hundred million items has thousands of parts, and a lease a minute."""
    source, lives = supplied(tmp_path, order, priority=[1, 2] * 300), Counter[str]()
    source.alive = lambda: lives.update(["life"])
    next(source.read(0))
    assert lives["life"] >= len(source.plans[0].parts)
