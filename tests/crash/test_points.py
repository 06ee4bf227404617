"""Every fault point kills its process once, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash import points
from tests.crash.history import ROOT, Fault, Job, Life, Server
from vidgen import faults, manifest
from vidgen.store import commits

FILES_ELSEWHERE = {"scheduled/": "test_schedule.py", "store/s3.py": "../store/test_torn_uploads.py"}
POINTS_ELSEWHERE = {
    **dict.fromkeys(("stop", "video again"), "test_drivers.py"),
    **dict.fromkeys(("state saved", "state forgotten"), "../fleet/test_saved_states.py"),
}
"""What a small job on a disk never passes, and the file whose test does."""

Step = tuple[Callable[[Job], None], Callable[..., Life]]


def nothing(job: Job) -> None:
    pass


def an_orphan(job: Job) -> None:
    """As a replica leaves it that lost the race for an item's commit."""
    item_id = next(commits.list_commits(job.objects, 0))
    job.objects.put(f"data/{item_id[:2]}/{item_id}-0123456789ab.zip", b"nobody names this")


def an_old_success(job: Job) -> None:
    job.objects.put(manifest.SUCCESS, json.dumps({"plan": 0, "generation": 0, "parts": {}}).encode())


STEPS: list[Step] = [
    (nothing, Job.generate),
    (nothing, Job.retry),
    (nothing, Job.generate),
    (nothing, Job.extend),
    (nothing, Job.generate),
    (an_orphan, Job.gc),
    (an_old_success, Job.generate),
]
"""A history in which a run meets everything: rows that fail, a retry, a wider plan, an orphan, a wrong _SUCCESS."""


def watched(job: Job, kept: Path, steps: int | None = None) -> dict[tuple[str, str], list[int]]:
    """(role, point) -> the steps that pass it, with the output as it was before each step in `kept`."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, (prepare, command) in enumerate(STEPS[:steps]):
        prepare(job)
        job.snapshot(kept / str(number))
        job.since = len(job.lives)
        assert command(job, watch=True).gone() in (0, 3), job.log()
        for at in sorted({(role, point) for _, role, point in job.trail("point")}):
            found.setdefault(at, []).append(number)
    return found


def test_every_act_that_changes_the_store_stands_between_two_fault_points() -> None:
    assert points.bare_acts() == []
    assert len(points.all_points()) > 40


def test_each_point_kills_once_and_the_run_still_ends_whole(server: Server, tmp_path: Path, hits: Counter[str]) -> None:
    job = Job(server, tmp_path / "job")
    passed = watched(job, tmp_path / "kept")
    for (role, point), (step, *_) in sorted(passed.items()):
        job.restore(tmp_path / "kept" / str(step))
        command = STEPS[step][1]
        code = command(job, faults=[Fault(role, point)]).gone()
        assert job.fired() == [Fault(role, point)], f"{role} did not pass {point} again"
        hits[f"{role}: {point}"] += 1
        if role == "driver":
            assert code == -9
            assert command(job).gone() in (0, 3), job.log()
        job.finish()
        job.check_end()
    here = {
        point
        for file, found in points.by_file().items()
        for point in found
        if not file.startswith(tuple(FILES_ELSEWHERE)) and point.split(".")[0] not in POINTS_ELSEWHERE
    }
    assert {point for _, point in passed} == here


def run(code: str, armed: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), faults.VARIABLE: armed}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


PASSES = """
from vidgen import faults
for number in range(3):
    with faults.around("act"):
        print(number, flush=True)
"""


def test_a_point_acts_at_the_asked_time_and_once_for_a_mark(tmp_path: Path) -> None:
    assert run(PASSES, "").stdout.split() == ["0", "1", "2"]
    killed = run(PASSES, "act.after:2:kill")
    assert (killed.returncode, killed.stdout.split()) == (-9, ["0", "1"])
    armed = f"other.before:1:kill,act.before:1:kill:{tmp_path / 'mark'}"
    assert run(PASSES, armed).returncode == -9
    assert run(PASSES, armed).returncode == 0


def test_a_point_can_fail_as_a_full_disk_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "a full disk.before:1:ENOSPC")
    with pytest.raises(OSError, match="No space left on device"), faults.around("a full disk"):
        raise AssertionError("the act was done although it was to fail before")
