"""A replica by itself: what it refuses, how it classes failures, what it leaves behind."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fleet.inline import config_for, settings_for, write_prompts
from vidgen.errors import CapacityError, ConfigError, InfrastructureError, ItemError
from vidgen.fleet.events import Work
from vidgen.fleet.failures import classify, describe
from vidgen.fleet.replica import Worker
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.store import commits
from vidgen.store.objects import Objects


def worker(tmp_path: Path) -> Worker:
    output = str(tmp_path / "out")
    objects = Objects(output)
    objects.put("epochs/probe", b"seen")
    return Worker("r0", "node", settings_for(config_for("unused", output), objects))


def test_a_replica_that_does_not_see_the_drivers_store_refuses_to_start(tmp_path: Path) -> None:
    blind = worker(tmp_path)
    blind.settings = replace(blind.settings, probe=("epochs/probe", "something else"))
    with pytest.raises(ConfigError, match="does not see what the driver wrote"):
        blind.start()


def test_scratch_of_dead_processes_is_swept_and_ones_own_is_removed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    (tmp_path / "tmp").mkdir()
    first = worker(tmp_path)
    first.start()
    assert first._scratch is not None
    root = first._scratch.parent
    dead = root / f"{socket.gethostname()}_{process.pid}_12345_aa"
    elsewhere = root / f"another-host_{process.pid}_12345_aa"
    for folder in (dead, elsewhere):
        folder.mkdir()
        (folder / "half.mp4").write_bytes(b"half")
    second = worker(tmp_path)
    second.start()
    assert not dead.exists() and elsewhere.exists() and first._scratch.exists()
    for one in (first, second):
        one.close()
    assert [path.name for path in root.iterdir()] == [elsewhere.name]


def test_what_waits_is_given_back_and_what_is_in_hand_is_committed(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = config_for(
        write_prompts(tmp_path / "p.parquet", 2), output, sampling__params__step_seconds=0.3, output__format="png"
    )
    objects = Objects(output)
    plan = build(config, objects).plan
    objects.put("epochs/probe", b"seen")
    one = Worker("r0", "node", replace(settings_for(config, objects), codec="png"))
    one.start()
    first, second = (Work(item, 0, 1) for item in read_items(objects, plan, plan.parts[0]))
    one.submit(1, (first,))
    while one.poll(0.05).stage == "idle":
        pass
    one.submit(2, (second,))
    one.recall()
    one.close()
    events = one.poll(0.0).events
    assert [type(event).__name__ for event in events] == ["BatchReturned", "BatchGenerated", "ItemDone"]
    assert list(commits.list_commits(objects, 0)) == [first.item.item_id]


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        (ItemError("black"), "item"),
        (ValueError("anything else"), "item"),
        (CapacityError("out of memory"), "capacity"),
        (MemoryError(), "capacity"),
        (InfrastructureError("503"), "infrastructure"),
        (ConnectionResetError("peer"), "infrastructure"),
        (TimeoutError("late"), "infrastructure"),
        (OSError(errno.ENOSPC, "No space left on device"), "infrastructure"),
    ],
)
def test_each_failure_has_its_class(error: Exception, error_class: str) -> None:
    assert classify(error) == error_class


def test_a_failure_is_told_in_one_line_with_its_type_unless_it_is_ours() -> None:
    assert describe(ItemError("the clip\n is black")) == "the clip is black"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(ItemError("frame \x1b[2J.png is damaged")) == r"frame \x1b[2J.png is damaged"
