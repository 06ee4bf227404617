"""Every family and task through Ray: Parquet in, mp4 out, a manifest that accounts for every row."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

from tests.models.case import Case, cases
from vidgen import family, media
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.fleet import run as fleet
from vidgen.report import status
from vidgen.report.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CASES = cases()
ROWS = 2


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that all cases share: starting one takes longer than a tiny model takes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield str(cluster.address)
    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


def dataset(place: Path, takes: Any, size: tuple[int, int, int]) -> dict[str, str]:
    """Writes prompts and the media that the task takes: pictures as bytes, clips as a file beside the dataset."""
    frames, height, width = size
    draw = np.random.default_rng(0)
    columns: dict[str, Any] = {"prompt": ["a red circle moving left", "the green square and the cat"]}
    for name in takes:
        if name == "video":
            clip = np.repeat(draw.integers(0, 256, (frames, 1, 1, 3), dtype=np.uint8), height, 1).repeat(width, 2)
            encoder = media.start(place.parent / "clip.zip", (height, width), 8, format="png")
            encoder.frames(clip)
            encoder.finish()
            columns[name] = ["clip.zip"] * ROWS
        else:
            picture = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(picture, "PNG")
            columns[name] = [picture.getvalue()] * ROWS
    pq.write_table(pa.table(columns), place)
    return {name: name for name in columns}


@pytest.mark.parametrize("name", CASES)
def test_a_dataset_becomes_videos_and_a_manifest(name: str, address: str, tmp_path: Path) -> None:
    case: Case = CASES[name]
    checkpoint = tmp_path / "checkpoint"
    case.write(checkpoint)
    spec = family.spec(name.partition("/")[0])
    defaults = spec.defaults(case.task, spec.read(open_checkpoint(str(checkpoint)).configs()))
    frames, height, width = (case.sampling.get(key) or defaults[key] for key in ("num_frames", "height", "width"))
    takes = [field for field, required in spec.TASKS[case.task].items() if required or field in case.media]
    columns = dataset(tmp_path / "rows.parquet", takes, (frames, height, width))
    config = tmp_path / "job.yaml"
    job = {
        "model": {"family": "auto", "task": case.task, "checkpoint": str(checkpoint)},
        "dataset": {"path": str(tmp_path / "rows.parquet"), "columns": columns},
        "sampling": {key: value for key, value in case.sampling.items() if key != "prompt"} | {"seed": 7},
        "parallel": {"replicas": 1},
        "output": {"path": str(tmp_path / "out")},
    }
    config.write_text(yaml.safe_dump(job))
    _, outcome = fleet.generate(str(config), [], fleet.Options(address=address, takeover=False, quiet=True))
    assert outcome.code == 0, [failure.error for failure in status.read(str(tmp_path / "out")).failures]
    verdict = verify(str(tmp_path / "out"), strict=True)
    assert verdict.ok and verdict.done == ROWS, verdict.problems
