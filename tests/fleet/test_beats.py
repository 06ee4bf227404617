"""Whoever holds a run beats, whatever it is busy with, and looks at its beats whether it is asked to stop."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import inline
from tests.fleet.inline import InlineFleet, config_for, drive, write_prompts
from vidgen import manifest
from vidgen.config import JobConfig
from vidgen.fleet import driver as driving
from vidgen.fleet import events as ev
from vidgen.fleet import run
from vidgen.fleet.dispatch import Rules
from vidgen.plan.build import build
from vidgen.report import repair
from vidgen.store import commits, epochs, gc, state
from vidgen.store.objects import Objects

ROWS = 6


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    return config_for(write_prompts(tmp_path / "p.parquet", ROWS), str(tmp_path / "out"))


def done(config: JobConfig) -> None:
    assert drive(config)[0].code == 0


def unfinished(config: JobConfig) -> None:
    """Every item is terminal, and there is no manifest."""
    done(config)
    Objects(config.output.path).delete(manifest.SUCCESS)


def finish(config: JobConfig) -> None:
    assert run.generate(str(config.output.path), [], run.Options(quiet=True))[1].code == 0


def fresh(config: JobConfig) -> None:
    build(config, Objects(config.output.path))


@pytest.mark.parametrize(
    ("before", "act", "where", "long"),
    [
        (unfinished, finish, state, "load"),
        (unfinished, finish, manifest, "is_valid"),
        (unfinished, finish, manifest, "write"),
        (fresh, drive, commits, "read_attempts"),
        (fresh, drive, manifest, "write"),
        (done, lambda config: repair.retry(config.output.path), state, "load"),
        (done, lambda config: repair.retry(config.output.path, missing=True), repair, "check_videos"),
        (done, lambda config: repair.extend(config, Objects(config.output.path)), repair, "build"),
        (done, lambda config: repair.collect(config.output.path, older_than=0), gc, "collect"),
    ],
    ids=["load", "valid", "manifest-again", "attempts", "manifest", "retry", "retry-missing", "extend", "gc"],
)
def test_a_holder_beats_while_it_does_something_long(
    config: JobConfig,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[JobConfig], None],
    act: Callable[[JobConfig], object],
    where: Any,
    long: str,
) -> None:
    """It is held up until a beat came: nobody else may take the run for one that died."""
    before(config)
    whole, objects, waited = getattr(where, long), Objects(config.output.path), 0

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal waited
        waited += 1
        epoch = epochs.current(objects)
        assert epoch is not None
        last, end = epochs.read_beat(objects, epoch), time.monotonic() + 60
        while (beat := epochs.read_beat(objects, epoch)) == last:
            assert time.monotonic() < end, "no beat"
            time.sleep(0.01)
        assert not last.get("released") and not beat.get("released")
        return whole(*arguments, **options)

    monkeypatch.setattr(epochs, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(where, long, slow)
    act(config)
    assert waited
    assert "beats" not in {thread.name for thread in threading.enumerate()}


def test_a_holder_that_was_superseded_beats_no_more_and_learns_it_before_its_next_act(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(config.output.path)
    lease = epochs.acquire(objects, lease=0.0)
    monkeypatch.setattr(epochs, "BEAT_SECONDS", 0.01)
    with epochs.beating(lease):
        (thread,) = (one for one in threading.enumerate() if one.name == "beats")
        epochs.acquire(objects, lease=60, takeover=True)
        thread.join(60)
        assert not thread.is_alive()
        with pytest.raises(epochs.Held):
            lease.check()


def test_a_stop_is_heard_however_often_items_are_sent_after_an_unclean_end(config: JobConfig) -> None:
    """Then each dispatch beats, so that a beat is never due."""
    objects = Objects(config.output.path)
    build(config, objects)
    epochs.acquire(objects, lease=60)
    holder = json.loads(objects.read("epochs/0.json"))
    objects.put("epochs/0.json", json.dumps({**holder, "start_time": "1"}).encode())
    objects.put("epochs/1.stop", b"{}")
    outcome, _ = drive(config, replicas=1, rules=Rules(prefetch=0))
    assert outcome.code == 130 and outcome.counts["pending"]


class Losing(InlineFleet):
    """A replica that is lost with all that it was sent first."""

    def send(self, name: str, batch: int, works: Sequence[ev.Work]) -> None:  # type: ignore[override]
        if self.sent:
            super().send(name, batch, tuple(works))
        else:
            self.sent.append((name, tuple(works)))
            self.waiting.append(ev.ReplicaLost(name, "node", "gone"))


def test_a_driver_beats_between_the_items_of_a_lost_node_that_it_looks_up(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    beat, read = epochs.Lease.beat, commits.read_commit
    monkeypatch.setattr(inline, "InlineFleet", Losing)
    monkeypatch.setattr(driving, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(epochs.Lease, "beat", lambda *a, **facts: (seen.append("beat"), beat(*a, **facts))[1])
    monkeypatch.setattr(commits, "read_commit", lambda *a: (seen.append("look"), read(*a))[1])
    outcome, _ = drive(config, replicas=1, rules=Rules(batch_items=ROWS, batch_tokens=10**9))
    assert outcome.code == 0
    looks = [index for index, what in enumerate(seen) if what == "look"]
    assert len(looks) > 2
    assert all("beat" in seen[one:next] for one, next in itertools.pairwise(looks))
