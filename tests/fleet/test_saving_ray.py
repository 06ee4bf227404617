"""A run that is interrupted in the middle of an item, on real Ray, goes on from there: alone, and as a gang."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fleet.inline import write_prompts
from tests.fleet.test_determinism import digests
from tests.fleet.test_gang_generate import frames, psnr
from tests.models.wan.tiny_checkpoint import build
from vidgen.report.verify import verify
from vidgen.store import resume
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
STEPS = 900
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def command(folder: Path, output: Path, *overrides: str) -> list[str]:
    config = folder / "job.yaml"
    if not config.exists():
        checkpoint = build(folder / "wan")
        config.write_text(
            f"model: {{family: wan, checkpoint: {checkpoint}}}\n"
            f"dataset: {{path: {write_prompts(folder / 'p.parquet', ['a red circle'])}}}\n"
            f"sampling: {{height: 32, width: 32, num_frames: 5, num_inference_steps: {STEPS}}}\n"
            "engine: {threads: 1}\noutput: {path: none, format: png}\n"
            "run: {allow_constant: true, save_after: 0, save_every: 0.2}\n"
        )
    job = [sys.executable, "-m", "vidgen.cli", "generate", str(config), "--no-report", f"output.path={output}"]
    return [*job, *overrides]


def start(folder: Path, output: Path, *overrides: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command(folder, output, *overrides), stdout=log, stderr=log, env=environment, cwd=ROOT)


def test_an_interrupted_item_goes_on_alone_bit_for_bit_and_as_a_gang_within_rounding(tmp_path: Path) -> None:
    whole, alone, gang = (tmp_path / name for name in ("whole", "alone", "gang"))
    assert start(tmp_path, whole).wait(400) == 0, whole.with_suffix(".log").read_text()
    process, objects = start(tmp_path, alone), Objects(str(alone))
    while not list(resume.list_saved(objects)):
        assert process.poll() is None, alone.with_suffix(".log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, alone.with_suffix(".log").read_text()
    assert len(list(resume.list_saved(objects))) == 1
    shutil.copytree(alone / "resume", gang / "resume")  # the same item, by its id, in a run of its own
    for output, mesh in ((alone, ()), (gang, ("parallel.context=2",))):
        assert start(tmp_path, output, *mesh).wait(400) == 0, output.with_suffix(".log").read_text()
        said = re.search(r"goes on after step (\d+) of", output.with_suffix(".log").read_text())
        assert said is not None and 0 < int(said[1]) < STEPS
        assert verify(str(output)).ok and not list(Objects(str(output)).list("resume"))
    assert digests(str(alone)) == digests(str(whole))
    (one,), (two,) = frames(whole).values(), frames(gang).values()
    assert psnr(two, one) > 50.0, "sums of floats in another order, rounded to eight bits"
