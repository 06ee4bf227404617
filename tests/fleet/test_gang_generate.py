"""`vidgen generate` with gangs of a real model: the frames of one process, and each shape by the replicas it needs."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.models.wan.tiny_checkpoint import build
from vidgen import manifest
from vidgen.demo.measure import judge
from vidgen.report.verify import verify
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def generate(config: Path | str, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vidgen.cli", "generate", str(config), "--no-report", f"output.path={output}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*command, "output.format=png", *overrides],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=ROOT,
    )


def rows(output: Path) -> list[dict[str, object]]:
    return [row for table in manifest.read(Objects(str(output))) for row in table.to_pylist()]


def frames(output: Path) -> dict[str, np.ndarray]:
    """uint8 [F, H, W, 3] of each row."""
    found = {}
    for row in rows(output):
        with zipfile.ZipFile(io.BytesIO((output / str(row["video"])).read_bytes())) as file:
            pictures = [np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in sorted(file.namelist())]
        found[str(row["row_id"])] = np.stack(pictures)
    return found


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return 10 * np.log10(255**2 / error) if error else float("inf")


def test_the_demo_as_it_ships_made_by_a_gang_shows_what_one_process_shows(tmp_path: Path) -> None:
    """All steps of the configuration; four of its prompts."""
    options = ("parallel.replicas=1", "dataset.limit=4", "engine.threads=1")
    alone, gang = tmp_path / "alone", tmp_path / "gang"
    for output, context in ((alone, 1), (gang, 2)):
        done = generate("configs/demo.yaml", output, *options, f"parallel.context={context}")
        assert done.returncode == 0, done.stderr
        assert {row["context"] for row in rows(output)} == {context}
    ours, theirs = frames(gang), frames(alone)
    assert ours.keys() == theirs.keys() and len(ours) == 4
    found = {name: psnr(ours[name], theirs[name]) for name in ours}
    print("PSNR:", sorted(found.values()))
    assert min(found.values()) > 50.0, found
    prompts = {str(row["row_id"]): str(row["prompt"]) for row in rows(gang)}
    for name, prompt in prompts.items():
        seen, before = (judge(clips[name]) for clips in (ours, theirs))
        said = f"{seen.colour} {seen.shape} moving {seen.direction}"
        assert said == f"{before.colour} {before.shape} moving {before.direction}"
        assert said in prompt, "and it is what was asked for"


@pytest.mark.parametrize("mesh", ["context=2", "cfg=2"])
def test_the_demo_made_by_a_gang_is_the_demo_made_by_one(tmp_path: Path, mesh: str) -> None:
    options = ("parallel.replicas=1", "dataset.limit=2", "sampling.num_inference_steps=4", "engine.threads=1")
    alone, gang = tmp_path / "alone", tmp_path / "gang"
    for output, more in ((alone, ()), (gang, (f"parallel.{mesh}",))):
        done = generate("configs/demo.yaml", output, *options, *more)
        assert done.returncode == 0, done.stderr
        assert verify(str(output)).ok
    assert {row["context"] for row in rows(gang)} == {2 if "context" in mesh else 1}
    ours, theirs = frames(gang), frames(alone)
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for name in ours:
        assert psnr(ours[name], theirs[name]) > 50.0, "sums of floats in another order, rounded to eight bits"


def test_short_shapes_go_to_one_process_and_long_ones_to_a_gang(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["a red circle", "the cat"] * 3, "frames": [5, 5, 17, 5, 17, 5]}), tmp_path / "p.parquet"
    )
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{family: wan, checkpoint: {build(tmp_path / 'wan')}}}\n"
        f"dataset: {{path: {tmp_path / 'p.parquet'}, columns: {{prompt: prompt, num_frames: frames}}}}\n"
        "sampling: {height: 32, width: 32, num_inference_steps: 2}\n"
        "parallel: {by_shape: [{tokens_above: 10, context: 2}]}\n"
        "run: {allow_constant: true}\n"
    )
    done = generate(config, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 replica, 1 gang of 2" in done.stderr
    assert verify(str(tmp_path / "out")).ok
    assert {(row["num_frames"], row["context"]) for row in rows(tmp_path / "out")} == {(5, 1), (17, 2)}


def test_degree_auto_gives_a_single_item_the_cores_that_would_be_idle(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["the cat"]}), tmp_path / "p.parquet")
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{family: wan, checkpoint: {build(tmp_path / 'wan')}}}\n"
        f"dataset: {{path: {tmp_path / 'p.parquet'}}}\n"
        "sampling: {height: 32, width: 32, num_frames: 9, num_inference_steps: 2}\n"
        "parallel: {degree: auto, gpu: L4}\n"
        "run: {allow_constant: true}\n"
    )
    done = generate(config, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert "parallel.degree: auto: 32x32, 9 frames, 2 steps" in told
    room = re.search(r"1 items, and room for (\d+) ranks", told)
    cores = int(room[1]) if room else 1
    assert verify(str(tmp_path / "out")).ok
    (row,) = rows(tmp_path / "out")
    assert row["context"] == (1 if cores < 2 else 2 if cores < 4 else 4 if cores < 8 else 8)


def test_a_family_that_runs_on_one_gpu_refuses_a_gang_at_the_start(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "p.parquet")
    config = tmp_path / "job.yaml"
    config.write_text(f"model: {{family: testcard}}\ndataset: {{path: {tmp_path / 'p.parquet'}}}\n")
    done = generate(config, tmp_path / "out", "parallel.context=2")
    assert done.returncode == 2
    assert "testcard runs on one GPU" in done.stderr
