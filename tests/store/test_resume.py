"""What a resume costs: one LIST per thousand commits, one GET per commit that no ledger part names, and no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.store.proxy import Proxy
from vidgen.store import commits, ledger
from vidgen.store import state as states
from vidgen.store.objects import Objects
from vidgen.types import Record

ROOT = Path(__file__).parents[2]
COMMITS, LEDGERED, PARTS, PAGES = 1_040, 1_000, 2, 2


def record(ordinal: int, generation: int = 0) -> Record:
    return Record(f"{ordinal * 7919 % 256:02x}{ordinal:030x}", ordinal, "done", generation, 1, video="v")


@pytest.fixture
def committed(moto: str, s3_at: Callable[[str], str], proxy: Proxy) -> Objects:
    """A run of 1,040 commits, of which two ledger parts name 1,000, seen through a proxy that counts."""
    objects = Objects(s3_at(proxy.url))
    direct = objects.kind.fs.__class__(endpoint_url=moto, key="a", secret="b")  # type: ignore[attr-defined]
    records = [record(ordinal) for ordinal in range(COMMITS)]

    def write(one: Record) -> None:
        path = objects.path(commits.commit_path(0, one.item_id))
        direct.pipe_file(path, json.dumps({**one.to_dict(), "token": "t"}).encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, records))
    for part in range(PARTS):
        ledger.write_part(objects, records[:LEDGERED][part::PARTS])
    proxy.forget()
    return objects


def test_a_resume_costs_a_list_a_thousand_commits_and_a_get_a_commit_that_no_part_names(
    committed: Objects, proxy: Proxy
) -> None:
    assert states.load(committed, COMMITS).count("done") == COMMITS
    assert {one.method for one in proxy.seen} == {"GET"}, "a reader writes nothing"

    proxy.forget()
    held = states.load(committed, COMMITS + 5, compact=True)
    assert held.counts() == {"done": COMMITS, "failed": 0, "quarantined": 0, "pending": 5}
    assert proxy.count("GET", r"list-type.*commits%2Fg0") == PAGES, "a page holds a thousand"
    assert proxy.count("GET", r"/commits/g0/../") == COMMITS - LEDGERED
    assert proxy.count("GET", r"/ledger/.*parquet") == PARTS
    assert proxy.count("GET", r"list-type.*generations") == 1 and proxy.count("GET", r"list-type.*ledger") == 1
    assert proxy.count("PUT") == 1, "what no part named is a part now"
    assert len(proxy.seen) == PAGES + (COMMITS - LEDGERED) + PARTS + 2 + 1

    proxy.forget()
    assert states.load(committed, COMMITS + 5, compact=True).count("done") == COMMITS
    assert len(proxy.seen) == PAGES + (PARTS + 1) + 2, "the next resume reads no commit at all"


def test_the_benchmark_of_a_resume_prints_seconds_requests_and_memory() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), "resume", "--commits", "300", "--loose", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"20 commits in no ledger part: .* commits/s, peak RSS \d+ MiB .*: 1 put, 21 read", done.stdout)
    assert re.search(r"no ledger: .*: 1 put, 300 read", done.stdout), done.stdout
