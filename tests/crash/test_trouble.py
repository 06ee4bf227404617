"""A disk that is full, forbidden or shaky under one write: clear words, nothing charged to a row, nothing lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.crash import points
from tests.crash.history import Fault, Job, Server
from tests.crash.test_points import watched
from vidgen.store import commits

WORDS = {
    "ENOSPC": "the disk is full; make room and start again: No space left on device (ENOSPC)",
    "EACCES": "permission is missing to read and write below the output: Permission denied (EACCES)",
}
REFUSED = 2


WRITES = points.by_file()["store/local.py"]
"""The points at which a local disk is written."""


def writes_of(who: str, server: Server, folder: Path) -> list[str]:
    """Those that a driver, or a replica, passes in a run."""
    passed = watched(Job(server, folder / "watched"), folder / "kept", steps=1)
    return [point for point in WRITES if (who, point) in passed]


@pytest.mark.parametrize("errno", [*WORDS, "EIO"])
def test_a_replica_whose_write_fails_makes_the_item_again_and_charges_nobody(
    server: Server, tmp_path: Path, errno: str, hits: Counter[str]
) -> None:
    for point in writes_of("replica", server, tmp_path):
        job = Job(server, tmp_path / point)
        life = job.generate("--no-report", faults=[Fault("replica", point, action=errno)])
        assert life.gone() == 3, job.log()
        assert len(job.fired()) == 1
        hits[f"replica: {point} {errno}"] += 1
        charged = Counter(attempt.item_id for attempt in commits.read_attempts(job.objects) if attempt.count)
        assert len(charged) == 1, "only the row that always fails has failed"
        job.finish()
        job.check_end()


@pytest.mark.parametrize("errno", WORDS)
def test_a_driver_that_cannot_write_stops_with_the_reason_and_the_next_one_goes_on(
    server: Server, tmp_path: Path, errno: str, hits: Counter[str]
) -> None:
    for point in writes_of("driver", server, tmp_path):
        for count in range(1, 8):
            job = Job(server, tmp_path / f"{point}-{count}")
            life = job.generate("--no-report", faults=[Fault("driver", point, count, action=errno)])
            code = life.gone()
            if not job.fired():
                break
            hits[f"driver: {point} {errno}"] += 1
            assert code == REFUSED, f"{point} {count}: exit {code}\n{job.log()}"
            said = job.log().split("error: ", 1)[1]
            assert WORDS[errno].split(":")[0] in said or "cannot be written" in said, job.log()
            assert "Traceback" not in job.log()
            job.finish()
            job.check_end()


def test_a_driver_whose_disk_is_shaky_once_goes_on(server: Server, tmp_path: Path, hits: Counter[str]) -> None:
    job = Job(server, tmp_path / "job")
    life = job.generate("--no-report", faults=[Fault("driver", point, 2, action="EIO") for point in WRITES])
    assert life.gone() == 3, job.log()
    assert job.fired()
    hits.update(f"driver: {fault.point} EIO" for fault in job.fired())
    job.finish()
    job.check_end()
