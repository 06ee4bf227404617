"""What it means when a replica's process is silent, unreachable or dead: without a cluster."""

from __future__ import annotations

import pytest

from vidgen.fleet import silence
from vidgen.fleet.replica import Pulse
from vidgen.fleet.silence import Handle, Loss, Process

BUDGET = 900.0
STAGES = ("sit", "join", "start", "ready")


def replica(stage: str = "start", nodes: tuple[str, ...] = ("n0",), heard: float | None = 100.0) -> Handle:
    return Handle([Process(None, None, None, node, heard) for node in nodes], stage=stage)


def only(*living: str) -> silence.Lives:
    return lambda node: node in living


def overdue(handle: Handle, now: float, *living: str) -> Loss | None:
    return silence.overdue(handle, now, BUDGET, None, only(*(living or ("n0", "n1"))))


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_goes_with_its_node_counts_nothing_at_any_stage(stage: str) -> None:
    assert silence.died(replica(stage), 0, "gone", only("n1")) == Loss("node", "gone")
    gang = replica(stage, ("n0", "n1"))
    assert silence.died(gang, 1, "gone", only("n0")) == Loss("node", "rank 1: gone")


def test_a_process_that_goes_alone_is_a_start_that_failed_there_or_a_crash() -> None:
    assert silence.died(replica("start"), 0, "gone", only("n0")) == Loss("start", "gone", "n0")
    assert silence.died(replica("start", ("",)), 0, "gone", only("n0")) == Loss("start", "gone"), "it never said where"
    assert silence.died(replica("ready"), 0, "gone", only("n0")) == Loss("crash", "gone")


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_stays_unreachable_is_lost_with_its_machine_at_any_stage(stage: str) -> None:
    handle = replica(stage)
    assert silence.unreachable(handle, 0, "no route", 200.0) is None and not handle.reachable
    assert silence.unreachable(handle, 0, "no route", 200.0 + silence.UNREACHABLE_SECONDS) is None
    late = silence.unreachable(handle, 0, "no route", 201.0 + silence.UNREACHABLE_SECONDS)
    assert late == Loss("node", "no route")


def test_silence_is_the_nodes_if_it_is_gone_and_else_a_start_that_failed_or_a_hang() -> None:
    handle = replica("join", ("n0", "n1"))
    handle.members[0].heard = 300.0
    assert overdue(handle, 400.0) is None
    assert overdue(handle, 401.0) == Loss("start", "rank 1: no sign of life for 300 s", "n1")
    gone = overdue(handle, 401.0, "n0")
    assert gone is not None and gone.cause == "node"
    hung = overdue(replica("ready"), 401.0)
    assert hung is not None and hung.cause == "hang"


def test_a_start_is_late_after_its_budget_which_begins_when_its_last_process_shows() -> None:
    handle = replica("start", ("n0", ""), heard=None)
    assert not handle.placed and overdue(handle, 10_000.0) is None, "it waits for room"
    for process in handle.members:
        process.heard = 10_900.0
    assert handle.placed and overdue(handle, 10_100.0) is None
    assert overdue(handle, 10_100.0 + BUDGET) is None
    late = overdue(handle, 10_101.0 + BUDGET)
    assert late == Loss("late", "it was not ready 900 s after it started"), "both are awaited, on two nodes"


@pytest.mark.parametrize(
    ("nodes", "answered", "blamed", "said"),
    [
        (("n0",), (), "n0", ""),
        (("n0", "n1"), (0,), "n1", "rank 1: "),
        (("n0", "n1"), (1,), "n0", "rank 0: "),
        (("n0", "n1", "n1"), (0,), "n1", ""),
        (("n0", "n0"), (), "n0", ""),
        (("n0", "n1"), (), "", ""),
        (("n0", "n1", "n2"), (1,), "", ""),
    ],
)
def test_a_late_start_is_the_node_of_the_members_that_have_not_done_what_they_were_told_if_it_is_one(
    nodes: tuple[str, ...], answered: tuple[int, ...], blamed: str, said: str
) -> None:
    handle = replica("start", nodes)
    handle.placed_at = 100.0
    handle.answers = dict.fromkeys(answered)
    assert overdue(handle, 101.0 + BUDGET) == Loss("late", f"{said}it was not ready 900 s after it started", blamed)


def test_a_gang_that_broke_is_given_a_moment_to_tell_that_a_member_is_dead_or_unreachable() -> None:
    handle, first = replica("start", ("n0", "n1")), Loss("start", "the peer closed the connection", "n0")
    silence.breaks(handle, first, 110.0)
    silence.breaks(handle, Loss("start", "an echo of it", "n1"), 112.0)
    assert overdue(handle, 110.0 + silence.BROKEN_SECONDS) is None
    assert overdue(handle, 111.0 + silence.BROKEN_SECONDS) == first
    silence.unreachable(handle, 1, "no route", 111.0)
    assert overdue(handle, 130.0) is None, "what became of that member is the reason"
    assert silence.died(handle, 1, "gone", only("n0")) == Loss("node", "rank 1: gone")


@pytest.mark.parametrize(
    ("pace", "said", "members", "expected"),
    [
        (1.0, None, 2, 60.0),
        (20.0, None, 2, 200.0),  # ten of its steps
        (0.0, None, 2, 300.0),  # outside of the steps
        (20.0, None, 1, 300.0),  # a replica of one is judged by its silences
        (20.0, 45.0, 2, 45.0),
    ],
)
def test_a_gang_may_be_silent_for_ten_of_its_steps_and_a_minute_at_least(
    pace: float, said: float | None, members: int, expected: float
) -> None:
    handle = replica("ready", ("n0",) * members)
    handle.pulse = Pulse((), "denoise", 3, 50, 0.0, 0.0, "item", pace)
    assert silence.allowed(handle, said) == expected
