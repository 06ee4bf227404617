"""Which replicas a configuration and a cluster amount to, and which items go to which of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet.simulation import Behaviour, Simulation
from vidgen import config as configuration
from vidgen.config import to_dict
from vidgen.errors import ConfigError
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.fleet.formation import Band, Formation, Kind, Node, bands_of, on_cpus, on_gpus
from vidgen.parallel.layout import Layout, is_single
from vidgen.types import Item

SMALLEST = {"dataset": {"path": "p.parquet"}, "output": {"path": "out"}}
ONE, TWO, FOUR, EIGHT = (Layout(ulysses=size) for size in (1, 2, 4, 8))


def parallel(*overrides: str) -> dict[str, Any]:
    config = configuration.from_dict(SMALLEST, "test", [f"parallel.{override}" for override in overrides])
    return dict(to_dict(config)["parallel"])


def estimate(*shapes: tuple[int, int, float], label: str = "") -> dict[str, Any]:
    """(tokens, items, TFLOP an item) of each shape."""
    return {
        "shapes": [
            {"shape": label or f"{tokens} tokens", "tokens": tokens, "items": items, "tflops_per_item": tflops}
            for tokens, items, tflops in shapes
        ]
    }


def sizes(formation: Formation) -> list[tuple[int, int, bool]]:
    """(replicas, members of each, on one node) of each band."""
    return [(len(kind.names), kind.layout.size, kind.strict) for kind in formation.kinds]


def base(layout: Layout, replicas: int | None = None) -> list[Band]:
    return [Band("parallel", -1, layout, replicas)]


# ---------------------------------------------------------------- the cluster


@pytest.mark.parametrize(
    ("layout", "gpus", "replicas", "pending", "expected"),
    [
        (ONE, [8, 8], None, 100, (16, 1, True)),
        (ONE, [8, 8], None, 3, (3, 1, True)),  # no more than there is to do
        (ONE, [8], 5, 100, (5, 1, True)),
        (TWO, [8, 8], None, 100, (8, 2, True)),  # many gangs a node
        (EIGHT, [8, 8], None, 100, (2, 8, True)),
        (Layout(cfg=2, ulysses=2), [8], None, 100, (2, 4, True)),
        (Layout(ring=3, ulysses=2), [8, 8], None, 100, (2, 6, True)),  # what is left over of a node is no gang
        (EIGHT, [4, 4], None, 100, (1, 8, False)),  # spread where no node has room
        (EIGHT, [4, 4, 4], None, 100, (1, 8, False)),
    ],
)
def test_gangs_come_from_the_gpus_of_each_node(
    layout: Layout, gpus: list[int], replicas: int | None, pending: int, expected: tuple[int, int, bool]
) -> None:
    formation = on_gpus(base(layout, replicas), [Node(16, count) for count in gpus], pending)
    assert sizes(formation) == [expected]
    assert (formation.cpus, formation.gpus) == (1, 1)
    assert formation.degrees() == dict.fromkeys(formation.names, layout.size)


def test_a_gang_that_is_spread_and_gpus_that_stay_idle_are_told() -> None:
    spread = on_gpus(base(EIGHT), [Node(8, 4), Node(8, 4)], 100)
    assert "a gang of 8 fits no node (the largest has room for 4)" in spread.notes[0]
    idle = on_gpus(base(Layout(ring=3)), [Node(8, 8)], 100)
    assert idle.notes == (
        "2 of the cluster's GPUs stay idle: no replica of this configuration fits them, or needs them",
    )
    assert not on_gpus(base(ONE), [Node(8, 8)], 2).notes


@pytest.mark.parametrize(
    ("bands", "gpus", "words"),
    [
        (base(ONE, 3), [2], ("parallel.replicas: 3", "2 GPUs", "one replica a GPU")),
        (base(FOUR, 3), [8], ("parallel: 3 gangs of 4 GPUs", "hold 2")),
        (base(EIGHT), [4], ("parallel: 1 gang of 8 GPUs", "hold 0")),
        (
            [Band("parallel", -1, ONE), Band("parallel.by_shape[0]", 100, FOUR)],
            [4],
            ("parallel.by_shape[0]: 1 gang of 4 GPUs", "beside 1 of 1"),
        ),
    ],
)
def test_more_than_the_cluster_has_is_a_mistake_with_its_numbers(
    bands: list[Band], gpus: list[int], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        on_gpus(bands, [Node(8, count) for count in gpus], 100)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_mixed_fleet_divides_the_gpus_as_the_work_is_divided() -> None:
    bands = [Band("parallel", -1, ONE, flops=1.0, items=90), Band("s", 100, FOUR, flops=1.0, items=10)]
    formation = on_gpus(bands, [Node(8, 8), Node(8, 8)], 100)
    assert sizes(formation) == [(8, 1, True), (2, 4, True)]
    assert formation.names[:2] == ["g0", "g1"] and formation.names[2] == "r0", "gangs choose their places first"
    assert formation.band_of == {"g0": 1, "g1": 1} | {f"r{i}": 0 for i in range(8)}
    assert str(formation) == "8 replicas, 2 gangs of 4 (ulysses 4)"


def test_a_band_with_little_work_has_one_replica_and_one_without_items_none() -> None:
    little = [Band("parallel", -1, ONE, flops=1000.0, items=90), Band("s", 100, FOUR, flops=1.0, items=1)]
    assert sizes(on_gpus(little, [Node(8, 8)], 100)) == [(4, 1, True), (1, 4, True)]
    none = [Band("parallel", -1, ONE, flops=1.0, items=5), Band("s", 100, FOUR, items=0)]
    assert sizes(on_gpus(none, [Node(8, 8)], 100)) == [(5, 1, True), (0, 4, True)]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.lists(st.sampled_from([ONE, TWO, FOUR, EIGHT, Layout(ring=3)]), min_size=1, max_size=3),
    st.lists(st.floats(0, 100), min_size=3, max_size=3),
    st.integers(1, 50),
)
def test_no_formation_takes_more_than_there_is_or_leaves_a_band_without_replica(
    gpus: list[int], layouts: list[Layout], work: list[float], pending: int
) -> None:
    bands = [Band(f"b{i}", i, layout, flops=work[i]) for i, layout in enumerate(layouts)]
    nodes = [Node(8, count) for count in gpus]
    try:
        formation = on_gpus(bands, nodes, pending)
    except ConfigError:
        return
    assert sum(formation.degrees().values()) <= sum(gpus)
    assert all(kind.names for kind in formation.kinds)
    assert all(not kind.strict or kind.layout.size <= max(gpus) for kind in formation.kinds)
    assert len(formation.names) == len(set(formation.names))


@pytest.mark.parametrize(
    ("layout", "cpus", "replicas", "threads", "expected"),
    [
        (ONE, [2], None, None, (2, 1.0, 1)),
        (TWO, [2], 1, None, (1, 1.0, 1)),  # the cores are divided among the members
        (TWO, [8], 1, None, (1, 4.0, 4)),
        (TWO, [8], None, None, (4, 1.0, 1)),
        (TWO, [8], None, 2, (2, 2.0, 2)),
        (FOUR, [2], 1, None, (1, 0.5, 1)),  # insisted on: Ray must be able to place it
        (TWO, [2], 2, None, (2, 0.5, 1)),
        (FOUR, [2, 2], None, None, (1, 1.0, 1)),
    ],
)
def test_gangs_on_a_cpu_divide_its_cores(
    layout: Layout, cpus: list[int], replicas: int | None, threads: int | None, expected: tuple[int, float, int]
) -> None:
    formation = on_cpus(base(layout, replicas), [Node(count, 0) for count in cpus], 100, 99, threads)
    assert (len(formation.names), formation.cpus, formation.threads) == expected
    assert formation.kinds[0].strict == (layout.size * formation.cpus <= max(cpus))
    assert formation.gpus == 0


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 16), min_size=1, max_size=3).filter(any),
    st.lists(st.sampled_from([ONE, TWO, FOUR, Layout(ring=3)]), min_size=1, max_size=3),
    st.lists(st.none() | st.integers(1, 4), min_size=3, max_size=3),
    st.integers(1, 50),
    st.integers(0, 20),
    st.none() | st.integers(1, 4),
)
def test_what_is_reserved_on_cpus_has_a_place_on_the_nodes(
    cpus: list[int], layouts: list[Layout], wanted: list[int | None], pending: int, fit: int, threads: int | None
) -> None:
    bands = [Band(f"b{i}", i, layout, wanted[i]) for i, layout in enumerate(layouts)]
    formation = on_cpus(bands, [Node(count, 0) for count in cpus], pending, fit, threads)
    members = sum(formation.degrees().values())
    assert all(kind.names for kind in formation.kinds)
    assert formation.cpus > 0
    assert sum(int(count / formation.cpus + 1e-6) for count in cpus) >= members


# ---------------------------------------------------------------- the configuration


def test_bands_are_the_configuration_itself_and_each_entry_of_by_shape() -> None:
    wanted = parallel(
        "context=2", "replicas=3", "by_shape=[{tokens_above: 100, context: 4}, {tokens_above: 200, cfg: 2}]"
    )
    plans = [estimate((50, 10, 1.0), (100, 1, 1.0), (101, 2, 5.0)), estimate((300, 4, 1.0))]
    bands = bands_of(wanted, 12, plans, None)
    assert [band.layout.size for band in bands] == [2, 4, 2]
    assert [band.items for band in bands] == [11, 2, 4]
    assert [band.flops for band in bands] == [11e12, 10e12, 4e12]
    assert [band.replicas for band in bands] == [3, None, None]
    assert [band.key for band in bands] == ["parallel", "parallel.by_shape[0]", "parallel.by_shape[1]"]


def test_where_the_plan_counts_shapes_together_every_band_may_have_items() -> None:
    wanted = parallel("by_shape=[{tokens_above: 100, context: 4}]")
    bands = bands_of(wanted, 12, [estimate((50, 10, 1.0), label="other shapes")], None)
    assert [band.items for band in bands] == [None, None]


def test_a_mesh_that_the_model_cannot_have_names_the_entry() -> None:
    wanted = parallel("by_shape=[{tokens_above: 100, ulysses: 13}]")
    with pytest.raises(ConfigError, match=r"parallel\.by_shape\[0\]\.ulysses: 13; this model has 12 attention heads"):
        bands_of(wanted, 12, [], None)


def test_single_replicas_ask_no_model_for_its_heads() -> None:
    assert is_single(parallel("context=1", "replicas=4"))
    for mesh in ("context=2", "ring=2", "ulysses=2", "cfg=2", "degree=2", "by_shape=[{tokens_above: 1, context: 2}]"):
        assert not is_single(parallel(mesh))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("context=0", ("parallel.context: 0", "whole number from 1")),
        ("cfg=3", ("parallel.cfg: 3", "1, or 2")),
        ("by_shape=[3]", ("parallel.by_shape[0]: 3", "tokens_above, context, ulysses, ring, cfg, replicas")),
        ("by_shape=[{context: 2}]", ("parallel.by_shape[0].tokens_above: null", "0 or more")),
        ("by_shape=[{tokens_above: 1, contxt: 2}]", ("parallel.by_shape[0].contxt", "its keys: tokens_above")),
        ("by_shape=[{tokens_above: 1}]", ("parallel.by_shape[0]", "one at least of context, ulysses, ring, cfg")),
        ("by_shape=[{tokens_above: 1, context: 4, ulysses: 3}]", ("parallel.by_shape[0].context: 4", "agree")),
        ("by_shape=[{tokens_above: 1, context: 2, replicas: 0}]", ("parallel.by_shape[0].replicas: 0", "from 1")),
        (
            "by_shape=[{tokens_above: 5, context: 2}, {tokens_above: 5, context: 4}]",
            ("parallel.by_shape[1].tokens_above: 5", "more than 5"),
        ),
        ("degree=auto", ("parallel.degree: auto needs parallel.gpu", "H100")),
        ("degree=[2]", ("parallel.degree", "[2]")),
    ],
)
def test_a_wrong_mesh_is_named_with_what_is_allowed(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel(override)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "override" in str(caught.value)


def test_the_diffusers_family_has_no_gangs() -> None:
    for override in ("parallel.context=2", "parallel.by_shape=[{tokens_above: 1, context: 2}]"):
        with pytest.raises(ConfigError, match=r"model\.family: diffusers"):
            configuration.from_dict(SMALLEST, "test", ["model.family=diffusers", override])


# ---------------------------------------------------------------- dispatch


class Mixed(Simulation):
    """Items of odd ordinals are long; replicas from the second on are gangs. Asserts that each gets its own."""

    def __init__(self, total: int, behaviour: Behaviour, rules: Rules, replicas: int = 3, seed: int = 0) -> None:
        gangs = {f"r{i}": 1 for i in range(1, replicas)}
        rules = Rules(rules.max_attempts, rules.breaker_failures, rules.window, bands=(100,), band_of=gangs)
        super().__init__(total, behaviour, rules, replicas, seed)
        tasks = [ev.Task(long(task.item) if task.item.ordinal % 2 else task.item) for task in self.todo]
        self.of_band = [[task for task in tasks if rules.band(task.item.tokens) == band] for band in (0, 1)]
        self.made_by: Counter[tuple[str, int]] = Counter()

    def do(self, action: ev.Action) -> None:
        match action:
            case ev.Refill():
                todo = self.of_band[action.band]
                given, self.of_band[action.band] = todo[: action.items], todo[action.items :]
                self.queue.append(ev.Offered(tuple(given), not self.of_band[action.band], action.band))
            case _:
                if isinstance(action, ev.Send):
                    bands = {self.rules.band(work.item.tokens) for work in action.works}
                    assert bands == {self.rules.band_of.get(action.replica, 0)}, "an item of another size"
                super().do(action)


def long(item: Item) -> Item:
    fields = {name: getattr(item, name) for name in Item.__slots__}
    return Item(**{**fields, "tokens": 1000})


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(2, 5),
    st.integers(0, 1000),
    st.sampled_from([2, 8, 4096]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sets(st.integers(0, 59), max_size=5),
)
def test_every_history_of_a_mixed_fleet_ends_with_every_item_made_by_replicas_of_its_size(
    total: int, replicas: int, seed: int, window: int, crash: float, bad: set[int]
) -> None:
    behaviour = Behaviour(bad=bad, crash=crash, node_loss=crash / 3, lost_commit=0.5)
    simulation = Mixed(total, behaviour, Rules(window=window), replicas, seed)
    finish = simulation.run()
    if finish.code == 4:
        assert max(simulation.dispatcher.judge.streak.values()) >= 50
        return
    assert finish.code is None and len(simulation.committed) == total


def test_long_items_far_down_the_plan_reach_the_gangs_at_once() -> None:
    """The window is of each size: a thousand short items before the first long one do not keep a gang waiting."""
    rules = Rules(window=8, bands=(100,), band_of={"r1": 1})
    dispatcher = Dispatcher(rules, ["r0", "r1"])
    asked = [a for a in dispatcher.handle(ev.Tick(), 0.0) if isinstance(a, ev.Refill)]
    assert asked == [ev.Refill(8, 0), ev.Refill(8, 1)]


def test_an_item_that_no_replica_is_for_ends_the_run_instead_of_waiting_for_ever() -> None:
    dispatcher = Dispatcher(Rules(bands=(100,)), ["r0"])
    simulation = Simulation(1, Behaviour(), Rules())
    dispatcher.handle(ev.Offered((ev.Task(long(simulation.todo[0].item)),), True, 1), 0.0)
    assert dispatcher.finished is not None and dispatcher.finished.code == 2
    assert "1,000 tokens" in dispatcher.finished.reason


def test_gangs_that_never_start_stop_the_run_even_beside_replicas_that_do() -> None:
    dispatcher = Dispatcher(Rules(bands=(100,), band_of={"g0": 1}), ["r0", "g0"])
    dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.0)
    for _ in range(3):
        assert dispatcher.finished is None
        dispatcher.handle(ev.ReplicaLost("g0", "start", "NCCL is missing"), 0.0)
        dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.0)
    assert dispatcher.finished is not None and "NCCL is missing" in dispatcher.finished.reason


def test_a_gang_out_of_step_blames_nobody_and_a_fleet_of_such_gangs_trips_the_breaker() -> None:
    dispatcher = Dispatcher(Rules(), ["g0"])
    simulation = Simulation(1, Behaviour(), Rules())
    dispatcher.handle(ev.Offered((simulation.todo[0],), True), 0.0)
    for _ in range(49):
        dispatcher.handle(ev.ReplicaReady("g0", "n0"), 0.0)
        actions = dispatcher.handle(ev.ReplicaLost("g0", "gang", "connection closed"), 0.0)
        assert any(isinstance(action, ev.Look) for action in actions)
        actions = dispatcher.handle(ev.Looked(simulation.todo[0].item_id, None), 0.0)
        assert not any(isinstance(action, ev.Evidence) for action in actions)
        assert dispatcher.finished is None
    dispatcher.handle(ev.ReplicaReady("g0", "n0"), 0.0)
    dispatcher.handle(ev.ReplicaLost("g0", "gang", "connection closed"), 0.0)
    assert dispatcher.finished is not None and dispatcher.finished.code == 4


def test_a_formation_knows_the_mesh_of_each_name() -> None:
    formation = Formation((Kind(ONE, ("r0",)), Kind(FOUR, ("g0", "g1"))), 1, 1, bands=(100,))
    assert formation.kind("g1").layout == FOUR and formation.kind("r0").layout == ONE
    assert formation.names == ["g0", "g1", "r0"]
