"""The end of a run: what the dispatcher does so that no replica waits for another, rehearsed on a clock that jumps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet.simulation import item
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Dispatcher, Rules
from vidgen.fleet.offering import long_first, long_flops
from vidgen.fleet.rehearsal import Rehearsal, Rehearsed
from vidgen.plan.makespan import lower_bound, makespan
from vidgen.types import Item


def items(lengths: list[float]) -> list[Item]:
    return [item(ordinal, shape=f"{length:g}", flops=length) for ordinal, length in enumerate(lengths)]


def names(count: int) -> list[str]:
    return [f"r{number:02d}" for number in range(count)]


def rehearsed(lengths: list[float], replicas: int, rules: Rules | None = None) -> Rehearsed:
    found = Rehearsal(items(lengths), names(replicas), lambda one, replica: one.flops, rules).run()
    assert sorted(found.made) == list(range(len(lengths))), "every item once"
    return found


LENGTHS = st.lists(st.sampled_from([1.0, 2.0, 3.0, 7.0, 20.0, 45.0]), min_size=1, max_size=80)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 12))
def test_the_plans_wall_time_is_that_of_the_real_dispatcher(lengths: list[float], replicas: int) -> None:
    shapes = [(length, lengths.count(length)) for length in set(lengths)]
    predicted = makespan(shapes, replicas)
    assert rehearsed(lengths, replicas, Rules(prefetch=0)).seconds == pytest.approx(predicted), "no prefetch: the same"
    end = rehearsed(lengths, replicas).seconds
    # What is prefetched is bound before it is known who is free first; at the end it is asked back.
    assert lower_bound(shapes, replicas) - 1e-6 <= end <= predicted + max(lengths) + 1e-6


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(1, 12), st.integers(0, 1000))
def test_the_tail_is_never_longer_than_the_longest_item(lengths: list[float], replicas: int, seed: int) -> None:
    """Although items take up to a third more or less than the model says: no replica ends more than one item after
    another has run dry."""
    draw = random.Random(seed)
    takes = [length * draw.uniform(0.7, 1.3) for length in lengths]
    found = Rehearsal(items(lengths), names(replicas), lambda one, replica: takes[one.ordinal]).run()
    assert found.seconds <= sum(takes) / replicas + max(takes) + 1e-6
    assert found.seconds - min(found.busy.values()) <= max(takes) + 1e-6


def test_an_item_prefetched_behind_a_long_one_goes_to_a_replica_that_has_nothing_to_do() -> None:
    slow = Rehearsal(items([10.0] * 4), names(2), lambda one, replica: 100.0 if replica == "r00" else 10.0).run()
    assert slow.recalled == 1 and slow.seconds == 100.0


def test_a_replica_that_comes_late_takes_what_waits_behind_the_others() -> None:
    takes = lambda one, replica: 50.0  # noqa: E731
    found = Rehearsal(items([1.0] * 2), names(1), takes, late=[(10.0, "r99")]).run()
    assert found.recalled == 1 and found.seconds == 60.0


def test_a_batch_is_asked_back_once_and_only_when_nothing_more_is_to_come() -> None:
    dispatcher = Dispatcher(Rules(), ["r0"])
    dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.0)
    tasks = tuple(ev.Task(item(ordinal)) for ordinal in range(2))
    dispatcher.handle(ev.Offered(tasks, exhausted=False), 0.0)
    actions = dispatcher.handle(ev.ReplicaReady("r1", "n1"), 1.0)
    assert not [action for action in actions if isinstance(action, ev.Reclaim)], "more of the plan is on its way"
    actions = dispatcher.handle(ev.Offered((), exhausted=True), 2.0)
    assert [action for action in actions if isinstance(action, ev.Reclaim)] == [ev.Reclaim("r0")]
    assert dispatcher.handle(ev.Tick(), 3.0) == []
    (batch,) = dispatcher.replicas["r0"].unmade()[1:]
    (send,) = [a for a in dispatcher.handle(ev.BatchReturned("r0", batch.number), 4.0) if isinstance(a, ev.Send)]
    assert send.replica == "r1" and send.works[0].attempt == 1, "an item that was not started has not been tried"


def test_what_nobody_free_may_take_is_not_asked_back() -> None:
    """A replica on the driver's machine that has nothing to do, beside a suspect in flight there."""
    dispatcher = Dispatcher(Rules(own_node="n0", prefetch=0), ["r0", "r2"])
    dispatcher.handle(ev.ReplicaReady("r0", "n0"), 0.0)
    dispatcher.handle(ev.Offered((ev.Task(item(0, flops=9.0), suspect=True),), exhausted=False), 0.0)
    dispatcher.rules = dispatcher.order.rules = Rules(own_node="n0")
    dispatcher.handle(ev.ReplicaReady("r2", "n2"), 0.0)
    dispatcher.handle(ev.Offered((ev.Task(item(1)), ev.Task(item(2))), exhausted=True), 0.0)
    actions = dispatcher.handle(ev.ReplicaReady("r1", "n0"), 0.0)
    assert len(dispatcher.replicas["r2"].unmade()[1:]) == 1 and actions == []


def test_items_of_one_length_keep_to_their_shapes() -> None:
    """Landscape and portrait cost the same: a replica changes between them once, not at every item."""
    mixed = [item(i, shape="ab"[i % 2], flops=5.0) for i in range(200)]
    found = Rehearsal(mixed, names(4), lambda one, replica: one.flops).run()
    assert found.changes <= 4


def test_a_rare_long_item_at_the_end_of_the_plan_does_not_make_the_run_wait_for_it() -> None:
    """More items than the dispatcher's window holds, and the long ones come last in the plan."""
    rules, lengths = Rules(window=64), [1.0] * 500 + [100.0] * 4
    shapes = [{"tflops_per_item": 1e-12, "items": 500}, {"tflops_per_item": 100e-12, "items": 4}]
    long = long_flops(shapes, rules.window, replicas=8)
    assert long is not None and 1.0 < long < 100.0
    takes = lambda one, replica: one.flops  # noqa: E731
    plain = Rehearsal(items(lengths), names(8), takes, rules).run()
    first = Rehearsal(long_first(lambda: iter(items(lengths)), long), names(8), takes, rules).run()
    bound = sum(lengths) / 8
    assert first.seconds <= bound + 2 < plain.seconds and sorted(first.made) == list(range(504))


def test_nothing_is_offered_first_where_the_window_holds_all_or_all_are_alike() -> None:
    assert long_flops([{"tflops_per_item": 1.0, "items": 10}, {"tflops_per_item": 1e6, "items": 1}], 4096, 8) is None
    assert long_flops([{"tflops_per_item": 1.0, "items": 1_000_000}], 4096, 64) is None
    assert long_flops([], 4096, 64) is None


def test_a_long_item_is_not_bound_behind_another_while_others_are_still_starting() -> None:
    """The first of eight replicas that is ready does not take two of the eight long items."""
    dispatcher = Dispatcher(Rules(), names(8))
    dispatcher.handle(ev.Offered(tuple(ev.Task(one) for one in items([100.0] * 8 + [1.0] * 80)), True), 0.0)
    sent = dispatcher.handle(ev.ReplicaReady("r00", "n0"), 0.0)
    assert [len(action.works) for action in sent if isinstance(action, ev.Send)] == [1]
