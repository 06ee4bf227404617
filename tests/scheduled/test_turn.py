"""One tick at a time; `vidgen stop` on the schedule reaches the run that is being driven."""

from __future__ import annotations

import time
import uuid

import pytest

from vidgen.scheduled import turn
from vidgen.store import epochs
from vidgen.store.objects import Objects


@pytest.fixture
def root() -> Objects:
    return Objects(f"memory://turn-{uuid.uuid4()}")


def test_a_second_tick_is_told_to_skip_or_to_join_and_the_next_one_has_its_turn(root: Objects) -> None:
    said: list[str] = []
    first = turn.take(root, 60, False, "skip", said.append)
    assert first is not None
    with pytest.raises(epochs.Held, match="still runs"):
        turn.take(root, 60, False, "skip", said.append)
    assert turn.take(root, 60, False, "join", said.append) is None and "joins in" in said[0]
    first.release()
    after = turn.take(root, 60, False, "skip", said.append)
    assert after is not None
    after.release()


def test_a_turn_that_was_taken_over_is_noticed(root: Objects) -> None:
    first = turn.take(root, 60, False, "skip", print)
    second = turn.take(root, 60, True, "skip", print)
    assert first is not None and second is not None
    with pytest.raises(epochs.Held, match="took over"):
        first.check()
    second.check()
    first.release()
    second.release()


def test_stop_is_heard_at_a_beat_and_passed_on(root: Objects) -> None:
    run = Objects(f"memory://turn-run-{uuid.uuid4()}")
    driver = epochs.acquire(run, lease=60)
    held = turn.Turn(epochs.acquire(root, lease=60), every=0.01)
    held.driven = run
    epochs.request_stop(root)
    for _ in range(500):
        if held.stopping and driver.stop_requested():
            break
        time.sleep(0.01)
    assert held.stopping and driver.stop_requested()
    held.release()
    assert epochs.read_beat(root, 0)["released"]
