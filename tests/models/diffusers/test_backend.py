"""What every pipeline gets from the backend: signs of life, failures by class, fresh state, options that do things."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, TextToVideoZeroPipeline

from tests.models.diffusers.conftest import Checkpoint, frames, load, picture, png, same
from tests.models.wan import tiny_checkpoint as wan
from vidgen import engine
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import Cancelled, CapacityError, CheckpointError, ConfigError, ItemError
from vidgen.models.diffusers import assemble
from vidgen.models.diffusers import options as written
from vidgen.models.diffusers import params as bindings
from vidgen.types import Hooks, ModelSettings

PROMPT = "a red circle moving left"
SMALL: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 4, "num_inference_steps": 3}


@pytest.fixture
def animated(checkpoint: Checkpoint) -> Callable[..., engine.Engine]:
    def made(*, options: dict[str, Any] | None = None, **settings: Any) -> engine.Engine:
        usual: dict[str, Any] = {"components": {"motion_adapter": str(checkpoint("motion_adapter"))}}
        usual |= {"scheduler": {"class": "DDIMScheduler"}}
        return load(checkpoint("sd"), pipeline="AnimateDiffPipeline", options=usual | (options or {}), **settings)

    return made


def pipe_of(loaded: engine.Engine) -> Any:
    return loaded.backend.pipe  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan.build(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_native_checkpoint_gives_the_native_engines_frames(wan_folder: Path, guidance: float) -> None:
    native, through = engine.load(str(wan_folder)), load(wan_folder)
    values: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "seed": 7}
    values |= {"guidance_scale": guidance, "negative_prompt": "blue dog", "fps": 16.0}
    ours = frames(native, native.request(PROMPT, **values))[0]
    theirs = frames(through, through.request(PROMPT, **values))[0]
    assert ours.std() > 10
    # 1e-3 of the range may fall on the two sides of a rounding.
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_a_shift_and_tiles_reach_the_library(wan_folder: Path) -> None:
    native, through = engine.load(str(wan_folder)), load(wan_folder)
    values: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3, "seed": 7}
    values |= {"shift": 7.0, "tiling": (32, 32, 16, 16), "negative_prompt": ""}
    ours = frames(native, native.request(PROMPT, **values))[0]
    theirs = frames(through, through.request(PROMPT, **values))[0]
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    whole = frames(through, through.request(PROMPT, **values | {"tiling": None}))[0]
    assert np.abs(whole.astype(int) - theirs.astype(int)).max() > 1, "tiles are off again for the next request"


def test_requests_of_one_call_are_as_alone_and_in_order(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated()
    requests = [loaded.request(PROMPT, seed=seed, **SMALL) for seed in (1, 2, 1)]
    together = frames(loaded, *requests)
    alone = [frames(loaded, request)[0] for request in requests]
    assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert (together[0] == together[2]).all() and (together[0] != together[1]).any()
    videos = list(loaded.generate(requests))
    assert [(v.batch, v.request.seed, v.counts["forwards"]) for v in videos] == [(1, 1, 3), (1, 2, 3), (1, 1, 3)]
    assert all(v.dtype == "float32" and min(v.seconds.values()) > 0 for v in videos)


def test_a_scheduler_with_memory_starts_afresh(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("sd"), pipeline="TextToVideoZeroPipeline")
    sizes: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 3, "num_inference_steps": 8}
    made = loaded.request(PROMPT, sampler="DPMSolverMultistepScheduler", params={"t0": 3, "t1": 5}, **sizes)
    first = frames(loaded, made)[0]
    assert (frames(loaded, made)[0] == first).all()
    none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    pipe = TextToVideoZeroPipeline.from_pretrained(checkpoint("sd"), **none)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    call = {"height": 16, "width": 16, "num_inference_steps": 8, "video_length": 3, "t0": 3, "t1": 5}
    same(first, pipe(PROMPT, generator=torch.manual_seed(0), **call).images)


def test_progress_is_told_at_every_forward_and_the_stages_come_in_order(animated: Callable[..., engine.Engine]) -> None:
    loaded, told = animated(), []
    list(loaded.generate([loaded.request(PROMPT, **SMALL)], Hooks(progress=lambda *state: told.append(state))))
    assert [state for state in told if state[0] == "denoise"] == [("denoise", k, 3) for k in (1, 2, 3)]
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["encode", "denoise", "decode"]


def test_guidance_in_two_forwards_is_one_step(wan_folder: Path) -> None:
    loaded, told = load(wan_folder), []
    made = loaded.request(PROMPT, height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=4.0)
    (video,) = loaded.generate([made], Hooks(progress=lambda *state: told.append(state)))
    assert video.counts["forwards"] == 6
    assert [step for stage, step, _ in told if stage == "denoise"] == [1, 1, 2, 2, 3, 3]


def test_cancelling_ends_the_call_and_leaves_the_pipeline_usable(animated: Callable[..., engine.Engine]) -> None:
    loaded, seen = animated(), []
    made = loaded.request(PROMPT, **SMALL)
    expected = frames(loaded, made)[0]
    hooks = Hooks(progress=lambda *state: seen.append(state), cancelled=lambda: ("denoise", 2, 3) in seen)
    with pytest.raises(Cancelled):
        list(loaded.generate([made], hooks))
    assert ("denoise", 3, 3) not in seen
    assert (frames(loaded, made)[0] == expected).all()
    with pytest.raises(Cancelled, match="request 1 of 2"):
        list(loaded.generate([made, made], Hooks(cancelled=lambda: True)))


def test_frames_that_are_not_finite_are_the_items_failure(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated()
    with torch.no_grad():
        pipe_of(loaded).unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ItemError, match="not finite: seed 9"):
        frames(loaded, loaded.request(PROMPT, seed=9, **SMALL))


def test_black_frames_are_the_items_failure(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated()
    with torch.no_grad():
        pipe_of(loaded).vae.decoder.conv_out.weight.zero_()
        pipe_of(loaded).vae.decoder.conv_out.bias.fill_(-5.0)
    with pytest.raises(ItemError, match="every frame is black"):
        frames(loaded, loaded.request(PROMPT, **SMALL))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_is_a_matter_of_capacity(
    animated: Callable[..., engine.Engine], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    loaded = animated()

    def fails(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(pipe_of(loaded).unet, "forward", fails)
    with pytest.raises(CapacityError, match="4 frames of 16 x 16"):
        frames(loaded, loaded.request(PROMPT, **SMALL))


def test_another_number_of_frames_than_asked_is_not_passed_on(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(wan_folder)
    made = loaded.request(PROMPT, height=32, width=32, num_frames=9, num_inference_steps=1)
    object.__setattr__(made, "num_frames", 8)  # what a plan refuses, and the pipeline silently mends
    with pytest.raises(ItemError, match=r"\[9, 32, 32, 3\], expected \[8, 32, 32, 3\]"):
        frames(loaded, made)


def test_a_frame_blacked_out_by_the_safety_checker_fails_its_item(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("sd"), pipeline="TextToVideoZeroPipeline")
    pipe_of(loaded).run_safety_checker = lambda image, device, dtype: (image, [False, True, False])
    made = loaded.request(PROMPT, params={"t0": 1, "t1": 2}, height=16, width=16, num_frames=3, num_inference_steps=4)
    with pytest.raises(ItemError, match="safety checker blacked out 1 of 3"):
        frames(loaded, made)


def test_tiles_of_an_image_vae_are_the_librarys(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated()
    made = loaded.request(PROMPT, **SMALL | {"height": 64, "width": 48})
    tiles = loaded.spec.tiling("on", made, loaded.params)
    assert tiles == (32, 32, 24, 24)
    assert loaded.spec.tiling("auto", made, loaded.params) is None
    tiled = frames(loaded, loaded.request(PROMPT, **SMALL | {"height": 64, "width": 48, "tiling": tiles}))[0]
    plain = frames(loaded, made)[0]
    pipe = pipe_of(loaded)
    pipe.vae.enable_tiling()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    expected = pipe(PROMPT, **SMALL | {"height": 64, "width": 48}, generator=torch.manual_seed(0), output_type="np")
    same(tiled, expected.frames[0])
    assert (tiled != plain).any()


def test_switches_are_thrown_on_whoever_has_them(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated(
        options={
            "enable": {
                "slicing": {},
                "free_init": {"num_iters": 2},
                "forward_chunking": {"chunk_size": 1, "dim": 1},
            }
        }
    )
    pipe = pipe_of(loaded)
    assert pipe.vae.use_slicing and pipe.free_init_enabled
    (video,) = loaded.generate([loaded.request(PROMPT, **SMALL)])
    assert video.counts["forwards"] == 6, "FreeInit denoises twice"


def test_components_can_have_dtypes_of_their_own(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated(dtype="bfloat16", options={"dtypes": {"vae": "float32"}})
    pipe = pipe_of(loaded)
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert "vae float32" in loaded.backend.dtype  # type: ignore[attr-defined]


def test_a_scheduler_option_of_the_configuration_changes_the_steps(animated: Callable[..., engine.Engine]) -> None:
    loaded = animated(options={"scheduler": {"class": "DDIMScheduler", "timestep_spacing": "trailing"}})
    frames(loaded, loaded.request(PROMPT, **SMALL))
    scheduler = pipe_of(loaded).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert [int(t) for t in scheduler.timesteps] == [999, 666, 332]


def test_an_image_that_is_not_of_the_videos_size_fails_its_item(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("svd"), task="i2v")
    made = loaded.request("", image=png(picture(16, 16)), height=32, width=32, num_frames=3, num_inference_steps=1)
    with pytest.raises(ItemError, match="image: "):
        frames(loaded, made)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload": "model"}, "engine.offload: 'model' needs a GPU"),
        ({"offload": "disk"}, "allowed: none, model, sequential"),
        ({"compile": "max"}, "engine.compile: 'max'"),
        ({"attention": "quick"}, "engine.attention: 'quick' cannot be used"),
        ({"quantization": "bitsandbytes_4bit"}, "needs the package bitsandbytes"),
        ({"quantization": "smaller"}, "allowed: null, bitsandbytes_4bit"),
        ({"options": {"quantization": {"load_in_8bit": True}}}, "engine.quantization is null"),
        (
            {"options": {"enable": {"free_noise": {"context_length": 4, "weighting_scheme": "odd"}}}},
            "enable.free_noise",
        ),
    ],
)
def test_an_engine_option_that_cannot_be_honoured_is_refused(
    animated: Callable[..., engine.Engine], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        animated(**settings)


class Recorder:
    """A pipeline that only remembers where it was put."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def enable_model_cpu_offload(self, device: Any) -> None:
        self.calls.append(("model", device))

    def enable_sequential_cpu_offload(self, device: Any) -> None:
        self.calls.append(("sequential", device))

    def to(self, device: Any) -> None:
        self.calls.append(("none", device))


@pytest.mark.parametrize("offload", assemble.OFFLOAD)
def test_each_kind_of_offload_is_the_librarys(offload: str) -> None:
    pipe, device = Recorder(), torch.device("cuda", 0)
    assemble.check(ModelSettings(offload=offload), device)
    assemble._place(pipe, offload, device)
    assert pipe.calls == [(offload, device)]


def test_quantization_is_put_into_the_librarys_words(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    options = written.read({"quantization": {"components": ["transformer", "text_encoder"], "llm_int8_threshold": 5.0}})
    params = bindings.read(open_checkpoint(str(wan_folder)).configs(), None, options)
    made = assemble._quantizer(params, "bitsandbytes_8bit", torch.float32).quant_mapping
    assert {name: type(one).__module__.partition(".")[0] for name, one in made.items()} == {
        "transformer": "diffusers",
        "text_encoder": "transformers",
    }
    assert all(one.load_in_8bit and one.llm_int8_threshold == 5.0 for one in made.values())
    wrong = written.read({"quantization": {"components": "controlnet"}})
    with pytest.raises(ConfigError, match="WanPipeline has no controlnet"):
        assemble._quantizer(replace(params, options=wrong), "bitsandbytes_8bit", torch.float32)


def test_a_component_from_a_store_is_fetched_and_is_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in checkpoint("motion_adapter").iterdir():
        fs.pipe_file(f"/adapters/one/{path.name}", path.read_bytes())
    here = {"components": {"motion_adapter": str(checkpoint("motion_adapter"))}}
    there = {"components": {"motion_adapter": {"path": "memory://adapters", "subfolder": "one"}}}
    keys: dict[str, Any] = {"pipeline": "AnimateDiffPipeline"}
    local = load(checkpoint("sd"), options=here, **keys)
    remote = load(checkpoint("sd"), options=there, cache_dir=str(tmp_path), **keys)
    assert local.checkpoint_hash == remote.checkpoint_hash
    made = local.request(PROMPT, **SMALL)
    assert (frames(local, made)[0] == frames(remote, made)[0]).all()
    assert list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model.options.components.motion_adapter: .* has no config.json"):
        load(checkpoint("sd"), options={"components": {"motion_adapter": "memory://adapters"}}, **keys)


def test_sdpa_is_the_librarys_native_kernel(wan_folder: Path) -> None:
    plain, named = load(wan_folder), load(wan_folder, attention="sdpa")
    made = plain.request(PROMPT, height=32, width=32, num_frames=5, num_inference_steps=2)
    assert (frames(plain, made)[0] == frames(named, made)[0]).all()


def test_another_checkpoint_than_planned_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="the plan was made with 00ff"):
        load(checkpoint("sd"), pipeline="TextToVideoZeroPipeline", expected_hash="00ff")


def test_pickled_weights_are_not_opened(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = tmp_path / "pickled"
    StableDiffusionPipeline.from_pretrained(checkpoint("sd"), safety_checker=None).save_pretrained(
        folder, safe_serialization=False
    )
    with pytest.raises(CheckpointError, match="is pickled"):
        load(folder, pipeline="TextToVideoZeroPipeline")


@pytest.mark.slow
def test_compiled_blocks_give_the_same_frames(wan_folder: Path) -> None:
    plain, fast = load(wan_folder), load(wan_folder, compile="on")
    made = plain.request(PROMPT, height=32, width=32, num_frames=5, num_inference_steps=2)
    difference = np.abs(frames(plain, made)[0].astype(int) - frames(fast, made)[0].astype(int))
    assert difference.max() <= 1  # other kernels, other last bits
