"""A week of ticks in which everything happens that happens to a schedule: rows in are rows out, each made once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.scheduled.schedule import Scheduled, write
from vidgen.scheduled.tick import Report
from vidgen.store import epochs

SLOW = {"params": {"step_seconds": 0.05}}
KILLED = """
import sys
from pathlib import Path
from tests.scheduled.schedule import Scheduled
job = Scheduled(Path(sys.argv[1]))
job.dataset["columns"] = {"prompt": "prompt", "priority": "rank"}
job.tick(sampling={"params": {"step_seconds": 0.05}})
"""


def rows(day: str, count: int) -> dict[str, str]:
    return {f"{day}{number:02d}": f"{day}, number {number}" for number in range(count)}


def deliver(job: Scheduled, name: str, given: dict[str, str], rank: int = 0) -> None:
    write(job.source / name, given, rank=[rank] * len(given))


def committed(folder: Path) -> int:
    return sum(not path.name.startswith(".") for path in folder.rglob("commits/**/*.json"))


def killed_half_way(folder: Path, run: Path) -> int:
    """A tick in a process of its own, killed with SIGKILL after its third commit; how many there are."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parents[2])
    while process.poll() is None and committed(run) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return committed(run)


@pytest.mark.slow
def test_a_week_of_late_rewritten_overlapping_killed_and_capped_ticks_makes_every_row_once(tmp_path: Path) -> None:
    job = Scheduled(tmp_path)
    job.dataset["columns"] = {"prompt": "prompt", "priority": "rank"}
    given: dict[str, str] = {}
    account: list[str] = []

    def told(day: str, what: str, report: Report | None) -> None:
        line = f"{day}  in {len(given):3}  out {len(job.made()) if report else 0:3}  {what}"
        if report is not None:
            tally = report.rows
            line += f"; exit {report.exit}, run {report.run}, new {tally.new}, same {tally.same}, left {report.waiting}"
        account.append(line)

    def delivered(name: str, new: dict[str, str], rank: int = 0) -> None:
        deliver(job, name, new, rank)
        given.update(new)

    delivered("day=1/a.parquet", rows("mon", 8))
    told("mon", "a delivery", job.tick())

    delivered("day=2/a.parquet", rows("tue", 6))
    delivered("day=0/late.parquet", rows("late", 3))
    report = job.tick()
    assert report.items == 9
    told("tue", "a late partition before the others", report)

    delivered("day=3/a.parquet", rows("wed", 24))
    before = killed_half_way(tmp_path, job.output / "runs/2")
    assert 3 <= before < 24
    account.append(f"wed  in {len(given):3}  killed with SIGKILL after {before} of 24 commits")

    both = {**rows("thu", 4), **rows("mon", 8), **rows("more", 2)}
    with pq.ParquetWriter(job.source / "day=1/a.parquet", pq.read_schema(job.source / "day=1/a.parquet")) as file:
        for part in (rows("thu", 4), rows("mon", 8), rows("more", 2)):
            file.write_table(pa.table({"id": list(part), "prompt": list(part.values()), "rank": [0] * len(part)}))
    given.update(both)
    report = job.tick()
    assert [driven.run for driven in report.driven] == [2, 3] and report.items == 6
    told("thu", "monday's file rewritten with rows before and after its own; wednesday's run finished first", report)

    delivered("day=5/a.parquet", rows("fri", 7))
    inside: list[Report] = []

    def meanwhile() -> None:
        job.runs.before = lambda: None
        with pytest.raises(epochs.Held):
            job.tick()
        delivered("day=5/b.parquet", rows("noon", 2))
        inside.append(job.tick(overlap="join", drive=job.runs))

    job.runs.before = meanwhile
    report = job.tick()
    assert (report.items, inside[0].items) == (7, 2)
    told("fri", "a second tick meanwhile was skipped, a third joined with two more rows", report)

    delivered("day=6/a.parquet", rows("sat", 30))
    delivered("day=6/b.parquet", rows("vip", 2), rank=9)
    deliver(job, "day=6/c.parquet", {"mon00": "mon, corrected"})
    report = job.tick(sampling=SLOW, run={"max_gpu_hours": 0.4 / 3600})
    assert (report.exit, report.waiting, report.rows.changed) == (5, [6], 1)
    made = {row for row, *_ in job.made()}
    assert set(rows("vip", 2)) <= made and not set(rows("sat", 30)) <= made, "the highest priority first"
    told("sat", "a budget of 0.4 s, two rows of priority 9; a corrected row left as it was made", report)

    delivered("day=7/a.parquet", rows("sun", 3))
    report = job.tick()
    assert [driven.run for driven in report.driven] == [6, 7] and report.exit == 0
    told("sun", "what saturday left, then its own", report)
    empty = job.tick()
    assert (empty.run, empty.driven, empty.counts["pending"]) == (None, [], 0)
    told("sun", "nothing new", empty)

    print("\n".join(["", *account]))
    assert [(row, prompt) for row, prompt, _ in job.made()] == sorted(given.items())
    assert committed(job.output / "runs") == len(given), "each was made once"
    job.prove()
