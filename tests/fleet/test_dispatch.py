"""The driver's decisions, over thousands of histories without a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet.simulation import Behaviour, Simulation, item
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.fleet.judgement import ENGINE_RUNGS, LADDER


def one_replica(rules: Rules = Rules(), node: str = "n0") -> Dispatcher:  # noqa: B008 (Rules is frozen)
    dispatcher = Dispatcher(rules, ["r0"])
    dispatcher.handle(ev.ReplicaReady("r0", node), 0.0)
    return dispatcher


def sends(actions: list[ev.Action]) -> list[ev.Send]:
    return [action for action in actions if isinstance(action, ev.Send)]


def tasks(*ordinals: int, **kwargs: object) -> tuple[ev.Task, ...]:
    return tuple(ev.Task(item(ordinal), **kwargs) for ordinal in ordinals)  # type: ignore[arg-type]


@st.composite
def histories(draw: st.DrawFn) -> tuple[Simulation, Behaviour]:
    """A job and all that goes wrong with it."""
    rows = st.integers(0, 39)
    behaviour = Behaviour(
        bad=draw(st.sets(rows, max_size=6)),
        killers=draw(st.sets(rows, max_size=2)),
        crash=draw(st.sampled_from([0.0, 0.05, 0.3])),
        lost_commit=draw(st.sampled_from([0.0, 0.5])),
        node_loss=draw(st.sampled_from([0.0, 0.1])),
        storage=draw(st.sampled_from([0.0, 0.1])),
        nodes=draw(st.integers(1, 3)),
        drains=draw(st.sampled_from([0.0, 0.1])),
        stays=draw(st.sampled_from([0.0, 0.2])),
        rooms=draw(st.sampled_from([0.0, 0.2])),
    )
    behaviour.sick = draw(st.sampled_from(["", "", "n1"])) if behaviour.nodes > 1 else ""
    behaviour.barren = draw(st.sampled_from(["", "", "n1"])) if behaviour.nodes > 1 else ""
    behaviour.needs = draw(st.dictionaries(rows, st.sampled_from([*LADDER, "more"]), max_size=5))
    gang = draw(st.booleans())
    batch = draw(st.integers(1, 4))
    rules = Rules(
        window=draw(st.sampled_from([2, 8, 4096])),
        batch_items=batch,
        batch_tokens=batch,
        own_node="n0",
        bands=(1000,) if gang else (),
        band_of={"g0": 1} if gang else {},
        degree_of={"g0": 4} if gang else {},
        rungs=draw(st.sampled_from([(), ("caches",), ENGINE_RUNGS])),
        idle_seconds=1.0,
    )
    total, replicas, seed = draw(st.integers(0, 40)), draw(st.integers(1, 4)), draw(st.integers(0, 10_000))
    suspects = draw(st.sets(rows, max_size=4))
    return Simulation(total, behaviour, rules, replicas, seed, suspects), behaviour


def unfit(simulation: Simulation) -> set[int]:
    """Items that fit on no rung of this run."""
    there = {"alone", *simulation.rules.rungs, *(("gang",) if simulation.rules.bands else ())}
    return {ordinal for ordinal, rung in simulation.behaviour.needs.items() if rung not in there}


def ends_well(history: tuple[Simulation, Behaviour]) -> None:
    simulation, behaviour = history
    finish = simulation.run()
    if finish.reason.startswith("no replica became ready"):  # by chance all its starts were on the barren node
        assert finish.code == 4 and behaviour.barren
        return
    if finish.code == 4:  # the breaker: what is not settled is pending
        assert (
            set(simulation.dispatcher.judge.streak.values()) and max(simulation.dispatcher.judge.streak.values()) >= 50
        )
        return
    total, behaviour.bad = simulation.total, behaviour.bad | unfit(simulation)
    assert finish.code is None
    assert len(simulation.committed) == total
    statuses = {ordinal: simulation.committed[item(ordinal).item_id].status for ordinal in range(total)}
    if not (behaviour.crash or behaviour.node_loss):
        assert all(statuses[i] == "done" for i in set(range(total)) - behaviour.bad - behaviour.killers)
    assert all(
        statuses[i] != "done" for i in behaviour.bad - behaviour.killers if i < total and not behaviour.lost_commit
    )
    assert simulation.largest <= simulation.rules.batch_items
    # Crashes weigh a half, the first with company nothing; and each rung is one attempt.
    most = 2 * simulation.rules.max_attempts + 2 + len(LADDER)
    if not (behaviour.crash or behaviour.node_loss or behaviour.storage or behaviour.killers or behaviour.sick):
        assert all(runs <= most for runs in simulation.runs.values())


@given(histories())
@settings(max_examples=300, deadline=None)
def test_every_history_ends_with_every_item_terminal_or_the_breaker(history: tuple[Simulation, Behaviour]) -> None:
    ends_well(history)


@pytest.mark.slow
@given(histories())
@settings(max_examples=5000, deadline=None)
def test_thousands_of_histories_end_with_every_item_terminal_or_the_breaker(
    history: tuple[Simulation, Behaviour],
) -> None:
    ends_well(history)


def test_a_bad_row_is_tried_three_times_and_the_others_go_on() -> None:
    simulation = Simulation(20, Behaviour(bad={5}), Rules())
    assert simulation.run().code is None
    assert simulation.committed[item(5).item_id].status == "failed"
    assert simulation.runs[item(5).item_id] == 3
    assert simulation.evidence[item(5).item_id] == 3
    assert sum(record.status == "done" for record in simulation.committed.values()) == 19


def test_a_bad_configuration_stops_after_fifty_failures_and_leaves_every_item_pending() -> None:
    simulation = Simulation(10_000, Behaviour(bad=set(range(10_000))), Rules())
    finish = simulation.run()
    assert finish.code == 4
    assert sum(simulation.runs.values()) <= 50 + 3 * 2
    assert not simulation.committed
    assert sum(simulation.evidence.values()) == 0


def test_a_small_dataset_of_bad_rows_ends_as_failed_not_as_broken() -> None:
    simulation = Simulation(20, Behaviour(bad=set(range(20))), Rules())
    assert simulation.run().code is None
    assert {record.status for record in simulation.committed.values()} == {"failed"}
    assert max(simulation.runs.values()) == 3


@pytest.mark.parametrize("seed", range(10))
def test_a_row_that_kills_a_replica_goes_to_another_node_and_is_quarantined_there(seed: int) -> None:
    simulation = Simulation(40, Behaviour(killers={3}), Rules(), replicas=4, seed=seed)
    assert simulation.run().code is None
    assert simulation.committed[item(3).item_id].status == "quarantined"
    *with_company, first, second = simulation.killed[item(3).item_id]
    assert first != second and len(with_company) <= 1


def test_a_row_that_kills_replicas_on_one_node_fails_after_crashes_that_weigh_three() -> None:
    simulation = Simulation(12, Behaviour(killers={3}, nodes=1), Rules(), replicas=2)
    assert simulation.run().code is None
    assert simulation.committed[item(3).item_id].status == "failed"
    assert simulation.runs[item(3).item_id] in (6, 7), "0.5 each, and nothing for the one with company"


def test_a_commit_that_outlived_its_replica_is_not_made_again() -> None:
    simulation = Simulation(6, Behaviour(killers={2}, lost_commit=1.0), Rules())
    assert simulation.run().code is None
    assert simulation.runs[item(2).item_id] == 1


def test_a_crash_with_several_items_aboard_counts_for_none_and_each_then_flies_alone() -> None:
    dispatcher = one_replica()
    first = dispatcher.handle(ev.Offered(tasks(0, 1), exhausted=True), 0.0)
    assert len(sends(first)) == 2
    dispatcher.handle(ev.ReplicaLost("r0", "crash", "killed"), 0.2)
    for ordinal in (0, 1):
        actions = dispatcher.handle(ev.Looked(item(ordinal).item_id, None), 0.3)
        assert not [a for a in actions if isinstance(a, ev.Evidence)]
    assert len(sends(dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.4))) == 1
    dispatcher.handle(ev.ReplicaLost("r0", "crash", "killed"), 0.5)
    (evidence,) = dispatcher.handle(ev.Looked(item(0).item_id, None), 0.6)
    assert isinstance(evidence, ev.Evidence) and evidence.item_id == item(0).item_id


def test_an_innocent_neighbour_of_a_killer_is_always_made() -> None:
    for seed in range(20):
        rules = Rules(batch_items=4, batch_tokens=4, max_attempts=1)
        simulation = Simulation(16, Behaviour(killers={3}), rules, replicas=2, seed=seed)
        assert simulation.run().code is None
        assert [r.ordinal for r in simulation.committed.values() if r.status != "done"] == [3]


def test_lost_nodes_and_storage_trouble_count_nothing() -> None:
    simulation = Simulation(30, Behaviour(node_loss=0.2, storage=0.2), Rules(), seed=3)
    assert simulation.run().code is None
    assert sum(simulation.evidence.values()) == 0
    assert {record.status for record in simulation.committed.values()} == {"done"}


def test_a_hundred_idle_replicas_that_are_lost_with_their_nodes_do_not_trip_the_breaker() -> None:
    dispatcher = Dispatcher(Rules(), [f"r{i}" for i in range(100)])
    for index in range(100):
        dispatcher.handle(ev.ReplicaReady(f"r{index}", f"n{index}"), 0.0)
    for index in range(100):
        actions = dispatcher.handle(ev.ReplicaLost(f"r{index}", "node", "gone"), 0.0)
        assert ev.Replace(f"r{index}") in actions
    assert dispatcher.finished is None


def test_after_a_batch_dies_its_items_run_one_by_one() -> None:
    dispatcher = one_replica(Rules(batch_items=4, batch_tokens=4, prefetch=0))
    (batch,) = sends(dispatcher.handle(ev.Offered(tasks(*range(8)), exhausted=True), 0.0))
    assert len(batch.works) == 4
    dispatcher.handle(ev.ReplicaLost("r0", "crash", "killed"), 0.0)
    for work in batch.works:
        dispatcher.handle(ev.Looked(work.item.item_id, None), 0.0)
    (again,) = sends(dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.0))
    assert len(again.works) == 1


def test_suspects_come_last_and_fly_alone_on_the_drivers_own_machine() -> None:
    dispatcher = one_replica(Rules(own_node="n0"))
    offered = (ev.Task(item(0), suspect=True), ev.Task(item(1)), ev.Task(item(2), suspect=True))
    (first,) = sends(dispatcher.handle(ev.Offered(offered, exhausted=True), 0.0))
    assert first.works[0].item.ordinal == 1
    done = item(1)
    simulation_record = Simulation(0, Behaviour(), Rules()).record(done)
    actions = dispatcher.handle(ev.ItemDone("r0", simulation_record), 0.0)
    actions += dispatcher.handle(ev.BatchGenerated("r0", first.batch), 0.0)
    assert [send.works[0].item.ordinal for send in sends(actions)] == [0]
    assert len(dispatcher.in_flight()) == 1


def test_higher_priority_goes_first_then_the_longest() -> None:
    dispatcher = one_replica(Rules(prefetch=5))
    offered = (ev.Task(item(0)), ev.Task(item(1, flops=9.0)), ev.Task(item(2, priority=1)))
    order = [s.works[0].item.ordinal for s in sends(dispatcher.handle(ev.Offered(offered, exhausted=True), 0.0))]
    assert order == [2, 1, 0]


def test_stopping_sends_nothing_more_and_ends_when_what_flies_has_landed() -> None:
    dispatcher = one_replica()
    running, prefetched = sends(dispatcher.handle(ev.Offered(tasks(0, 1, 2), exhausted=True), 0.0))
    actions = dispatcher.handle(ev.StopAsked(130, "interrupted"), 0.0)
    assert ev.Recall("r0") in actions and not sends(actions)
    dispatcher.handle(ev.BatchReturned("r0", prefetched.batch), 0.0)
    dispatcher.handle(ev.BatchGenerated("r0", running.batch), 0.0)
    assert dispatcher.finished is None
    dispatcher.handle(ev.ItemDone("r0", Simulation(0, Behaviour(), Rules()).record(item(0))), 0.0)
    assert dispatcher.finished == ev.Finish(130, "interrupted")


def test_a_replica_that_never_becomes_ready_stops_the_run_with_its_reason() -> None:
    dispatcher = Dispatcher(Rules(), ["r0"])
    dispatcher.handle(ev.Offered(tasks(0), exhausted=True), 0.0)
    for _ in range(3):
        dispatcher.handle(ev.ReplicaLost("r0", "start", "no CUDA driver"), 0.0)
    assert dispatcher.finished is not None and dispatcher.finished.code == 4
    assert "no CUDA driver" in dispatcher.finished.reason


def test_a_replica_that_refuses_to_run_ends_the_run_at_once_as_a_configuration_error() -> None:
    dispatcher = Dispatcher(Rules(), ["r0"])
    dispatcher.handle(ev.ReplicaLost("r0", "refused", "another checkpoint"), 0.0)
    assert dispatcher.finished == ev.Finish(2, "another checkpoint")


def test_an_item_climbs_the_ladder_one_rung_a_failure_and_no_rung_counts() -> None:
    gang = {"bands": (1000,), "band_of": {"g0": 1}, "degree_of": {"g0": 4}}
    for top, climbed in (
        ("caches", ["caches"]),
        ("offload", ["caches", "offload"]),
        ("gang", ["caches", "offload", "gang"]),
    ):
        simulation = Simulation(6, Behaviour(needs={2: top}), Rules(rungs=ENGINE_RUNGS, **gang))  # type: ignore[arg-type]
        assert simulation.run().code is None
        assert {record.status for record in simulation.committed.values()} == {"done"}
        assert [evidence.next for evidence in simulation.climbed] == climbed
        assert [evidence.rungs for evidence in simulation.climbed] == [tuple(climbed[:i]) for i in range(len(climbed))]
        assert sum(simulation.evidence.values()) == 0
        assert simulation.runs[item(2).item_id] == 1 + len(climbed)


def test_rungs_that_a_run_does_not_have_are_skipped_and_the_last_failure_counts() -> None:
    simulation = Simulation(6, Behaviour(needs={2: "more"}), Rules(batch_items=4, batch_tokens=4), replicas=1)
    assert simulation.run().code is None
    assert simulation.committed[item(2).item_id].status == "failed"
    assert {evidence.next for evidence in simulation.climbed} == {"alone"}
    assert simulation.evidence[item(2).item_id] == 3


def test_after_two_items_of_a_shape_needed_a_rung_the_others_begin_there() -> None:
    even = dict.fromkeys(range(0, 40, 2), "offload")
    simulation = Simulation(40, Behaviour(needs=even), Rules(rungs=ENGINE_RUNGS), replicas=1)
    assert simulation.run().code is None
    assert {record.status for record in simulation.committed.values()} == {"done"}
    odd = [simulation.runs[item(ordinal).item_id] for ordinal in range(1, 40, 2)]
    assert set(odd) == {1}
    assert sum(simulation.runs[item(ordinal).item_id] for ordinal in even) <= len(even) + 2 * 4
    assert any("offload" in text for text in simulation.said)


def test_a_configuration_that_fits_nowhere_trips_the_breaker_while_its_items_climb() -> None:
    simulation = Simulation(10_000, Behaviour(needs=dict.fromkeys(range(10_000), "more")), Rules(rungs=ENGINE_RUNGS))
    assert simulation.run().code == 4
    assert sum(simulation.runs.values()) <= 50 + 3 * 2
    assert not simulation.committed and sum(simulation.evidence.values()) == 0


def test_a_node_whose_storage_fails_is_avoided_and_its_replicas_are_started_elsewhere() -> None:
    simulation = Simulation(200, Behaviour(nodes=4, sick="n2"), Rules(), replicas=8)
    assert simulation.run().code is None
    assert {record.status for record in simulation.committed.values()} == {"done"}
    assert simulation.on_node["n2"] <= 5 + 2 * 2, "what was on its way when the fifth failed"
    assert "n2" not in simulation.place.values()
    assert any("node n2 gets no new items" in text for text in simulation.said)


def test_a_store_that_fails_everywhere_makes_no_node_a_bad_one() -> None:
    simulation = Simulation(200, Behaviour(nodes=4, storage=0.3), Rules(), replicas=8)
    assert simulation.run().code is None
    assert not simulation.said


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_last_node_is_never_avoided(nodes: int) -> None:
    behaviour = Behaviour(nodes=nodes, sick="n0", barren="n1")
    simulation = Simulation(30, behaviour, Rules(breaker_failures=20), replicas=2)
    assert simulation.run().code == 4, "the breaker ends it, with what the storage said"
    assert simulation.dispatcher.finished is not None and "503" in simulation.dispatcher.finished.reason
    assert not simulation.dispatcher.health.avoided()


def test_a_node_is_tried_again_after_its_time() -> None:
    simulation = Simulation(60, Behaviour(nodes=2, sick="n1"), Rules(), replicas=4)
    assert simulation.run().code is None
    dispatcher = simulation.dispatcher
    assert dispatcher.health.avoided() == {"n1"}
    dispatcher.finished = None
    actions = dispatcher.handle(ev.Tick(), simulation.now + 1800)
    assert ev.Say("", "node n1") in actions and not dispatcher.health.avoided()


def test_replicas_that_fail_to_start_on_one_node_neither_stop_the_run_nor_spin() -> None:
    simulation = Simulation(60, Behaviour(nodes=2, barren="n1"), Rules(), replicas=4)
    assert simulation.run().code is None
    assert {record.status for record in simulation.committed.values()} == {"done"}


def test_a_replica_that_is_late_stops_the_run_at_once_unless_another_came_up() -> None:
    alone = Dispatcher(Rules(), ["r0"])
    alone.handle(ev.ReplicaLost("r0", "late", "it was not ready after 900 s"), 0.0)
    assert alone.finished == ev.Finish(4, "no replica became ready: it was not ready after 900 s")
    beside = Dispatcher(Rules(), ["r0", "r1"])
    beside.handle(ev.ReplicaReady("r1", "n1"), 0.0)
    assert ev.Replace("r0") in beside.handle(ev.ReplicaLost("r0", "late", "slow"), 0.0)
    assert beside.finished is None


def test_one_replica_that_fails_to_start_waits_for_the_others_that_still_load() -> None:
    dispatcher = Dispatcher(Rules(), [f"r{i}" for i in range(8)])
    for failures in range(5):
        dispatcher.handle(ev.ReplicaLost("r0", "start", "no driver", "n0"), 100.0 * failures)
    assert dispatcher.finished is None
    for number in range(1, 8):
        dispatcher.handle(ev.ReplicaLost(f"r{number}", "start", "no driver", "n1"), 600.0)
    assert dispatcher.finished == ev.Finish(4, "no replica became ready: no driver")


def test_a_replica_that_keeps_failing_to_start_is_started_ever_more_slowly() -> None:
    dispatcher = Dispatcher(Rules(), ["r0", "r1"])
    dispatcher.handle(ev.ReplicaReady("r1", "n1"), 0.0)
    now, started = 0.0, []
    for _ in range(8):
        actions = dispatcher.handle(ev.ReplicaLost("r0", "start", "no driver"), now)
        lost_at = now
        while ev.Replace("r0") not in actions:
            now += 1.0
            actions = dispatcher.handle(ev.Tick(), now)
        started.append(now - lost_at)
    assert started == [0, 2, 4, 8, 16, 32, 60, 60]


def test_nodes_that_go_while_replicas_load_are_replaced_ever_more_slowly_and_end_a_run_that_has_nothing_else() -> None:
    dispatcher = Dispatcher(Rules(), [f"r{i}" for i in range(8)])
    lost = 0
    while dispatcher.finished is None:
        name, now = f"r{lost % 8}", 100.0 * lost
        actions = dispatcher.handle(ev.ReplicaLost(name, "node", "rank 0: its node died"), now)
        assert (ev.Replace(name) in actions) == (lost < 8), "at once the first time, after a while then"
        lost += 1
        assert dispatcher.finished or ev.Replace(name) in actions + dispatcher.handle(ev.Tick(), now + 2.0)
    assert lost == 16
    reason = "no replica became ready: 16 nodes went while it loaded there; the last: rank 0: its node died"
    assert dispatcher.finished == ev.Finish(4, reason)


def test_nodes_that_go_while_replicas_load_end_no_run_that_has_a_replica_or_had_one_since() -> None:
    dispatcher = Dispatcher(Rules(), ["r0", "r1"])
    dispatcher.handle(ev.ReplicaReady("r1", "n1"), 0.0)
    for _ in range(30):
        dispatcher.handle(ev.ReplicaLost("r0", "node", "gone"), 0.0)
    assert dispatcher.finished is None
    dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.0)
    for name in ("r0", "r1"):
        assert ev.Replace(name) in dispatcher.handle(ev.ReplicaLost(name, "node", "gone"), 0.0), "both were ready"
    for _ in range(9):
        dispatcher.handle(ev.ReplicaLost("r0", "node", "gone"), 0.0)
    assert dispatcher.finished is None


def test_replicas_that_were_ready_once_and_come_up_no_more_end_the_run() -> None:
    dispatcher = one_replica()
    dispatcher.handle(ev.ReplicaLost("r0", "crash", "killed"), 0.0)
    for _ in range(9):
        dispatcher.handle(ev.ReplicaLost("r0", "start", "no such bucket"), 0.0)
    assert dispatcher.finished is None
    dispatcher.handle(ev.ReplicaLost("r0", "start", "no such bucket"), 0.0)
    assert dispatcher.finished == ev.Finish(4, "no replica became ready again: no such bucket")
