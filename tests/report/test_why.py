"""All that is known about one item, and the same video again from what the run wrote down."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.fleet.inline import config_for, drive, write_prompts
from tests.fleet.test_determinism import PROMPTS, job
from tests.models.wan.tiny_checkpoint import ONE_IMAGE
from tests.models.wan.tiny_checkpoint import build as build_checkpoint
from vidgen import config as configuration
from vidgen import engine, manifest
from vidgen.cli import main
from vidgen.plan.build import build
from vidgen.report.repair import retry
from vidgen.store import commits
from vidgen.store.objects import Objects
from vidgen.types import Record


def rows_of(output: str) -> list[dict[str, object]]:
    return [row for table in manifest.read(Objects(output)) for row in table.to_pylist()]


def an_adapter(checkpoint: Path, place: Path) -> Path:
    """Changes one projection of the transformer."""
    module = "blocks.0.attn1.to_q"
    rows, columns = engine.load(str(checkpoint)).backend.pipeline.transformer.state_dict()[f"{module}.weight"].shape  # type: ignore[attr-defined]
    parts = {"lora_A": torch.randn(2, columns), "lora_B": torch.randn(rows, 2)}
    save_file({f"transformer.{module}.{name}.weight": value for name, value in parts.items()}, place)
    return place


def why(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(["why", *words, "--json"]) == 0
    said: dict[str, object] = json.loads(capsys.readouterr().out)
    return said


def test_the_command_it_prints_makes_the_committed_file_again_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A native family with weights and an adapter, CPU, batch 1; every value from the plan alone."""
    checkpoint = build_checkpoint(tmp_path / "wan")
    plain = job(tmp_path / "plain", checkpoint, [0, 1], "sampling.guidance_scale=3.5")
    drive(plain, replicas=1)
    lora = f"model.loras=[{{path: {an_adapter(checkpoint, tmp_path / 'lora.safetensors')}, weight: 0.7}}]"
    config = job(tmp_path / "job", checkpoint, [0, 1], "sampling.guidance_scale=3.5", lora)
    drive(config, replicas=1)
    row = rows_of(config.output.path)[1]
    assert row["sha256"] != rows_of(plain.output.path)[1]["sha256"], "the adapter changes the pixels"
    item = why(capsys, config.output.path, "1")["item"]
    assert isinstance(item, dict) and item["item_id"] == row["item_id"] and not item["notes"]
    monkeypatch.chdir(tmp_path)
    command = shlex.split(item["make"])
    assert command[0] == "vidgen" and main(command[1:]) == 0
    assert "the committed video" in capsys.readouterr().out
    made = (tmp_path / command[-1]).read_bytes()
    assert hashlib.sha256(made).hexdigest() == row["sha256"]


def test_a_conditioned_item_and_its_sampler_are_made_again_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = build_checkpoint(tmp_path / "wan", transformer=ONE_IMAGE)
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "first.png")
    pq.write_table(pa.table({"prompt": PROMPTS[:1], "picture": ["first.png"]}), tmp_path / "rows.parquet")
    values = {
        "model": {"family": "wan", "checkpoint": str(checkpoint), "task": "i2v"},
        "dataset": {"path": str(tmp_path / "rows.parquet"), "columns": {"prompt": "prompt", "image": "picture"}},
        "sampling": {
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "num_inference_steps": 2,
            "sampler": "euler",
            "seed": 9,
        },
        "output": {"path": str(tmp_path / "out"), "format": "png"},
        "run": {"allow_constant": True},
    }
    config = configuration.from_dict(values, "test")
    drive(config, replicas=1)
    (row,) = rows_of(config.output.path)
    assert row["status"] == "done", row["error"]
    made = str(tmp_path / "again.zip")
    assert main(["why", config.output.path, str(row["item_id"])[:8], "--make", made]) == 0
    assert hashlib.sha256(Path(made).read_bytes()).hexdigest() == row["sha256"]


def test_a_video_that_comes_out_differently_is_said_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    drive(config_for(write_prompts(tmp_path / "p.parquet", 1), output))
    (row,) = rows_of(output)
    objects, path = Objects(output), commits.commit_path(0, str(row["item_id"]))
    record = Record.from_dict(json.loads(objects.read(path)))
    objects.put(path, json.dumps({**record.to_dict(), "sha256": "0" * 64}).encode())
    assert main(["why", output, str(row["item_id"]), "--make", str(tmp_path / "x.mp4")]) == 1
    assert "NOT the committed" in capsys.readouterr().out
    assert main(["why", output, str(row["item_id"]), "--make", str(tmp_path / "x.gif")]) == 2
    assert "must end in .mp4" in capsys.readouterr().err


def test_it_shows_plan_row_attempts_generations_seconds_and_where_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    fails = ["", "item"]
    config = config_for(write_prompts(tmp_path / "p.parquet", 2, fails=fails, note=["n0", "n1"]), output)
    config.dataset.columns["params.fail"] = "fails"
    drive(config)
    retry(output)
    drive(config)
    done, failed = rows_of(output)
    found = why(capsys, output, str(failed["item_id"]))["item"]
    assert isinstance(found, dict) and found["status"] == "failed"
    assert [turn["generation"] for turn in found["generations"]] == [0, 1]
    assert {attempt["generation"] for attempt in found["attempts"]} == {0, 1}
    assert all(attempt["error"] and attempt["at"] for attempt in found["attempts"])
    assert found["planned"]["note"] == "n1" and found["planned"]["origin_row"] == 1
    assert main(["why", output, str(done["item_id"])]) == 0
    shown = capsys.readouterr().out
    for part in (done["video"], done["sha256"], done["node"], "batch", "context", "denoise", "vidgen why"):
        assert str(part) in shown
    assert main(["why", output, str(failed["item_id"])[:9]]) == 0
    shown = capsys.readouterr().out
    assert "generation 1: failed" in shown and "counts 1" in shown


def test_a_row_with_several_samples_lists_them_and_a_rejected_one_says_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    prompts = write_prompts(tmp_path / "p.parquet", ["one", ""], id=["first", "second"])
    drive(config_for(prompts, output, dataset__samples_per_row=2, dataset__id_column="id"))
    found = why(capsys, output, "first")
    assert [(row["sample"], row["status"]) for row in found["items"]] == [(0, "done"), (1, "done")]  # type: ignore
    assert main(["why", output, "first", "--make", "x.mp4"]) == 2
    assert "is 2 items" in capsys.readouterr().err
    (refused,) = why(capsys, output, "second")["rejected"]  # type: ignore[misc]
    assert refused["file"].endswith("p.parquet") and refused["row"] == 1 and "prompt" in refused["reason"]
    assert main(["why", output, "second"]) == 0
    assert "p.parquet, row 1" in capsys.readouterr().out


def test_a_pending_item_has_no_commit_yet_and_an_unknown_one_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    prompts = write_prompts(tmp_path / "p.parquet", 2, id=["sunset-1", "harbour-\x1b[2J2"])
    build(config_for(prompts, output, dataset__id_column="id"), Objects(output))
    found = why(capsys, output, "sunset-1")["item"]
    assert isinstance(found, dict) and found["status"] == "pending"
    assert found["generations"] == [{"generation": 0, "commit": None}]
    assert main(["why", output, "sunset-3"]) == 2
    said = capsys.readouterr().err
    assert "'sunset-3' is no item id and no row id" in said and "near it: sunset-1" in said
    assert main(["why", output, "harbour-2"]) == 2
    assert r"near it: harbour-\x1b[2J2" in capsys.readouterr().err
