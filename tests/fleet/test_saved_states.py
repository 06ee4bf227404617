"""Killed before and after a half denoised item is saved, and before and after its state is deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crash import points
from tests.fleet.inline import drive
from tests.fleet.test_determinism import digests
from tests.fleet.test_saving import job
from tests.models.wan.tiny_checkpoint import build
from vidgen import faults
from vidgen.config import to_dict
from vidgen.report.repair import collect
from vidgen.report.verify import verify
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
DRIVE = """
import json, sys
from tests.fleet.inline import drive
from vidgen import config
drive(config.from_dict(json.loads(sys.argv[1]), "test"), replicas=1)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wan"))


@pytest.mark.slow
def test_a_run_killed_around_a_saved_state_ends_with_the_same_bytes_and_no_state(
    tmp_path: Path, checkpoint: Path
) -> None:
    """Each step is saved, so every point is passed by a plain run."""

    def config(name: str) -> Any:
        (tmp_path / name).mkdir()
        return job(tmp_path / name, checkpoint, rows=2, save_every=0.001)

    whole = config("whole")
    assert drive(whole, replicas=1)[0].code == 0
    for point in points.by_file()["fleet/saving.py"]:
        killed = config(point)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), faults.VARIABLE: f"{point}:1:kill"}
        command = [sys.executable, "-c", DRIVE, json.dumps(to_dict(killed))]
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=240, check=False)
        assert ended.returncode == -9, (point, ended.stderr.decode())
        print(f"{point}: killed once")
        assert drive(killed, replicas=1)[0].code == 0, point
        collect(killed.output.path, older_than=0)
        verdict = verify(killed.output.path, strict=True)
        assert verdict.ok, (point, verdict.problems)
        assert digests(killed.output.path) == digests(whole.output.path), point
        assert not list(Objects(killed.output.path).list("resume")), point
