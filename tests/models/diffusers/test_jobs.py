"""Each recipe in configs/ as a whole job on a tiny checkpoint: Parquet in, videos or gifs out, verify 0."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.fleet import inline
from tests.models.diffusers.conftest import clip, picture, png
from vidgen import config as configuration
from vidgen.report.verify import verify

ROOT = Path(__file__).parents[3]
SIZE = {"sampling.height": 16, "sampling.width": 24, "sampling.num_inference_steps": 3, "sampling.seed": 5}
CLIP = {"sampling.num_frames": 4}

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "svd-xt": ("svd_xt", {}),
    "animatediff": ("sd", {"sampling.num_frames": 6, "model.options.components.motion_adapter": "motion_adapter"}),
    "i2vgenxl": ("i2vgen_xl", CLIP),
    "text2video-zero": ("sd", {**CLIP, "sampling.num_inference_steps": 8, "sampling.params": "{t0: 3, t1: 5}"}),
    "text2video-zero-canny": ("sd", {**CLIP, "model.options.components.controlnet": "controlnet"}),
    "text2video-zero-pose": ("sd", {**CLIP, "model.options.components.controlnet": "controlnet"}),
    "text2video-zero-instruct": ("ip2p", CLIP),
}
"""Recipe -> the tiny checkpoint it runs on, and what makes it tiny."""


def rows(place: Path, columns: dict[str, str], frames: int) -> None:
    """Two rows, with a picture and a clip each where the recipe maps a column of them."""
    values: dict[str, list[Any]] = {columns["prompt"]: ["a red circle", "a blue square"]}
    if "image" in columns:
        values[columns["image"]] = [png(picture(16, 24, shade)) for shade in (0, 4)]
    if "video" in columns:
        (place.parent / "clip.zip").write_bytes(clip(frames, 16, 24)[1])
        values[columns["video"]] = ["clip.zip", "clip.zip"]
    pq.write_table(pa.table(values), place)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_every_row_of_a_dataset(recipe: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    name, changes = RECIPES[recipe]
    overrides = {**SIZE, **changes, "model.checkpoint": checkpoint(name), "model.dtype": "float32"}
    overrides |= {"dataset.path": tmp_path / "rows.parquet", "output.path": tmp_path / "out"}
    for key, value in overrides.items():
        if key.startswith("model.options.components."):
            overrides[key] = checkpoint(value)
    config = configuration.load(
        str(ROOT / f"configs/{recipe}.yaml"), [f"{key}={value}" for key, value in overrides.items()]
    )
    rows(tmp_path / "rows.parquet", config.dataset.columns, config.sampling.num_frames or 0)
    config = replace(config, run=replace(config.run, allow_constant=True))
    outcome, _ = inline.drive(config, replicas=1)
    assert outcome.code == 0, outcome
    verdict = verify(str(tmp_path / "out"), strict=True)
    assert verdict.ok and verdict.done == 2, verdict.problems
    ending = {"gif": ".gif", "mp4": ".mp4"}[config.output.format]
    videos = sorted((tmp_path / "out/data").rglob(f"*{ending}"))
    assert len(videos) == 2
    if ending == ".gif":
        frames = Image.open(io.BytesIO(videos[0].read_bytes()))
        assert frames.n_frames == config.sampling.num_frames  # type: ignore[attr-defined]
        assert np.asarray(frames.convert("RGB")).std() > 0
