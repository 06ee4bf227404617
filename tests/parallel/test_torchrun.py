"""A gang without Ray, as a user starts one: torchrun, on the demo checkpoint."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen import engine

ASKED = ("a red circle moving left", "--seed", "7", "--steps", "2")


def start(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, "-m", "vidgen.engine", *arguments], capture_output=True, text=True, timeout=240, env=environment
    )


def frames(archive: Path) -> np.ndarray:
    with zipfile.ZipFile(archive) as opened:
        return np.stack([np.asarray(Image.open(opened.open(name))) for name in sorted(opened.namelist())])


def test_two_processes_of_torchrun_make_the_video_of_one(tmp_path: Path) -> None:
    together, single = tmp_path / "together.zip", tmp_path / "single.zip"
    done = start(*ASKED, "--out", str(together), "--context", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("frames,") == 1, "rank 0 alone writes and speaks"
    assert engine.main([*ASKED, "--out", str(single)]) == 0
    one, two = frames(single).astype(float), frames(together).astype(float)
    error = ((one - two) ** 2).mean()
    assert one.shape == two.shape and one.std() > 5
    assert error == 0 or 10 * math.log10(255**2 / error) > 50


def test_processes_and_mesh_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        engine.main([*ASKED, "--out", str(tmp_path / "x.mp4"), "--context", "2"])
    assert ended.value.code == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
