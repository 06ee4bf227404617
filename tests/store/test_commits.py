"""What settles an item, and what reopens it; ledger and state agree with the commits however they are cut."""

from __future__ import annotations

import time
import uuid

import pytest

from vidgen.store import commits, epochs, gc, ledger, retry
from vidgen.store import state as states
from vidgen.store.objects import Objects
from vidgen.types import Record


def record(ordinal: int, status: str = "done", generation: int = 0, video: str = "") -> Record:
    return Record(f"{ordinal:032x}", ordinal, status, generation, 1, video=video)


@pytest.fixture
def memory() -> Objects:
    return Objects(f"memory://{uuid.uuid4().hex}")


def test_whoever_commits_first_is_the_truth_for_both(objects: Objects) -> None:
    assert commits.commit(objects, record(1, video="a"), "t1") == (True, record(1, video="a"))
    assert commits.commit(objects, record(1, video="b"), "t2") == (False, record(1, video="a"))


def test_the_state_of_an_item_is_its_commit_in_the_highest_generation_that_lists_it(objects: Objects) -> None:
    commits.commit(objects, record(0), "t")
    commits.commit(objects, record(1, "failed"), "t")
    assert states.load(objects, 3).counts() == {"done": 1, "failed": 1, "quarantined": 0, "pending": 1}
    commits.create_generation(objects, 1, [record(1).item_id], "t")
    assert states.load(objects, 3).counts() == {"done": 1, "failed": 0, "quarantined": 0, "pending": 2}
    commits.commit(objects, record(1, "done", generation=1), "t")
    assert states.load(objects, 3).counts() == {"done": 2, "failed": 0, "quarantined": 0, "pending": 1}


def test_a_generation_is_created_once(objects: Objects) -> None:
    assert commits.create_generation(objects, 1, ["a"], "t1")
    assert not commits.create_generation(objects, 1, ["b"], "t2")
    assert commits.read_generations(objects) == {"a": 1}


def test_the_ledger_spares_the_reading_of_commits_it_names(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(i) for i in range(10)]
    for one in records:
        commits.commit(objects, one, "t")
    ledger.write_part(objects, records[:7])
    read: list[str] = []
    original = Objects.read
    monkeypatch.setattr(Objects, "read", lambda self, path: read.append(path) or original(self, path))
    assert states.load(objects, 10, compact=True).count("done") == 10
    assert sum(path.startswith("commits/") for path in read) == 3
    read.clear()
    assert states.load(objects, 10).count("done") == 10
    assert not [path for path in read if path.startswith("commits/")]


def test_a_damaged_ledger_part_costs_reads_and_loses_nothing(objects: Objects) -> None:
    for ordinal in range(5):
        commits.commit(objects, record(ordinal), "t")
    path = ledger.write_part(objects, [record(i) for i in range(5)])
    objects.put(path, b"not parquet")
    assert states.load(objects, 5).count("done") == 5


def test_attempts_are_counted_from_their_names_alone(objects: Objects) -> None:
    for count, token in ((0.5, "a"), (1.0, "b"), (0.0, "c")):
        commits.record_attempt(objects, commits.Attempt("i" * 32, 2, "item", count, token), {"error": "x"})
    again = commits.Attempt("i" * 32, 2, "item", 1.0, "b")
    commits.record_attempt(objects, again, {"error": "x"})
    assert sum(attempt.count for attempt in commits.read_attempts(objects)) == 1.5


def test_gc_takes_orphans_and_never_what_a_commit_names_or_a_young_pending_object(objects: Objects) -> None:
    ours, orphan = commits.video_path("a" * 32, "1" * 64, "mp4"), commits.video_path("a" * 32, "2" * 64, "mp4")
    pending = commits.video_path("b" * 32, "3" * 64, "mp4")
    for path in (ours, orphan, pending):
        objects.put(path, b"video")
    commits.commit(objects, Record("a" * 32, 0, "done", 0, 1, video=ours), "t")
    swept = gc.collect(objects, older_than=0)
    assert swept.removed == 1
    assert objects.exists(ours) and objects.exists(pending) and not objects.exists(orphan)
    later = gc.collect(objects, older_than=0, now=lambda: time.time() + 3 * 3600)
    assert later.removed == 1 and not objects.exists(pending) and objects.exists(ours)


def test_gc_takes_what_a_start_that_was_killed_asked_of_the_store_once_it_is_old(objects: Objects) -> None:
    for path in ("epochs/.probe-a", "epochs/.clock-b", "epochs/0.json", "epochs/0.beat"):
        objects.put(path, b"x")
    assert gc.collect(objects, older_than=0).temporaries == 0, "somebody may just be asking"
    assert gc.collect(objects, older_than=0, now=lambda: time.time() + 3 * 3600).temporaries == 2
    assert sorted(entry.path for entry in objects.list("epochs")) == ["epochs/0.beat", "epochs/0.json"]


@pytest.mark.parametrize("late", ["commit", "put"])
def test_gc_looks_again_before_each_try_of_a_delete(
    memory: Objects, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """Between two tries minutes may pass, in which a replica puts the same video again and commits it."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    path, clock = commits.video_path("b" * 32, "3" * 64, "mp4"), [time.time() + 3 * 3600]
    memory.put(path, b"video")
    delete, tries = memory.kind.delete, []

    def lost(name: str) -> None:
        tries.append(name)
        if late == "commit":
            commits.commit(memory, Record("b" * 32, 0, "done", 0, 1, video=path), "t")
        else:
            clock[0] = time.time()
        memory.kind.delete = delete  # type: ignore[method-assign]
        raise ConnectionError("lost on the way there")

    memory.kind.delete = lost  # type: ignore[method-assign]
    assert gc.collect(memory, older_than=0, now=lambda: clock[0]).removed == 0
    assert len(tries) == 1 and memory.exists(path)


def unreachable(*arguments: object) -> None:
    """A verb of a store that cannot be reached."""
    raise ConnectionError("lost on the way there")


class LostWhileTrying:
    """A lease that is held at the first look, and another's at the second."""

    asked = 0

    def check(self) -> None:
        self.asked += 1
        if self.asked > 1:
            raise epochs.Held("another took it")


def test_gc_asks_whether_the_run_is_still_its_own_before_each_try_of_a_delete(
    memory: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    memory.put(commits.video_path("b" * 32, "3" * 64, "mp4"), b"video")
    memory.kind.delete = unreachable  # type: ignore[assignment]
    lease = LostWhileTrying()
    with pytest.raises(epochs.Held):
        gc.collect(memory, 0.0, before_delete=lease.check, now=lambda: time.time() + 3 * 3600)
    assert lease.asked == 2


def test_a_ledger_part_of_an_earlier_generation_settles_nothing_and_keeps_no_object(memory: Objects) -> None:
    old, new = (commits.video_path("a" * 32, letter * 64, "mp4") for letter in "12")
    records = [Record("a" * 32, 0, "done", generation, 1, video=path) for generation, path in ((0, old), (1, new))]
    memory.put(old, b"video")
    commits.commit(memory, records[0], "t")
    ledger.write_part(memory, records[:1])
    commits.create_generation(memory, 1, ["a" * 32], "t")
    assert states.load(memory, 1).count("pending") == 1
    memory.put(new, b"video")
    commits.commit(memory, records[1], "t")
    ledger.write_part(memory, records[1:])
    assert states.load(memory, 1).count("done") == 1
    assert gc.collect(memory, 0.0).removed == 1
    assert memory.exists(new) and not memory.exists(old)


def test_an_item_reopened_twice_is_in_its_highest_generation(memory: Objects) -> None:
    for number in (1, 2, 10):
        commits.create_generation(memory, number, [record(0).item_id], "t")
    assert commits.list_generations(memory) == [1, 2, 10]
    assert commits.read_generations(memory) == {record(0).item_id: 10}


def test_a_put_over_something_asks_before_each_try_whether_it_still_may(
    memory: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    memory.put("manifest/part", b"our successor's")
    memory.kind.put = unreachable  # type: ignore[assignment]
    lease = LostWhileTrying()
    with pytest.raises(epochs.Held):
        memory.put("manifest/part", b"ours", lease.check)
    assert lease.asked == 2 and memory.read("manifest/part") == b"our successor's"
