"""A half denoised item is kept, and another replica goes on from it: the remaining steps, the same bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fleet import inline
from tests.fleet.inline import config_for, drive, settings_for, write_prompts
from tests.fleet.test_determinism import digests
from tests.models.wan.tiny_checkpoint import build
from vidgen import config as configuration
from vidgen.errors import InfrastructureError
from vidgen.fleet import events as ev
from vidgen.fleet import saving
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.events import Work
from vidgen.fleet.replica import Worker
from vidgen.loop import State
from vidgen.plan.build import build as build_plan
from vidgen.plan.files import read_items
from vidgen.report.repair import retry
from vidgen.report.verify import verify
from vidgen.store import commits, gc, resume
from vidgen.store.objects import Objects

STEPS, STOP, BRANCHES = 7, 3, 2
PROMPTS = ["a red circle", "the cat", "a blue square"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sha256 of each row's video, made without a stop."""
    config = job(tmp_path_factory.mktemp("whole"), checkpoint)
    assert drive(config, replicas=1)[0].code == 0
    assert not list(Objects(config.output.path).list("resume"))
    return digests(config.output.path)


def job(
    folder: Path, checkpoint: Path, rows: int = len(PROMPTS), steps: int = STEPS, **run: Any
) -> configuration.JobConfig:
    """Every item counts as long, unless `save_after` says otherwise."""
    names = [str(i) for i in range(rows)]
    values = {
        "model": {"family": "wan", "checkpoint": str(checkpoint)},
        "dataset": {"path": write_prompts(folder / "p.parquet", PROMPTS[:rows], id=names), "id_column": "id"},
        "sampling": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": steps, "guidance_scale": 5.0},
        "output": {"path": str(folder / "out")},
        "run": {"allow_constant": True, "save_after": 0, **run},
    }
    return configuration.from_dict(values, "test")


class Stand:
    """Replicas of one job, one after the other, without a driver."""

    def __init__(self, config: configuration.JobConfig) -> None:
        self.objects = Objects(config.output.path)
        plan = build_plan(config, self.objects).plan
        self.objects.put("epochs/probe", b"seen")
        self.settings = settings_for(config, self.objects)
        self.works = [Work(item, 0, 1) for item in read_items(self.objects, plan, plan.parts[0])]
        self.forwards = 0

    def run(
        self, works: Iterable[Work], *, at: int = -1, act: Callable[[Worker], None] | None = None
    ) -> list[ev.Event]:
        """One replica runs one batch and closes; after step `at` somebody does `act` to it."""
        worker = Worker("r0", "node", self.settings)
        worker.start()
        predict, progress = worker._engine.backend.pipeline.predict, worker._progress
        self.forwards = 0

        def counted(*arguments: Any) -> Any:
            self.forwards += 1
            return predict(*arguments)

        def watched(stage: str, step: int, steps: int) -> None:
            progress(stage, step, steps)
            if (stage, step) == ("denoise", at) and act is not None:
                act(worker)

        worker._engine.backend.pipeline.predict, worker._progress = counted, watched
        worker.submit(1, tuple(works))
        worker.close()
        return list(worker.poll(0).events)

    def saved(self) -> set[str]:
        return {entry.path for entry in self.objects.list("resume")}

    def path(self, number: int) -> str:
        return resume.resume_path(0, self.works[number].item.item_id)

    def digests(self) -> dict[str, str]:
        """Of the videos that are committed, by row."""
        found = {work.item.row_id: commits.read_commit(self.objects, 0, work.item.item_id) for work in self.works}
        return {name: record.sha256 for name, record in found.items() if record is not None}


def kinds(events: Iterable[ev.Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def notes(events: Iterable[ev.Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, ev.Noted)]


def leave(within: float | None = None) -> Callable[[Worker], None]:
    return lambda worker: worker.leave(within)


def kept(work: Work) -> Work:
    return replace(work, saved=True)


# ---------------------------------------------------------------- a replica leaves, another goes on


@pytest.mark.parametrize("within", [None, 0.0], ids=["stop", "drain"])
def test_another_replica_goes_on_with_exactly_the_remaining_steps_and_makes_the_same_bytes(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str], within: float | None
) -> None:
    stand = Stand(job(tmp_path, checkpoint))
    first = stand.works[0]
    events = stand.run([first], at=STOP, act=leave(within))
    assert events == [ev.ItemSaved("r0", first.item.item_id, STOP), ev.BatchReturned("r0", 1, (first.item.item_id,))]
    assert stand.forwards == STOP * BRANCHES and stand.saved() == {stand.path(0)}
    events = stand.run([kept(first)])
    assert stand.forwards == (STEPS - STOP) * BRANCHES
    assert kinds(events) == ["Noted", "BatchGenerated", "ItemDone"]
    assert f"goes on after step {STOP}" in notes(events)[0]
    assert stand.digests() == {"0": whole["0"]}


def test_a_batch_is_saved_item_by_item_and_each_goes_on_in_whatever_company(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str]
) -> None:
    """The third item was never begun: it runs after those that go on, and all of them are in one batch of the driver's.
    Bytes of a batch of two are not those of one, on any machine; so the pair's are compared with a pair's."""
    pair, stand = Stand(job(tmp_path_of(tmp_path, "pair"), checkpoint)), Stand(job(tmp_path, checkpoint))
    pair.run(pair.works[:2])
    events = stand.run(stand.works[:2], at=STOP, act=leave())
    assert kinds(events) == ["ItemSaved", "ItemSaved", "BatchReturned"]
    assert stand.saved() == {stand.path(0), stand.path(1)}
    events = stand.run([stand.works[2], *map(kept, stand.works[:2])])
    assert stand.forwards == (STEPS - STOP + STEPS) * BRANCHES
    assert kinds(events).count("ItemDone") == 3
    assert stand.digests() == {**pair.digests(), "2": whole["2"]}


def tmp_path_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_states_of_different_steps_do_not_meet_in_a_batch(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str]
) -> None:
    stand = Stand(job(tmp_path, checkpoint))
    for number, stop in enumerate((2, 5)):
        stand.run([stand.works[number]], at=stop, act=leave())
    stand.run(map(kept, stand.works[:2]))
    assert stand.forwards == (STEPS - 2 + STEPS - 5) * BRANCHES
    assert stand.digests() == {name: whole[name] for name in ("0", "1")}


def test_what_is_short_is_finished_on_a_stop_and_given_back_unsaved_where_the_time_does_not_suffice(
    tmp_path: Path, checkpoint: Path
) -> None:
    stand = Stand(job(tmp_path, checkpoint, save_after=10_000))
    assert kinds(stand.run(stand.works[:1], at=STOP, act=leave())) == ["BatchGenerated", "ItemDone"]
    events = stand.run(stand.works[1:2], at=STOP, act=leave(0.0))
    assert kinds(events) == ["BatchReturned"] and not stand.saved()


def test_what_will_be_done_in_time_is_finished_on_the_node_that_goes(tmp_path: Path, checkpoint: Path) -> None:
    stand = Stand(job(tmp_path, checkpoint))
    assert kinds(stand.run(stand.works[:1], at=STOP, act=leave(3600.0))) == ["BatchGenerated", "ItemDone"]
    assert not stand.saved()


def test_a_replica_that_leaves_takes_nothing_new(tmp_path: Path, checkpoint: Path) -> None:
    stand = Stand(job(tmp_path, checkpoint))

    def leave_and_send(worker: Worker) -> None:
        worker.leave(None)
        worker.submit(2, (stand.works[1],))

    events = stand.run(stand.works[:1], at=STOP, act=leave_and_send)
    assert ev.BatchReturned("r0", 2) in events and not stand.digests()


def test_a_replica_that_dies_between_two_saves_loses_the_steps_since_the_last(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str]
) -> None:
    stand = Stand(job(tmp_path, checkpoint, save_every=0))

    def die(worker: Worker) -> None:
        worker._keeper.settle()
        worker.recall(abandon=True)

    events = stand.run(stand.works[:1], at=STOP, act=die)
    steps = [event.step for event in events if isinstance(event, ev.ItemSaved)]
    assert steps and steps[-1] <= STOP
    last = State.from_bytes(stand.objects.read(stand.path(0))).step
    stand.run([kept(stand.works[0])])
    assert stand.forwards == (STEPS - last) * BRANCHES
    assert stand.digests() == {"0": whole["0"]}


def test_a_store_that_takes_no_state_costs_the_item_nothing(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(job(tmp_path, checkpoint))
    put = Objects.put

    def refuse(self: Objects, path: str, data: bytes) -> None:
        if path.startswith("resume/"):
            raise InfrastructureError("503 from the store")
        put(self, path, data)

    monkeypatch.setattr(Objects, "put", refuse)
    events = stand.run(stand.works[:1], at=STOP, act=leave())
    assert "was not saved: 503" in notes(events)[0]
    assert stand.digests() == {"0": whole["0"]}, "it was not given up unsaved"


def test_a_replica_shows_life_while_a_slow_store_takes_a_state(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a gang, whose other members wait in a step, would be taken for one that hangs."""
    monkeypatch.setattr(saving, "ALIVE_SECONDS", 0.01)
    stand, put, lives = Stand(job(tmp_path, checkpoint)), Objects.put, threading.Semaphore(0)

    def slow(self: Objects, path: str, data: bytes) -> None:
        if path.startswith("resume/"):
            assert lives.acquire(timeout=60) and lives.acquire(timeout=60), "nobody heard of it meanwhile"
        put(self, path, data)

    def watched(worker: Worker) -> None:
        alive = worker._keeper.alive
        worker._keeper.alive = lambda: (alive(), lives.release())[0]
        worker.leave(None)

    monkeypatch.setattr(Objects, "put", slow)
    events = stand.run(stand.works[:1], at=STOP, act=watched)
    assert "ItemSaved" in kinds(events) and stand.saved() == {stand.path(0)}


# ---------------------------------------------------------------- what is not gone on from


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def not_finite(content: bytes) -> bytes:
    state, about = State.from_bytes(content), header(content)
    return State(state.step, state.latents * torch.nan, state.history, state.generators).to_bytes(about)


def anothers(content: bytes) -> bytes:
    return State.from_bytes(content).to_bytes({**header(content), "item_id": "0" * 32})


def of_two(content: bytes) -> bytes:
    state = State.from_bytes(content)
    return State.together([state, state]).to_bytes(header(content))


def header(content: bytes) -> dict[str, str]:
    from vidgen.fleet.saving import _header

    return _header(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (torn, "passed over"),
        (lambda content: b"", "torn"),
        (lambda content: b"\xff" * 40, "torn"),
        (lambda content: State.from_bytes(content).to_bytes(), "another item's"),
        (anothers, "another item's"),
        (of_two, "holds 2 items"),
        (not_finite, "not finite"),
    ],
    ids=["torn", "empty", "noise", "nameless", "foreign", "of-two", "nan"],
)
def test_a_torn_or_foreign_state_is_told_and_the_item_begins_again(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str], damage: Callable[[bytes], bytes], why: str
) -> None:
    stand = Stand(job(tmp_path, checkpoint))
    stand.run(stand.works[:1], at=STOP, act=leave())
    stand.objects.put(stand.path(0), damage(stand.objects.read(stand.path(0))))
    events = stand.run([kept(stand.works[0])])
    assert why in notes(events)[0] and stand.path(0) in notes(events)[0]
    assert stand.forwards == STEPS * BRANCHES and stand.digests() == {"0": whole["0"]}


# ---------------------------------------------------------------- a run that stops, and goes on


class Stopped(inline.InlineFleet):
    """Its first replica is asked to stop after a step, as a signal's handler does it to the driver."""

    driver: Any = None

    def start(self, name: str, avoid: Sequence[str] = ()) -> None:
        super().start(name, avoid)
        worker = self.workers[name]
        progress = worker._progress

        def watched(stage: str, step: int, steps: int) -> None:
            progress(stage, step, steps)
            if (stage, step) == ("denoise", STOP) and Stopped.driver is not None:
                Stopped.driver.interrupt.grace, Stopped.driver.interrupt.asked = 60.0, True
                worker.leave(None)  # the driver's loop says so too, a moment later

        worker._progress = watched  # type: ignore[method-assign]


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run stops in the middle of its first item."""

    class Known(inline.Driver):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            Stopped.driver = self

    monkeypatch.setattr(inline, "InlineFleet", Stopped)
    monkeypatch.setattr(inline, "Driver", Known)


def goes_on(config: configuration.JobConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Work]]:
    """Drives to the end without a stop; the code, and what was sent."""
    monkeypatch.undo()
    Stopped.driver = None
    outcome, fleet = drive(config, replicas=1)
    return outcome.code, [work for _, works in fleet.sent for work in works]


@pytest.mark.usefixtures("stops")
def test_a_stopped_run_keeps_what_is_half_made_until_the_next_start_has_made_it(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(tmp_path, checkpoint)
    objects = Objects(config.output.path)
    outcome, _ = drive(config, replicas=1, rules=Rules(prefetch=0))
    assert outcome.code == 130 and outcome.counts["done"] == 0
    ((generation, item_id),) = resume.list_saved(objects)
    assert generation == 0
    later = gc.collect(objects, older_than=0, now=lambda: 4e9)
    assert later.removed == 0 and len(list(resume.list_saved(objects))) == 1, "a pending item's state is no garbage"
    code, sent = goes_on(config, monkeypatch)
    assert code == 0 and [work.item.item_id for work in sent if work.saved] == [item_id]
    assert verify(config.output.path, strict=True).ok and digests(config.output.path) == whole
    assert not list(objects.list("resume")), "a terminal item's state is deleted"
    assert not list(objects.list("attempts"))


@pytest.mark.usefixtures("stops")
def test_a_state_that_fails_its_item_is_gone_with_the_failure(
    tmp_path: Path, checkpoint: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state of another shape under the item's own name cannot be told from a good one before it is tried."""
    config = job(tmp_path, checkpoint)
    objects = Objects(config.output.path)
    drive(config, replicas=1, rules=Rules(prefetch=0))
    ((_, item_id),) = resume.list_saved(objects)
    path = resume.resume_path(0, item_id)
    content = objects.read(path)
    state = State.from_bytes(content)
    objects.put(path, State(state.step, state.latents[:, :, :, :2], {}, state.generators).to_bytes(header(content)))
    code, sent = goes_on(config, monkeypatch)
    assert code == 0 and digests(config.output.path) == whole
    assert [work.saved for work in sent if work.item.item_id == item_id] == [True, False]
    assert not list(objects.list("resume"))


def test_states_of_earlier_generations_and_of_items_that_failed_are_not_used_and_are_garbage(
    tmp_path: Path,
) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 3), str(tmp_path / "out"), sampling__params__fail="item")
    objects = Objects(config.output.path)
    drive(config)
    items = sorted(commits.list_commits(objects, 0))
    for item_id in items:
        objects.put(resume.resume_path(0, item_id), b"of generation 0, which is over")
    assert retry(config.output.path).items == 3
    failed, fresh = items[:2]
    objects.put(resume.resume_path(1, failed), b"made before it failed in generation 1")
    objects.put(resume.resume_path(1, fresh), b"of use")
    objects.put("resume/notes.txt", b"somebody's own")
    commits.record_attempt(objects, commits.Attempt(failed, 1, "item", 0.0, "token"), {})
    _, fleet = drive(config)
    assert {work.item.item_id for _, works in fleet.sent for work in works if work.saved} == {fresh}
    assert gc.collect(objects, older_than=0).removed == 4, "three of generation 0, and that of the failed item"
    assert [entry.path for entry in objects.list("resume")] == ["resume/notes.txt"]
