"""The pixels and the bytes of a row do not depend on who makes it, when, beside whom, or after what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fleet.inline import drive, settings_for
from tests.models.wan.tiny_checkpoint import build
from vidgen import config as configuration
from vidgen import manifest, media
from vidgen.errors import CheckpointError
from vidgen.fleet.replica import Worker
from vidgen.plan.build import build as build_plan
from vidgen.report.verify import verify
from vidgen.store.objects import Objects

PROMPTS = ["a red circle", "a blue square moving left", "the cat", "the dog and the cat", "a green circle", "or"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wan"))


def job(folder: Path, checkpoint: Path, order: list[int], *overrides: str) -> configuration.JobConfig:
    folder.mkdir(exist_ok=True)
    dataset = folder / "prompts.parquet"
    pq.write_table(pa.table({"id": [str(i) for i in order], "prompt": [PROMPTS[i] for i in order]}), dataset)
    values = {
        "model": {"family": "wan", "checkpoint": str(checkpoint)},
        "dataset": {"path": str(dataset), "id_column": "id"},
        "sampling": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "negative_prompt": "dog"},
        "output": {"path": str(folder / "out")},
        "run": {"allow_constant": True},
    }
    return configuration.from_dict(values, "test", overrides)


def digests(output: str) -> dict[str, str]:
    found = {}
    for table in manifest.read(Objects(output)):
        found.update(zip(table.column("row_id").to_pylist(), table.column("sha256").to_pylist(), strict=True))
    return found


def test_one_replica_two_replicas_shuffled_and_resumed_make_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    forwards = list(range(len(PROMPTS)))
    one = job(tmp_path / "one", checkpoint, forwards)
    assert drive(one, replicas=1)[0].code == 0
    two = job(tmp_path / "two", checkpoint, forwards)
    assert drive(two, replicas=2)[0].code == 0
    shuffled = job(tmp_path / "shuffled", checkpoint, [4, 1, 5, 0, 3, 2])
    assert drive(shuffled, replicas=2)[0].code == 0
    resumed = job(tmp_path / "resumed", checkpoint, forwards)
    first, _ = drive(resumed, replicas=1, interrupt_at=1)
    assert first.code == 130 and first.counts["pending"]
    assert drive(resumed, replicas=1)[0].code == 0
    expected = digests(one.output.path)
    assert len(set(expected.values())) == len(PROMPTS), "different prompts must differ"
    for other in (two, shuffled, resumed):
        assert verify(other.output.path).ok
        assert digests(other.output.path) == expected


def test_the_bytes_are_those_of_the_engine_alone(tmp_path: Path, checkpoint: Path) -> None:
    from vidgen import engine

    config = job(tmp_path / "job", checkpoint, [0])
    drive(config, replicas=1)
    (table,) = manifest.read(Objects(config.output.path))
    row = table.to_pylist()[0]
    loaded = engine.load(str(checkpoint), threads=1)
    size = {name: row[name] for name in ("height", "width", "num_frames", "num_inference_steps", "negative_prompt")}
    (video,) = loaded.generate([loaded.request(row["prompt"], seed=row["seed"], **size)])
    assert media.write(video, tmp_path / "alone.mp4").sha256 == row["sha256"]


def test_a_replica_whose_checkpoint_is_another_never_becomes_ready(tmp_path: Path, checkpoint: Path) -> None:
    config = job(tmp_path / "job", checkpoint, [0])
    objects = Objects(config.output.path)
    objects.put("epochs/probe", b"seen")
    planned = build_plan(config, objects).plan.checkpoint_hash
    settings = settings_for(config, objects)
    settings = replace(settings, model=replace(settings.model, expected_hash=planned))
    right = Worker("r0", "node", settings)
    assert right.start() == "node"
    right.close()
    with pytest.raises(CheckpointError, match=planned[:8]):
        other = replace(settings.model, checkpoint=str(build(tmp_path / "other", seed=1)))
        Worker("r0", "node", replace(settings, model=other)).start()
