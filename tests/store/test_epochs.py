"""One driver at a time, and who may take over when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vidgen.store import epochs
from vidgen.store.objects import Objects


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(str(tmp_path))


class Clock:
    """Time that passes only while somebody sleeps, and calls back on the way."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.now, self.then = 0.0, then

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()

    def __call__(self) -> float:
        return self.now


def acquire(objects: Objects, clock: Clock | None = None, **options: bool) -> epochs.Lease:
    clock = clock or Clock()
    return epochs.acquire(objects, lease=60.0, sleep=clock.sleep, clock=clock, **options)


def pretend(objects: Objects, **changes: object) -> None:
    """Rewrites the holder of epoch 0, as if another process held it."""
    holder = replace(epochs.Process.current(), **changes)  # type: ignore[arg-type]
    objects.put("epochs/0.json", json.dumps({**asdict(holder), "token": "x"}).encode())


def test_the_first_driver_gets_epoch_zero_and_the_next_after_a_clean_end_starts_at_once(objects: Objects) -> None:
    first = acquire(objects)
    first.release(gpu_seconds=7.0)
    clock = Clock()
    second = acquire(objects, clock)
    assert (first.epoch, second.epoch, second.unclean, clock.now) == (0, 1, False, 0.0)
    assert second.before["gpu_seconds"] == 7.0


def test_a_driver_that_ends_by_an_error_passes_on_what_it_had_spent_at_its_last_beat(objects: Objects) -> None:
    acquire(objects).release(gpu_seconds=7.0)
    second = acquire(objects)
    second.beat(gpu_seconds=9.0, in_flight=["a"])
    second.release(**second.inherited())
    assert acquire(objects).before["gpu_seconds"] == 9.0


def test_a_holder_looks_for_a_later_epoch_once_its_last_beat_is_a_lease_ago(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, elapsed = acquire(objects), [0.0]
    clocks = epochs._clocks()
    monkeypatch.setattr(epochs, "_clocks", lambda: (clocks[0], clocks[1] + elapsed[0]))
    acquire(objects, takeover=True)
    first.awake()
    elapsed[0] = 61.0
    with pytest.raises(epochs.Held, match="epoch 1 took over"):
        first.awake()
    with pytest.raises(epochs.Held, match="epoch 1 took over"):
        first.beat()


def test_a_live_driver_on_this_host_is_seen_at_once(objects: Objects) -> None:
    acquire(objects)
    clock = Clock()
    with pytest.raises(epochs.Held, match="on this host"):
        acquire(objects, clock)
    assert clock.now == 0.0


def test_a_dead_driver_on_this_host_is_superseded_at_once(objects: Objects) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    acquire(objects).beat(in_flight=["a"])
    pretend(objects, pid=process.pid, start_time="1")
    clock = Clock()
    lease = acquire(objects, clock)
    assert (lease.epoch, lease.unclean, clock.now) == (1, True, 0.0)
    assert lease.before["in_flight"] == ["a"]


def test_a_process_with_a_recycled_id_is_not_the_driver(objects: Objects) -> None:
    acquire(objects)
    pretend(objects, pid=os.getpid(), start_time="1")
    assert acquire(objects).epoch == 1


def test_a_silent_driver_elsewhere_is_superseded_after_a_lease_and_not_before(objects: Objects) -> None:
    acquire(objects)
    pretend(objects, boot_id="another machine")
    clock = Clock()
    assert acquire(objects, clock).epoch == 1
    assert clock.now >= 60.0


def test_a_beating_driver_elsewhere_keeps_its_run(objects: Objects) -> None:
    lease = acquire(objects)
    pretend(objects, boot_id="another machine")
    with pytest.raises(epochs.Held, match="beating"):
        acquire(objects, Clock(then=lambda: lease.beat(alive=True)))


def test_a_takeover_supersedes_a_live_driver_which_stops_at_its_next_durable_act(objects: Objects) -> None:
    old = acquire(objects)
    old.check()
    assert acquire(objects, takeover=True).epoch == 1
    with pytest.raises(epochs.Held, match="took over"):
        old.check()


def test_without_create_only_nobody_takes_over_from_elsewhere_by_waiting(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path), single_writer=True)
    acquire(objects)
    pretend(objects, boot_id="another machine")
    with pytest.raises(epochs.Held, match="--takeover"):
        acquire(objects)
    assert acquire(objects, takeover=True).epoch == 1


def test_stop_reaches_the_running_driver_and_nobody_else(objects: Objects) -> None:
    with pytest.raises(epochs.Held):
        epochs.request_stop(objects)
    lease = acquire(objects)
    assert not lease.stop_requested()
    assert epochs.request_stop(objects) == 0
    assert lease.stop_requested()
    lease.release()
    with pytest.raises(epochs.Held):
        epochs.request_stop(objects)


def test_who_holds_the_lease_without_driving_passes_on_what_was_in_flight_at_a_death(objects: Objects) -> None:
    acquire(objects).beat(in_flight=["a"], lone_suspect=0, gpu_seconds=9.0)
    pretend(objects, pid=os.getpid(), start_time="1")
    repairing = acquire(objects)
    repairing.release(**repairing.inherited())
    driving = acquire(objects)
    assert not driving.unclean
    assert driving.inherited() == {"gpu_seconds": 9.0, "in_flight": ["a"], "lone_suspect": 0}


def test_a_driver_that_died_before_its_first_beat_passes_on_what_was_left_to_it(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire(objects).beat(gpu_seconds=5000.0, in_flight=["a"], lone_suspect=True)
    monkeypatch.setattr(epochs, "start_time", lambda pid: "")
    body = json.dumps({**asdict(epochs.Process.current()), "token": "t"}).encode()
    assert objects.create("epochs/1.json", body, "t")
    third = acquire(objects)
    assert (third.epoch, third.unclean) == (2, True)
    assert third.before["gpu_seconds"] == 5000.0 and third.before["in_flight"] == ["a"]


def test_who_waited_while_the_driver_ended_cleanly_takes_over_from_its_last_beat(objects: Objects) -> None:
    """Not from the one that it read before it waited: that spent less, and had items in flight."""
    first = acquire(objects)
    first.beat(gpu_seconds=5.0, in_flight=["a"])
    pretend(objects, boot_id="another machine")
    second = acquire(objects, Clock(lambda: first.release(gpu_seconds=9.0, in_flight=[])))
    assert not second.unclean and second.before["gpu_seconds"] == 9.0 and second.before["in_flight"] == []


@pytest.mark.parametrize("beat", [b"", b'{"gpu_', b"null", b"[]"])
def test_a_damaged_beat_is_no_beat(objects: Objects, beat: bytes) -> None:
    acquire(objects)
    objects.put("epochs/0.beat", beat)
    pretend(objects, boot_id="another machine")
    clock = Clock()
    assert acquire(objects, clock).unclean and clock.now >= 60.0


def test_a_beat_that_stood_still_on_its_way_is_as_old_as_its_beginning(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, elapsed, put = acquire(objects), [0.0], objects.put
    clocks = epochs._clocks()
    monkeypatch.setattr(epochs, "_clocks", lambda: (clocks[0] + elapsed[0], clocks[1] + elapsed[0]))

    def stood_still(path: str, data: bytes) -> None:
        elapsed[0] += 61.0
        put(path, data)

    acquire(objects, takeover=True)
    monkeypatch.setattr(objects, "put", stood_still)
    first.beat()
    with pytest.raises(epochs.Held, match="epoch 1 took over"):
        first.awake()
