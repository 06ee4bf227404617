"""How a configuration's `parallel` becomes a mesh."""

from __future__ import annotations

from typing import Any

import pytest

from vidgen import family
from vidgen.errors import ConfigError
from vidgen.parallel.layout import Layout, layout, shares


@pytest.mark.parametrize(
    ("given", "heads", "node", "expected"),
    [
        ({}, 12, None, Layout()),
        ({"context": 1}, 1, None, Layout()),
        ({"context": 4}, 12, None, Layout(ulysses=4)),
        ({"context": 8}, 12, None, Layout(ring=2, ulysses=4)),
        ({"context": 8}, 40, 8, Layout(ulysses=8)),
        ({"context": 16}, 40, 8, Layout(ring=2, ulysses=8)),
        ({"context": 16}, 24, 4, Layout(ring=4, ulysses=4)),
        ({"context": 2}, 1, None, Layout(ring=2)),
        ({"context": 3}, 40, None, Layout(ring=3)),
        ({"context": 4, "ulysses": 2}, 12, None, Layout(ring=2, ulysses=2)),
        ({"context": 4, "ring": 4}, 12, None, Layout(ring=4)),
        ({"ulysses": 3}, 5, None, Layout(ulysses=3)),
        ({"ring": 2, "ulysses": 2}, 5, None, Layout(ring=2, ulysses=2)),
        ({"cfg": 2}, 12, None, Layout(cfg=2)),
        ({"context": 2, "cfg": 2, "replicas": "auto"}, 12, None, Layout(cfg=2, ulysses=2)),
        ({"context": 8, "cfg": 2}, 24, 8, Layout(cfg=2, ulysses=8)),
    ],
)
def test_what_is_left_open_is_chosen(given: dict[str, Any], heads: int, node: int | None, expected: Layout) -> None:
    found = layout(given, heads, node)
    assert found == expected
    assert found.size == found.cfg * found.ring * found.ulysses


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": 4, "ulysses": 3}, r"parallel\.context: 4.*ulysses \(3\)"),
        ({"context": 4, "ulysses": 4, "ring": 2}, r"parallel\.context: 4.*\(4\).*\(2\)"),
        ({"context": 8, "ulysses": 2, "ring": 2}, r"parallel\.context: 8"),
        ({"ulysses": 16}, r"parallel\.ulysses: 16.*12 attention heads"),
        ({"cfg": 3}, r"parallel\.cfg: 3.*1, or 2"),
        ({"context": 0}, r"parallel\.context: 0"),
        ({"ring": -1}, r"parallel\.ring: -1"),
        ({"ulysses": "many"}, r"parallel\.ulysses: 'many'"),
        ({"context": True}, r"parallel\.context: True"),
    ],
)
def test_what_does_not_fit_is_refused_by_key_and_value(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout(given, 12)


def test_a_mesh_says_what_it_is() -> None:
    assert str(Layout()) == "1 GPU"
    assert str(Layout(ulysses=4)) == "4 GPUs: tokens over 4 (ulysses)"
    assert str(Layout(cfg=2, ring=2, ulysses=4)) == (
        "16 GPUs: tokens over 8 (ring 2 x ulysses 4), a branch of the guidance each half"
    )


def test_ranks_of_a_ulysses_group_are_neighbours() -> None:
    mesh = Layout(cfg=2, ring=2, ulysses=2)
    assert [mesh.place(rank) for rank in range(8)] == [(c, r, u) for c in (0, 1) for r in (0, 1) for u in (0, 1)]


@pytest.mark.parametrize(("count", "ranks", "expected"), [(13, 4, [4, 3, 3, 3]), (2, 4, [1, 1, 0, 0]), (8, 2, [4, 4])])
def test_shares_differ_by_one_at_most_and_lose_nothing(count: int, ranks: int, expected: list[int]) -> None:
    assert shares(count, ranks) == expected


def test_every_family_knows_its_heads() -> None:
    for name in family.families():
        assert callable(family.spec(name).heads)
