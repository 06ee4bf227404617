"""Several drivers at once, drivers and replicas that stood still, and what they do when they wake."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.crash.history import Fault, Job, Life, Server, ended, until
from tests.crash.test_points import watched
from vidgen import manifest
from vidgen.report.verify import verify
from vidgen.store import commits, epochs

SLOW = ("sampling.params.step_seconds=0.3", "engine.batch_tokens=1")
LEASE = 1.0
HELD = 75


@pytest.fixture
def job(server: Server, tmp_path: Path) -> Job:
    return Job(server, tmp_path / "job", more=12)


@pytest.fixture
def watch() -> ExitStack:
    """Whatever fails, no process stays."""
    with ExitStack() as stack:
        yield stack  # type: ignore[misc]


def passed(job: Job, life: Life) -> list[tuple[str, str]]:
    """What the driver of a life did, in order: (reached or passed, point)."""
    path = job.folder / "trail"
    words = (line.split("\t") for line in path.read_text().splitlines())
    return [(w[0], w[3]) for w in words if w[0] in ("point", "passed") and w[1:3] == [str(life.number), "driver"]]


def begun(job: Job, life: Life) -> list[str]:
    """The durable acts that the driver of a life began."""
    return [point for kind, point in passed(job, life) if kind == "point" and point.endswith(".before")]


def test_three_drivers_that_take_over_from_each_other_each_commit_something_and_lose_nothing(
    job: Job, watch: ExitStack
) -> None:
    lives = []
    for number in range(3):
        life = job.generate(*SLOW, "--no-report", *(["--takeover"] if number else []))
        lives.append(watch.enter_context(ended(life)))
        if number < 2:
            until(lambda life=life: job.made(life) >= 1)  # type: ignore[misc]
    assert [life.gone() for life in lives] == [HELD, HELD, 3], job.log()
    assert all(job.made(life) >= 1 for life in lives)
    assert epochs.current(job.objects) == 2
    job.superseded = 2
    job.finish()
    job.check_end()


def test_of_three_drivers_that_start_at_once_one_drives(job: Job, watch: ExitStack) -> None:
    lives = [watch.enter_context(ended(job.generate("--no-report"))) for _ in range(3)]
    codes = sorted(life.gone() for life in lives)
    assert codes[0] == 3 and set(codes) <= {3, HELD}, job.log()
    job.finish()
    job.check_end()


def test_two_and_three_drivers_wake_after_longer_than_their_lease_and_stop_at_once(job: Job, watch: ExitStack) -> None:
    """Each has committed something, then stands still; the next, on another machine, waits out the lease."""
    sleepers = []
    for host in ("a", "b"):
        life = job.generate(*SLOW, "--no-report", host=host, lease=LEASE, watch=True)
        watch.enter_context(ended(life))
        until(lambda life=life: job.made(life) >= 1)  # type: ignore[misc]
        os.kill(life.pid, signal.SIGSTOP)
        until(lambda life=life: bool(life.still()))  # type: ignore[misc]
        sleepers.append(life)
    last = watch.enter_context(ended(job.generate(*SLOW, "--no-report", host="c", lease=LEASE)))
    until(lambda: job.made(last) >= 1)
    before = [len(begun(job, life)) for life in sleepers]
    for life in sleepers:
        os.kill(life.pid, signal.SIGCONT)
    assert [life.gone() for life in sleepers] == [HELD, HELD], job.log()
    job.superseded = len(sleepers)
    after = [len(begun(job, life)) for life in sleepers]
    # Wherever the signal met it: what it had asked for already, it may end. The test below stops at chosen points.
    assert all(now <= then + 1 for now, then in zip(after, before, strict=True)), (before, after)
    assert last.gone() == 3, job.log()
    job.finish()
    job.check_end()


def test_a_driver_that_stands_still_at_any_point_begins_nothing_when_it_wakes(
    server: Server, tmp_path: Path, hits: Counter[str]
) -> None:
    """At each point of a run it is stopped, another takes over and ends the run, and then it wakes."""
    first = Job(server, tmp_path / "watched")
    points = {point for role, point in watched(first, tmp_path / "kept", steps=1) if role == "driver" and "." in point}
    unheld = {"probe.before", "probe.after", "plan part.before", "plan part.after", "plan.before", "plan.after"}
    unheld |= {"estimate.before", "estimate.after"}
    after_the_end = {*(point for point in points if point.startswith(("release", "report ", "poster")))}
    for point in sorted(points - unheld - after_the_end):
        job = Job(server, tmp_path / point.replace(" ", "-"))
        sleeper = job.generate(host="a", lease=LEASE, watch=True, faults=[Fault("driver", point, action="stop")])
        with ended(sleeper):
            until(lambda sleeper=sleeper: bool(sleeper.still()))  # type: ignore[misc]
            hits[f"driver: {point}"] += 1
            successor = job.generate("--no-report", host="b", lease=LEASE)
            with ended(successor):
                assert successor.gone() == 3, f"{point}: {job.log()}"
            before = len(begun(job, sleeper))
            os.kill(sleeper.pid, signal.SIGCONT)
            code = sleeper.gone()
        assert code == HELD, f"{point}: exit {code}\n{job.log()}"
        assert len(begun(job, sleeper)) == before, f"{point}: it began {begun(job, sleeper)[before:]}"
        verdict = verify(str(job.output))
        assert verdict.ok, f"{point}: {verdict.problems}"
        job.finish()
        job.check_end()


def test_of_two_that_finish_at_once_one_writes_success_and_it_is_right(job: Job, watch: ExitStack) -> None:
    """The first stands before the creation of _SUCCESS.json while the second does all of it."""
    first = job.generate(
        "--no-report", host="a", lease=LEASE, faults=[Fault("driver", "success.before", action="stop")]
    )
    watch.enter_context(ended(first))
    until(lambda: bool(first.still()))
    second = watch.enter_context(ended(job.generate("--no-report", host="b", lease=LEASE)))
    assert second.gone() == 3, job.log()
    written = job.objects.read(manifest.SUCCESS)
    os.kill(first.pid, signal.SIGCONT)
    assert first.gone() == HELD, job.log()
    assert job.objects.read(manifest.SUCCESS) == written
    job.finish()
    job.check_end()


def test_a_zombie_replica_that_wakes_after_its_item_was_redone_leaves_an_orphan_that_gc_takes(
    job: Job, watch: ExitStack
) -> None:
    """Its video is stored and its commit is not begun; the next driver's replica makes the item with other pixels."""
    zombie = Fault("replica", "commit.before", action="stop")
    first = watch.enter_context(ended(job.generate("--no-report", faults=[zombie], linger=True)))
    until(lambda: bool(first.still()))
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -9
    (pid,) = first.still()
    second = watch.enter_context(ended(job.generate("--no-report", tint=True)))
    assert second.gone() == 3, job.log()
    truth = job.commits()
    videos = {path: job.objects.read(path) for path in (entry.path for entry in job.objects.list("commits"))}
    os.kill(pid, signal.SIGCONT)
    first.gone()
    job.superseded = 1
    assert job.commits() == truth, "the zombie created no commit"
    assert all(job.objects.read(path) == data for path, data in videos.items())
    assert verify(str(job.output)).orphans >= 1
    assert job.gc().gone() == 0
    assert verify(str(job.output), strict=True).ok
    job.finish()
    job.check_end()


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_stop_that_is_killed_is_asked_again(job: Job, watch: ExitStack, side: str, hits: Counter[str]) -> None:
    driver = watch.enter_context(ended(job.generate(*SLOW, "--no-report")))
    until(lambda: job.made(driver) >= 1)
    assert job.start("stop", str(job.output), faults=[Fault("driver", f"stop.{side}")]).gone() == -9
    hits[f"driver: stop.{side}"] += 1
    if side == "before":
        assert job.start("stop", str(job.output)).gone() == 0, job.log()
    assert driver.gone() == 130, job.log()
    job.finish()
    job.check_end()


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_video_that_vanished_before_its_maker_looked_back_is_put_again(
    job: Job, watch: ExitStack, side: str, hits: Counter[str]
) -> None:
    """The replica keeps the bytes until it has seen the object there after its commit. Killed on the way, it leaves a
    commit without a video, which `verify` tells and `retry --missing` mends."""
    faults = [Fault("replica", "commit.after", action="stop"), Fault("replica", f"video again.{side}")]
    life = watch.enter_context(ended(job.generate("--no-report", faults=faults, watch=True)))
    until(lambda: job.fired() == faults[:1] and bool(life.still()))
    videos = {record.video for record in _done(job)}
    for video in videos:
        job.objects.delete(video)
    for pid in life.still():
        os.kill(pid, signal.SIGCONT)
    assert life.gone() == 3, job.log()
    assert faults[1] in job.fired()
    hits[f"replica: video again.{side}"] += 1
    missing = [video for video in videos if not job.objects.exists(video)]
    assert verify(str(job.output)).ok == (not missing)
    if side == "before":
        assert missing
    if missing:
        assert job.start("retry", str(job.output), "--missing").gone() == 0, job.log()
    job.finish()
    job.check_end()


def _done(job: Job) -> list[commits.Record]:
    found = (commits.read_commit(job.objects, generation, item) for item, generation in job.commits())
    return [record for record in found if record is not None and record.status == "done"]
