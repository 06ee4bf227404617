"""A long-lived process ticks on a grid of the steady clock, through failures, until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from vidgen.errors import PlanError
from vidgen.scheduled.pace import every
from vidgen.store.epochs import Held


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def ticks(clock: Clock, took: list[float], codes: dict[int, int | BaseException] | None = None) -> Callable[[], int]:
    """A tick that takes so long each time, and ends the loop when the list is over."""
    began.clear()

    def tick() -> int:
        number = len(began)
        began.append(clock.now - 1000.0)
        if number == len(took):
            return 130
        clock.now += took[number]
        code = (codes or {}).get(number, 0)
        if isinstance(code, BaseException):
            raise code
        return code

    return tick


began: list[float] = []


def run(clock: Clock, tick: Callable[[], int], seconds: float = 60.0) -> list[str]:
    said: list[str] = []
    assert every(seconds, tick, say=said.append, clock=clock, sleep=clock.sleep) == 130
    return said


def test_ticks_do_not_drift_and_a_long_one_does_not_pile_up_others() -> None:
    clock = Clock()
    run(clock, ticks(clock, [1.0, 7.0, 59.9, 190.0, 0.0]))
    assert began == [0.0, 60.0, 120.0, 180.0, 420.0, 480.0]


def test_a_failing_tick_is_told_and_followed_by_ever_longer_waits_and_then_the_grid_again() -> None:
    clock = Clock()
    codes: dict[int, int | BaseException] = {1: PlanError("no such file"), 2: OSError("disk"), 3: 4, 4: ValueError("x")}
    said = run(clock, ticks(clock, [0.0] * 7, codes))
    assert began == [0.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1020.0, 1080.0]
    text = "\n".join(said)
    assert "error: no such file" in text and "OSError: disk" in text and "failure 4 in a row" in text


def test_the_wait_after_failures_has_an_end() -> None:
    clock = Clock()
    run(clock, ticks(clock, [0.0] * 9, dict.fromkeys(range(9), 2)))
    assert [b - a for a, b in pairwise(began)][-3:] == [3600.0] * 3


@pytest.mark.parametrize("code", [3, 5, 75, Held("another tick")])
def test_what_is_no_failure_keeps_the_pace(code: int | Held) -> None:
    clock = Clock()
    run(clock, ticks(clock, [0.0] * 3, dict.fromkeys(range(3), code)))
    assert began == [0.0, 60.0, 120.0, 180.0]


def test_an_interrupt_ends_it_in_a_tick_and_while_it_waits() -> None:
    clock = Clock()
    run(clock, ticks(clock, [0.0, 0.0], {1: KeyboardInterrupt()}))
    assert len(began) == 2

    def asleep(seconds: float) -> None:
        raise KeyboardInterrupt

    assert every(60, lambda: 0, say=print, clock=clock, sleep=asleep) == 130
