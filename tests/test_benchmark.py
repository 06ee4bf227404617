"""The benchmarks run and print what they measured; what they measured is for a reader to judge."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def benchmark(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_is_measured_in_rows_a_second_and_peak_memory() -> None:
    printed = benchmark("plan", "--rows", "3000")
    assert re.search(r"plan: 3,000 rows in .* rows/s, peak RSS [\d,]+ MiB", printed), printed
    assert re.search(r"read: 3,000 items", printed), printed
    assert re.search(r"manifest: 3,000 rows of 1 ledger parts in .* rows/s, peak RSS", printed), printed


def test_dispatch_is_measured_in_items_a_second_with_commits() -> None:
    printed = benchmark("dispatch", "--items", "200")
    assert re.search(r"vidgen: 200 items, [\d,]+ items/s with commits", printed), printed
    assert "ray data:" in printed


def test_attention_kernels_are_measured_where_there_is_a_gpu_and_refused_where_there_is_none() -> None:
    printed = benchmark("attention", "--device", "cpu", "--tokens", "64", "--repeats", "2")
    found = re.findall(r"(FLASH_ATTENTION|MATH) +\d+ x +\d+ +(\S+) +(\S+)", printed)
    assert {kernel for kernel, *_ in found} == {"FLASH_ATTENTION", "MATH"}, printed
    assert all(float(lse) < 1e-4 and float(out) < 1e-4 for _, lse, out in found), printed
    assert len(re.findall("a gang of one .* ratio", printed)) == 3
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), "attention"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "needs a CUDA GPU" in done.stderr
