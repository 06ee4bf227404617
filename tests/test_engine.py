"""A loaded engine: defaults and refusals, determinism, resuming, and the command line; on a tiny Wan checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.wan import tiny_checkpoint
from vidgen import engine, media
from vidgen.errors import Cancelled, CheckpointError, ConfigError, ItemError
from vidgen.loop import Loop, State
from vidgen.types import Hooks, Request

SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> engine.Engine:
    return engine.load(str(folder))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def frames(loaded: engine.Engine, *requests: Request, batch: int | None = None, **hooks: Any) -> list[np.ndarray]:
    return [np.concatenate(list(video.chunks)) for video in loaded.generate(requests, Hooks(**hooks), batch)]


def test_a_request_has_the_familys_defaults_for_what_it_does_not_name(loaded: engine.Engine) -> None:
    made = loaded.request("a red circle", seed=4, height=64, width=64)
    assert (made.task, made.prompt, made.seed, made.height) == ("t2v", "a red circle", 4, 64)
    defaults = loaded.spec.defaults("t2v", loaded.params)
    for name in ("num_frames", "fps", "num_inference_steps", "guidance_scale", "negative_prompt", "sampler", "shift"):
        assert getattr(made, name) == defaults[name]
    assert made.tiling is None
    assert loaded.request("x", height=1440, width=2560).tiling == loaded.spec.tiling(
        "auto", loaded.request("x", height=1440, width=2560), loaded.params
    )


def test_a_request_that_breaks_rules_is_refused_with_all_of_them(loaded: engine.Engine) -> None:
    with pytest.raises(ValueError, match=r"num_frames is 6.*height is 30"):
        loaded.request("a red circle", height=30, num_frames=6)
    with pytest.raises(ValueError, match=r"unknown: steps; allowed: .*num_inference_steps"):
        loaded.request("a red circle", steps=3)


def test_equal_requests_give_equal_bits_whatever_came_before(loaded: engine.Engine, folder: Path) -> None:
    made = loaded.request("a red circle", seed=1, **SIZE)
    other = loaded.request("a blue square", seed=2, **SIZE)
    alone = frames(loaded, made)[0]
    among = frames(loaded, other, made, other, batch=1)[1]
    fresh = frames(engine.load(str(folder)), made)[0]
    assert np.array_equal(alone, among)
    assert np.array_equal(alone, fresh)
    assert not np.array_equal(alone, frames(loaded, other)[0])


def test_a_batch_differs_from_single_runs_by_rounding_only(loaded: engine.Engine) -> None:
    made = [loaded.request(prompt, seed=k, **SIZE) for k, prompt in enumerate(("a red circle", "a cat"))]
    for together, alone in zip(frames(loaded, *made), (frames(loaded, r)[0] for r in made), strict=True):
        # One step of uint8, where rounding tips a value over.
        assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_resumed_from_a_saved_state_gives_the_same_bits(
    loaded: engine.Engine, tmp_path: Path, sampler: str, batch: int
) -> None:
    made = [loaded.request("a red circle", seed=k, sampler=sampler, **SIZE) for k in range(batch)]
    kept = tmp_path / "state.safetensors"

    def save(state: State) -> None:
        if state.step == 3:
            kept.write_bytes(state.to_bytes())

    whole = frames(loaded, *made, save=save)
    with pytest.raises(Cancelled):
        frames(loaded, *made, cancelled=lambda: True)
    resumed = loaded.generate(made, Hooks(resume=lambda requests: State.from_bytes(kept.read_bytes())))
    for video, expected in zip(resumed, whole, strict=True):
        assert video.counts["conditional_forwards"] == 2
        assert np.array_equal(np.concatenate(list(video.chunks)), expected)


def test_nan_weights_become_an_item_error(copy: Path) -> None:
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["proj_out.bias"][0] = torch.nan
    save_file(state, weights)
    broken = engine.load(str(copy))
    with pytest.raises(ItemError, match="latents after step 1 of 5"):
        frames(broken, broken.request("a cat", **SIZE))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "extra", "mis-shaped"])
def test_a_key_that_does_not_fit_is_named(copy: Path, component: str, fault: str) -> None:
    (weights,) = (copy / component).glob("*.safetensors")
    state = load_file(weights)
    key = sorted(state)[3]
    if fault == "missing":
        del state[key]
    elif fault == "extra":
        key = "nobody.knows.this"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(1, 2, 3)
    save_file(state, weights)
    with pytest.raises(CheckpointError, match=f"{component} does not fit its config: 1 {fault}: {key}"):
        engine.load(str(copy))


def test_a_component_that_is_missing_is_named(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    del index["vae"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="component vae is missing"):
        engine.load(str(copy))


def test_another_checkpoint_than_the_planned_one_is_refused(folder: Path) -> None:
    right = engine.load(str(folder)).checkpoint_hash
    assert engine.load(str(folder), expected_hash=right).checkpoint_hash == right
    with pytest.raises(CheckpointError, match=rf"checkpoint_hash is {right}; the plan was made with 00ff"):
        engine.load(str(folder), expected_hash="00ff")


def test_a_remote_checkpoint_gives_the_frames_of_the_local_one(
    folder: Path, loaded: engine.Engine, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/tiny", recursive=True)
    try:
        remote = engine.load("memory://bucket/tiny", cache_dir=tmp_path)
    finally:
        memory.rm("/bucket", recursive=True)
    assert remote.checkpoint == "memory:///bucket/tiny"
    assert remote.checkpoint_hash == loaded.checkpoint_hash
    made = loaded.request("a red circle", **SIZE)
    assert np.array_equal(frames(remote, made)[0], frames(loaded, made)[0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"family": "nobody"}, "'nobody' is not a family"),
        ({"task": "i2v"}, "model.task: 'i2v'.*allowed: t2v"),
        ({"dtype": "int8"}, "'int8' is not one of float32"),
        ({"device": "tpu"}, "engine.device: 'tpu'"),
        ({"device": "mps"}, "engine.device: 'mps'"),
        ({"device": "cuda:77"}, "engine.device: 'cuda:77' is not there"),
        ({"offload": "disk"}, "engine.offload: 'disk'.*allowed: none, model"),
        ({"compile": "max"}, "engine.compile: 'max'.*allowed: auto, off"),
        ({"attention": "sage"}, "engine.attention: 'sage'.*allowed: auto, sdpa"),
        ({"quantization": "fp8"}, "engine.quantization: 'fp8'.*allowed: null"),
        ({"threads": 0}, "engine.threads: 0"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(folder: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=named):
        engine.load(str(folder), **options)


def test_a_checkpoint_of_another_family_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "NobodysPipeline"}))
    with pytest.raises(ConfigError, match="NobodysPipeline"):
        engine.load(str(copy))
    with pytest.raises(CheckpointError, match="'NobodysPipeline'; wan runs WanPipeline"):
        engine.load(str(copy), family="wan")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        engine.load(str(tmp_path / "nothing"))


def test_threads_are_set_for_the_process(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        engine.load(str(folder), threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_family_with_its_own_backend_runs_through_the_same_call() -> None:
    cards = engine.load(family="testcard")
    assert not isinstance(cards.backend, Loop)
    made = cards.request("hello", seed=3, height=32, width=32, num_frames=4)
    (video,) = cards.generate([made])
    assert np.concatenate(list(video.chunks)).shape == (4, 32, 32, 3)


def test_the_command_line_writes_one_video(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip.mp4"
    sizes = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2", "--seed", "3"]
    assert engine.main(["a red circle", "--out", str(out), "--checkpoint", str(copy), *sizes]) == 0
    assert media.probe(out).frames == 5
    assert "5 frames" in capsys.readouterr().out
    for wrong in (["--out", str(tmp_path / "clip.xyz"), *sizes], ["--out", str(out), "--height", "31"]):
        with pytest.raises(SystemExit) as stop:
            engine.main(["a red circle", "--checkpoint", str(copy), *wrong])
        assert stop.value.code == 2
