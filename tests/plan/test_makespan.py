"""When the last item is made, against a list scheduler that goes item by item."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.plan.makespan import lower_bound, makespan

SHAPES = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 60)), min_size=1, max_size=6)


def one_by_one(shapes: list[tuple[int, int]], replicas: int) -> float:
    ends = [0.0] * replicas
    for seconds in sorted((s for s, items in shapes for _ in range(items)), reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


@settings(deadline=None, max_examples=300)
@given(SHAPES, st.integers(1, 40))
def test_counting_by_shape_gives_what_going_item_by_item_gives(shapes: list[tuple[int, int]], replicas: int) -> None:
    assert makespan(shapes, replicas) == pytest.approx(one_by_one(shapes, replicas), rel=1e-9)


@settings(deadline=None)
@given(SHAPES, st.integers(1, 40))
def test_no_end_beats_the_lower_bound_or_is_an_item_later(shapes: list[tuple[int, int]], replicas: int) -> None:
    end, least = makespan(shapes, replicas), lower_bound(shapes, replicas)
    assert least - 1e-6 <= end <= least + max(s for s, items in [*shapes, (0, 1)] if items) + 1e-6


def test_a_hundred_million_items_cost_what_a_hundred_do() -> None:
    shapes = [(3600.0, 1_000_000), (446.0, 20_000_000), (0.01, 80_000_000)]
    assert makespan(shapes, 64) == pytest.approx(lower_bound(shapes, 64), rel=1e-6)


def test_nothing_to_make_takes_no_time() -> None:
    assert makespan([], 8) == 0.0 and makespan([(10.0, 0)], 8) == 0.0 and lower_bound([], 8) == 0.0
