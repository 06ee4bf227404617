"""The command line: exit codes, one readable block for an error, machine output, and what planning does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen.cli import main


def a_job(tmp_path: Path, rows: int = 2) -> tuple[str, str]:
    """A configuration file and its output."""
    dataset, output = write_prompts(tmp_path / "p.parquet", rows), str(tmp_path / "out")
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{family: testcard}}\ndataset: {{path: {dataset}}}\n"
        f"sampling: {{num_frames: 5, num_inference_steps: 2}}\noutput: {{path: {output}}}\n"
    )
    return str(config), output


def test_planning_and_status_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    config, output = a_job(tmp_path)
    program = """
import sys
from vidgen.cli import main
assert main(["plan", sys.argv[1], "--json"]) == 0 and main(["status", sys.argv[2], "--json"]) == 0
loaded = {"torch", "ray", "transformers", "diffusers"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", program, config, output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mistake_is_one_readable_block_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = a_job(tmp_path)
    assert main(["plan", config, "samplin.seed=3"]) == 2
    shown = capsys.readouterr().err
    assert "samplin" in shown and "did you mean 'sampling'" in shown and "Traceback" not in shown
    assert main(["plan", config, "samplin.seed=3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_is_json_where_json_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["exit"] == 2 and "no run here" in said["error"]


def test_overrides_may_stand_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = a_job(tmp_path)
    assert main(["plan", config, "--json", "sampling.num_frames=9", "--dry-run", "name=other"]) == 0
    planned = json.loads(capsys.readouterr().out)["plan"]
    assert planned["config"]["sampling"]["num_frames"] == 9 and planned["config"]["name"] == "other"
    with pytest.raises(SystemExit) as usage:
        main(["status", "somewhere", "key=value"])
    assert usage.value.code == 2


def test_verify_says_1_and_lists_what_is_wrong_until_a_run_has_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = a_job(tmp_path)
    main(["plan", config])
    assert main(["verify", output]) == 1
    assert "2 of 2 items are pending" in capsys.readouterr().out
    drive(config_for(str(tmp_path / "p.parquet"), output, sampling__num_frames=5, sampling__num_inference_steps=2))
    assert main(["verify", output]) == 0
    assert capsys.readouterr().out.startswith("ok: 2 items (2 done, 0 not)")
    assert main(["verify", output, "--json", "--sample", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 2


def test_exit_codes_can_be_mapped_for_a_supervisor_that_retries_whatever_is_not_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = a_job(tmp_path)
    refused = ["generate", config, "sampling.num_frames=nonsense"]
    assert main(refused) == 2
    assert main([*refused, "--ok-exit", "2,75"]) == 0
    assert main([*refused, "--ok-exit", "3,75"]) == 2
    assert not Path(output).exists(), "nothing started"


def test_stop_and_retry_and_gc_tell_a_person_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, output = a_job(tmp_path)
    drive(config_for(str(tmp_path / "p.parquet"), output))
    assert main(["stop", output]) == 75
    assert "no driver is running" in capsys.readouterr().err
    assert main(["retry", output]) == 0
    assert capsys.readouterr().out.strip() == "nothing to reopen"
    assert main(["gc", output, "--older-than", "0s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 0
    for age in ("yesterday", "nan", "inf", "-5h"):
        with pytest.raises(SystemExit):
            main(["gc", output, f"--older-than={age}"])
        assert "is not an age; write 24h" in capsys.readouterr().err


def test_models_lists_every_family_with_its_tasks_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    models = {model["family"]: model for model in json.loads(capsys.readouterr().out)}
    assert {"wan", "ltx", "cogvideox", "hunyuan", "mochi", "allegro", "diffusers", "testcard"} == set(models)
    assert models["wan"]["tasks"]["i2v"] == {"image": True, "last_image": False}
    assert models["wan"]["checkpoint"] == "demo" and models["wan"]["defaults"]["t2v"]["num_frames"] == 17
    assert not models["ltx"]["defaults"]
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "wan" in shown and "i2v (image, last_image?)" in shown
