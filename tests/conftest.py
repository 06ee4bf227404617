"""Before torch is first imported: one thread a process, and no spinning. Two processes that spin on two cores slow each
other tenfold; results are bit for bit at a fixed number of threads."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"

REAL_PROCESSES = ("_ray.py", "test_ray.py", "test_running.py", "test_gang_generate.py", "test_benchmark.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with clusters and processes of their own get a second try, which the summary counts ("rerun"): on a loaded
    machine Ray's time limits strike, not ours. What is broken fails twice."""
    for item in items:
        if item.path.name.endswith(REAL_PROCESSES) or item.path.parent.name == "crash":
            item.add_marker(pytest.mark.flaky(reruns=1))
