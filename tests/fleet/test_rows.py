"""Rows that are bad, all of them or some: what a whole run makes of them, with real storage and a fake GPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen import manifest, media
from vidgen.errors import CapacityError, ItemError
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.driver import Driver, Limits, Outcome
from vidgen.fleet.gang import Entry
from vidgen.fleet.progress import Progress
from vidgen.fleet.replica import Pulse
from vidgen.models.testcard import backend
from vidgen.plan.build import build
from vidgen.plan.files import read_items, read_plan
from vidgen.report.status import read as status
from vidgen.store import commits, epochs, state
from vidgen.store.objects import Objects
from vidgen.types import Hooks, Record, Request, Video


class Instant:
    """A fleet that takes no time: every item fails alike, or is committed at once, or kills its replica. `host`: on
    which machine all replicas are."""

    def __init__(self, objects: Objects, broken: bool, killer: str = "", host: str = "") -> None:
        self.objects, self.broken, self.killer, self.host = objects, broken, killer, host
        self.events: list[ev.Event] = []
        self.ran = 0

    def start(self, name: str, avoid: Sequence[str] = ()) -> None:
        self.events.append(ev.ReplicaReady(name, f"node{name[1:]}", self.host))

    def send(self, name: str, batch: int, works: tuple[ev.Work, ...]) -> None:
        for work in works:
            self.ran += 1
            if work.item.item_id == self.killer:
                self.events.append(ev.ReplicaLost(name, "crash", "killed"))
                return
            if self.broken:
                error = "the checkpoint gives NaN"
                self.events.append(ev.ItemFailed(name, work.item.item_id, "item", error, error))
            else:
                record = Record(work.item.item_id, work.item.ordinal, "done", work.generation, work.attempt)
                commits.commit(self.objects, record, "token")
                self.events.append(ev.ItemDone(name, record))
        self.events.append(ev.BatchGenerated(name, batch))

    def recall(self, name: str, within: float | None = None) -> None:
        pass

    def reclaim(self, name: str) -> None:
        pass

    def pulses(self) -> dict[str, Pulse | None]:
        return {}

    def poll(self, timeout: float) -> list[ev.Event]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        pass


def run(config: Any, broken: bool, killer: str = "", host: str = "", replicas: int = 8) -> tuple[Outcome, Instant]:
    objects = Objects(config.output.path)
    build(config, objects)
    plans = read_plan(objects)
    lease = epochs.acquire(objects, lease=60)
    held = state.load(objects, sum(part.items for plan in plans for part in plan.parts), compact=True)
    fleet = Instant(objects, broken, killer, host)
    driver = Driver("test", objects, plans, held, lease, fleet, Progress(objects, quiet=True))
    return driver.run(Rules(), [f"r{index}" for index in range(replicas)], Limits()), fleet


def test_a_bad_configuration_burns_nothing_of_ten_thousand_rows_and_once_mended_all_are_made(tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 10_000), str(tmp_path / "out"))
    outcome, fleet = run(config, broken=True)
    objects = Objects(config.output.path)
    assert (outcome.code, outcome.counts["pending"]) == (4, 10_000)
    assert "50 failures in a row without a success: the checkpoint gives NaN" in outcome.reason
    assert status(config.output.path).reason == outcome.reason
    assert 50 <= fleet.ran <= 50 + 8 * 2, "what was on its way when the fiftieth failed"
    attempts = list(commits.read_attempts(objects))
    assert 50 <= len(attempts) <= fleet.ran and sum(attempt.count for attempt in attempts) == 0
    assert not list(commits.list_commits(objects, 0)) and not objects.exists(manifest.SUCCESS)
    outcome, fleet = run(config, broken=False)
    assert (outcome.code, outcome.counts["done"], fleet.ran) == (0, 10_000, 10_000)
    assert not status(config.output.path).reason
    done = [pc.sum(pc.equal(table.column("status"), "done")).as_py() for table in manifest.read(objects)]
    assert sum(done) == 10_000


@pytest.mark.parametrize(("host", "status", "runs"), [("beta", "quarantined", 1), ("alpha", "failed", 5)])
def test_a_row_that_killed_a_replica_under_an_earlier_driver_is_quarantined_by_the_first_other_machine(
    host: str, status: str, runs: int, tmp_path: Path
) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 3), str(tmp_path / "out"))
    objects = Objects(config.output.path)
    plan = build(config, objects).plan
    killer = next(read_items(objects, plan, plan.parts[0])).item_id
    for count, node in ((0.5, "alpha"), (0.0, "gamma")):
        attempt = commits.Attempt(killer, 0, "replica", count, node)
        commits.record_attempt(objects, attempt, {"error": "killed", "node": node})
    outcome, fleet = run(config, broken=False, killer=killer, host=host, replicas=1)
    assert outcome.code == 3 and outcome.counts["done"] == 2 and outcome.counts[status] == 1
    assert fleet.ran == 2 + runs + 1, "once in the company of the row that was prefetched behind it"
    record = commits.read_commit(objects, 0, killer)
    assert record is not None and (record.node, record.error_class) == (host, "replica")


class Tight(Entry):
    """A GPU that is too small for the odd rows, until the engine spares as much as `rung` says."""

    def __init__(self, rung: str) -> None:
        self.rung = rung

    def load(self, settings: Any, gang: Any) -> Any:
        cards, rung = backend.load(settings), self.rung

        class Engine:
            def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
                tight = any(int(request.prompt.split()[-1]) % 2 for request in requests)
                if tight and not (len(requests) == 1 if rung == "alone" else rung in hooks.rungs):
                    raise CapacityError("out of memory with 40 GB")
                yield from cards.generate(requests, hooks)

        return Engine()


@pytest.mark.parametrize(
    ("rung", "climbed"),
    [
        ("alone", ("alone",)),
        ("caches", ("alone", "caches")),
        ("offload", ("alone", "caches", "offload")),
    ],
)
def test_items_that_do_not_fit_climb_to_the_rung_they_need_and_each_rung_is_recorded(
    rung: str, climbed: tuple[str, ...], tmp_path: Path
) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 8), str(tmp_path / "out"))
    rules = Rules(batch_items=4, batch_tokens=10**6, rungs=("caches", "offload"))
    outcome, fleet = drive(config, rules=rules, entry=Tight(rung), replicas=1)
    assert (outcome.code, outcome.counts["done"]) == (0, 8)
    objects = Objects(config.output.path)
    attempts = list(commits.read_attempts(objects))
    assert {(attempt.error_class, attempt.count) for attempt in attempts} == {("capacity", 0.0)}
    told = [json.loads(objects.read(attempt.path)) for attempt in attempts]
    assert {one["next"] for one in told} == set(climbed)
    assert all(climbed[len(one["rungs"].split(", ")) if one["rungs"] else 0] == one["next"] for one in told)
    records = [commits.read_commit(objects, 0, item_id) for item_id in commits.list_commits(objects, 0)]
    assert {record.rungs for record in records if record and record.ordinal % 2} == {", ".join(climbed)}
    assert all(record.batch == 1 for record in records if record and record.rungs)
    assert max(len(works) for _, works in fleet.sent) > 1
    one_by_one, _ = drive(config_for(str(tmp_path / "p.parquet"), str(tmp_path / "plain")))
    assert one_by_one.code == 0
    videos = [{commit: _video(o, commit) for commit in commits.list_commits(o, 0)} for o in (objects, _plain(tmp_path))]
    assert videos[0] == videos[1], "no rung changes a byte"


def _plain(folder: Path) -> Objects:
    return Objects(str(folder / "plain"))


def _video(objects: Objects, item_id: str) -> str:
    record = commits.read_commit(objects, 0, item_id)
    assert record is not None
    return record.sha256


def test_an_item_that_fits_on_no_rung_fails_with_what_was_tried(tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 4), str(tmp_path / "out"))
    outcome, _ = drive(config, rules=Rules(rungs=("caches",)), entry=Tight("more"))
    assert (outcome.code, outcome.counts["failed"], outcome.counts["done"]) == (3, 2, 2)
    objects = Objects(config.output.path)
    failed = [commits.read_commit(objects, 0, item_id) for item_id in commits.list_commits(objects, 0)]
    assert {(r.error_class, r.rungs, r.node) for r in failed if r and r.status == "failed"} == {
        ("capacity", "caches", "node0")
    }
    assert status(config.output.path).failures[0].count == 2


class Made(Entry):
    """An engine whose videos are as `spoil` leaves them."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def load(self, settings: Any, gang: Any) -> Any:
        cards, spoil = backend.load(settings), self.spoil

        class Engine:
            def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
                for video in cards.generate(requests, hooks):
                    video.chunks = spoil(list(video.chunks))
                    yield video

        return Engine()


def nan(chunks: list[np.ndarray]) -> Iterator[np.ndarray]:
    yield chunks[0]
    raise ItemError("decoded frames are not finite")


def failing(tmp_path: Path, spoil: Any, words: str) -> None:
    """Every row fails for that reason, and nothing is stored that could be taken for a video."""
    config = config_for(write_prompts(tmp_path / "p.parquet", 2), str(tmp_path / "out"))
    outcome, _ = drive(config, rules=Rules(max_attempts=1), entry=Made(spoil))
    assert (outcome.code, outcome.counts["failed"]) == (3, 2)
    objects = Objects(config.output.path)
    failures = status(config.output.path).failures
    assert sum(group.count for group in failures) == 2
    assert all(group.signature.startswith("item: ") and words in group.error for group in failures), failures
    assert not list(objects.list("data"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda chunks: iter([chunks[0][:3]]), "3 frames"),
        (lambda chunks: iter([*chunks, chunks[0]]), "expected 5"),
        (lambda chunks: iter([np.full_like(chunk, 90) for chunk in chunks]), "one flat colour"),
        (nan, "not finite"),
    ],
    ids=["too few frames", "too many frames", "constant", "NaN"],
)
def test_a_video_that_is_not_what_was_asked_for_is_never_committed(spoil: Any, words: str, tmp_path: Path) -> None:
    failing(tmp_path, spoil, words)


def test_a_file_that_cannot_be_decoded_is_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = media.Encoder.finish

    def cut(self: media.Encoder) -> media.Encoded:
        encoded = finish(self)
        encoded.path.write_bytes(encoded.path.read_bytes()[: encoded.bytes // 2])
        return encoded

    monkeypatch.setattr(media.Encoder, "finish", cut)
    failing(tmp_path, iter, "could not be decoded")


def test_a_video_of_another_size_or_length_in_time_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = media.probe

    def longer(path: Any) -> media.Probe:
        found = probe(path)
        return media.Probe(found.frames, found.fps, found.width, found.height, found.duration * 3, found.codec)

    def wider(path: Any) -> media.Probe:
        found = probe(path)
        return media.Probe(found.frames, found.fps, found.width * 2, found.height, found.duration, found.codec)

    for wrong, words in ((longer, " s, expected "), (wider, "expected 5 of")):
        monkeypatch.setattr(media, "probe", wrong)
        (folder := tmp_path / wrong.__name__).mkdir()
        failing(folder, iter, words)
    monkeypatch.undo()


@pytest.mark.parametrize("fps", [1, 8, 29.97, 50])
@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "png"])
def test_the_length_in_time_of_a_good_video_is_what_was_asked_for(format: str, fps: float, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 1)
    config = config_for(prompts, str(tmp_path / "out"), output__format=format, sampling__fps=fps)
    assert drive(config)[0].counts["done"] == 1


def test_what_a_capped_run_has_made_is_a_sample_of_all_shapes(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 60, frames=[5] * 30 + [9] * 30)
    config = config_for(prompts, str(tmp_path / "out"), sampling__params__step_seconds=0.1)
    config.dataset.columns["num_frames"] = "frames"
    rules = Rules(order="stratified")
    outcome, fleet = drive(config, rules=rules, limits=Limits(gpu_seconds=1.5))
    assert outcome.code == 5 and 0 < outcome.counts["done"] < 60
    sent = Counter(work.item.request.num_frames for _, works in fleet.sent for work in works)
    assert abs(sent[5] - sent[9]) <= 2
    halves = Counter(work.item.ordinal % 30 < 15 for _, works in fleet.sent for work in works)
    assert abs(halves[True] - halves[False]) <= 4
    outcome, fleet = drive(config, rules=rules)
    assert (outcome.code, outcome.counts["done"]) == (0, 60)


def test_a_deadline_stops_gracefully_and_a_later_run_finishes(tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 5), str(tmp_path / "out"))
    outcome, fleet = drive(config, limits=Limits(deadline=1.0), replicas=1)
    assert (outcome.code, outcome.reason) == (5, "run.deadline is reached")
    assert len(fleet.sent) <= 2 and outcome.counts["failed"] == 0
    assert drive(config)[0].counts["done"] == 5
