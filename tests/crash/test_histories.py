"""Random histories: commands killed at random fault points, one after another, until somebody lets the run end."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.crash.history import Fault, Job, Server
from tests.crash.test_points import STEPS, watched

SEQUENCES = 300
COMMANDS = (*("generate",) * 5, "retry", "extend", "gc")


@dataclass(frozen=True, slots=True)
class Chapter:
    """One command of a history, what ends it, and whether its replicas outlive it for as long as they have work."""

    command: str
    faults: tuple[Fault, ...]
    linger: bool


def chapters(points: dict[str, list[tuple[str, str]]]) -> st.SearchStrategy[list[Chapter]]:
    def chapter(command: str) -> st.SearchStrategy[Chapter]:
        fault = st.builds(lambda at, count: Fault(*at, count), st.sampled_from(points[command]), st.integers(1, 3))
        faults = st.lists(fault, min_size=1, max_size=2).map(tuple)
        return st.builds(Chapter, st.just(command), faults, st.booleans())

    return st.lists(st.sampled_from(COMMANDS).flatmap(chapter), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def passed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Command -> each (role, point) that it passes in a whole history."""
    folder = tmp_path_factory.mktemp("watched")
    found: dict[str, list[tuple[str, str]]] = {}
    for at, steps in watched(Job(server, folder / "job"), folder / "kept").items():
        for command in sorted({STEPS[step][1].__name__ for step in steps}):
            found.setdefault(command, []).append(at)
    return found


def live(job: Job, chapter: Chapter) -> None:
    """One command. It ends well, or by its fault, or because there is no run yet."""
    planned = (job.output / "plan/0/PLAN.json").exists()
    code = getattr(job, chapter.command)(faults=chapter.faults, linger=chapter.linger).wait()
    allowed = {0, 3, -9} if planned or chapter.command == "generate" else {0, 2, -9}
    assert code in allowed, f"{chapter}: exit {code}\n{job.log()}"


def tell(job: Job, chapters: list[Chapter]) -> None:
    for chapter in chapters:
        live(job, chapter)
    job.finish()
    job.check_end()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_history_of_kills_ends_with_the_manifest_of_the_plan(
    server: Server, passed: dict[str, list[tuple[str, str]]], tmp_path: Path, hits: Counter[str]
) -> None:
    numbers = itertools.count()

    @settings(
        max_examples=SEQUENCES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(chapters(passed))
    def holds(drawn: list[Chapter]) -> None:
        job = Job(server, tmp_path / str(next(numbers)))
        tell(job, drawn)
        hits.update(f"{fault.role}: {fault.point}" for fault in job.fired())

    holds()
    told = next(numbers)
    print(f"\n{told} histories, {sum(hits.values())} faults fired")
    assert told >= SEQUENCES
    assert sum(hits.values()) >= SEQUENCES, "too many histories in which nothing happened"
