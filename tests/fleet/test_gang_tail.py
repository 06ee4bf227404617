"""The simulation of the last items: what it may say, and that it prints its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.benchmarks.ending import drain

PATH = Path(__file__).parents[2] / "jobs" / "benchmark.py"


@settings(deadline=None)
@given(st.lists(st.floats(1, 1000), min_size=1, max_size=60), st.integers(1, 16), st.floats(0, 100))
def test_no_end_comes_before_the_work_allows_it(costs: list[float], gpus: int, load: float) -> None:
    single, none = drain(costs, gpus, load, 1.0, largest=1)
    merged, _ = drain(costs, gpus, load, 1.0, largest=8)
    assert none == 0
    for end, degree in ((single, 1), (merged, 8)):
        assert end >= load + max(sum(costs) / gpus, max(costs) / degree) - 1e-6
    assert single <= load + sum(costs) / gpus + max(costs), "longest first is never worse than that"
    assert merged <= single + 1e-6, "a gang is built only where it ends sooner"


def test_the_last_item_of_many_equal_ones_is_shared_and_a_full_wave_is_not() -> None:
    assert drain([100.0] * 8, 8, 10.0, 0.64, largest=8) == (110.0, 0)
    end, gangs = drain([100.0] * 9, 8, 10.0, 1.0, largest=8)
    assert gangs == 1 and end == pytest.approx(110 + 10 + 100 / 8)
    assert drain([100.0] * 9, 8, 10.0, 1.0, largest=1)[0] == 210.0
    assert drain([100.0], 8, 1000.0, 1.0, largest=8) == (1100.0, 0), "loading longer than it would save"


def test_the_table_says_what_it_is_and_what_it_assumes() -> None:
    done = subprocess.run([sys.executable, str(PATH), "gangs"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, _, *rows = done.stdout.splitlines()
    assert "simulated" in first and "64% efficient" in first and "60 s to load" in first
    assert len(rows) == 20 and all("%" in row for row in rows)
