"""What a plan knows of a pipeline class: read off the library's source, without importing it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from tests.models.diffusers.conftest import Checkpoint, picture
from vidgen import config as configuration
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.diffusers import known, source
from vidgen.models.diffusers import options as written
from vidgen.models.diffusers import params as bindings
from vidgen.models.diffusers.binding import bind
from vidgen.models.diffusers.params import Params
from vidgen.models.diffusers.recipes.canny import edges
from vidgen.models.diffusers.spec import Bound, bound
from vidgen.plan import model
from vidgen.types import Media, Request

STEMS = ("svd", "animatediff", "i2vgenxl", "text2video-zero", "diffusers-")
VIDEO_PIPELINES = (
    *("AllegroPipeline", "AnimateDiffPipeline", "AnimateDiffSDXLPipeline", "AnimateDiffVideoToVideoPipeline"),
    *("CogVideoXImageToVideoPipeline", "CogVideoXPipeline", "CogVideoXVideoToVideoPipeline", "HunyuanVideoPipeline"),
    *("HunyuanVideoImageToVideoPipeline", "I2VGenXLPipeline", "LTXConditionPipeline", "LTXImageToVideoPipeline"),
    *("LTXPipeline", "LattePipeline", "MochiPipeline", "StableVideoDiffusionPipeline", "TextToVideoZeroPipeline"),
    *("WanImageToVideoPipeline", "WanPipeline", "WanVideoToVideoPipeline"),
)


@pytest.mark.parametrize("name", VIDEO_PIPELINES)
def test_a_call_read_off_the_source_is_the_one_python_sees(name: str) -> None:
    seen = inspect.signature(getattr(diffusers, name).__call__).parameters
    named = {p.name: p for p in seen.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    read = source.call(name, "model.pipeline")
    assert [a.name for a in read] == list(named)
    for argument in read:
        default = named[argument.name].default
        assert argument.required == (default is inspect.Parameter.empty)
        if not argument.required and argument.known:
            assert argument.default == default, argument.name


@pytest.mark.parametrize("name", VIDEO_PIPELINES)
def test_components_read_off_the_source_are_those_of_the_class(name: str) -> None:
    cls = getattr(diffusers, name)
    expected, _ = cls._get_signature_keys(cls)
    read = source.components(name, "model.pipeline")
    assert {n for n, free in read.items() if not free} <= set(expected) <= set(read)
    assert set(cls._optional_components) <= {n for n, free in read.items() if free}


def fake(pipeline: str, components: dict[str, str], **configs: Any) -> Params:
    index = {"_class_name": pipeline, **{name: ["diffusers", cls] for name, cls in components.items()}}
    return bindings.read({"model_index": index, **configs}, None, written.Options())


def stable_video(frames: int = 25) -> Params:
    components = {"vae": "AutoencoderKLTemporalDecoder", "image_encoder": "CLIPVisionModelWithProjection"}
    components |= {"unet": "UNetSpatioTemporalConditionModel", "scheduler": "EulerDiscreteScheduler"}
    blocks = {"down_block_types": ["x"] * 4, "num_frames": frames, "sample_size": 96}
    return fake(
        "StableVideoDiffusionPipeline", components, unet=blocks, vae={"block_out_channels": [128, 256, 512, 512]}
    )


def request(spec: Bound, task: str, **changes: Any) -> Request:
    values = {"seed": 0, "prompt": "a", "task": task, **spec.defaults(task, spec.params)}
    values["params"] = tuple(sorted((values["params"] | changes.pop("params", {})).items()))
    return Request(**values | changes)


@pytest.mark.parametrize("frames", [14, 25])
def test_the_recipe_of_stable_video_diffusion_is_its_call_and_its_config(frames: int) -> None:
    params = stable_video(frames)
    defaults = bound(params).defaults("i2v", params)
    assert (defaults["height"], defaults["width"], defaults["num_frames"], defaults["fps"]) == (576, 1024, frames, 7.0)
    assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (25, 1.0)
    assert defaults["params"] == {
        "decode_chunk_size": None,
        "max_guidance_scale": 3.0,
        "min_guidance_scale": 1.0,
        "motion_bucket_id": 127,
        "noise_aug_strength": 0.02,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "image is missing"),
        ({"video": Media("", "x")}, "video is given"),
        ({"width": 1000}, "width is 1000; allowed: positive multiples of 64"),
        ({"guidance_scale": 3.0}, "(it has params.min_guidance_scale, params.max_guidance_scale), allowed: 1"),
        ({"negative_prompt": "blurry"}, "negative_prompt is given"),
        ({"fps": 7.5}, "fps is 7.5; StableVideoDiffusionPipeline takes whole numbers"),
        ({"fps": 0.0}, "fps is 0.0; allowed: more than 0"),
        ({"params": {"motion_bucket_id": 1.5}}, "params.motion_bucket_id is 1.5; it must be int"),
        ({"params": {"motion_bucket_id": None}}, "params.motion_bucket_id is null"),
        ({"params": {"motion": 1}}, "params.motion is not an argument of StableVideoDiffusionPipeline; allowed: min"),
        ({"params": {"noise_aug_strength": float("nan")}}, "not a finite number"),
        (
            {"sampler": "FlowMatchEulerDiscreteScheduler"},
            "sampler is 'FlowMatchEulerDiscreteScheduler'; allowed: Euler",
        ),
        ({"shift": 3.0}, "shift is 3.0; EulerDiscreteScheduler has none"),
        ({"timesteps": (3.0, 2.0)}, "timesteps is given; StableVideoDiffusionPipeline has no such argument"),
        ({"sigmas": (3.0, 2.0)}, "sigmas is [3.0, 2.0]; allowed: 25"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"seed": 2**48}, "seed is"),
        ({"tiling": (256, 256, 192, 192)}, "AutoencoderKLTemporalDecoder does not tile"),
    ],
)
def test_each_broken_rule_is_told_with_its_value(changes: dict[str, Any], words: str) -> None:
    spec = bound(stable_video())
    good = request(spec, "i2v", image=Media("", "x"))
    assert spec.problems(good, spec.params, {}) == []
    found = spec.problems(request(spec, "i2v", **{"image": Media("", "x")} | changes), spec.params, {})
    assert len(found) == 1 and words in found[0], found


def test_tiling_of_a_vae_that_has_none_is_refused_and_says_what_helps() -> None:
    spec = bound(stable_video())
    with pytest.raises(ConfigError, match=r"does not tile; params.decode_chunk_size bounds its memory"):
        spec.tiling("on", request(spec, "i2v"), spec.params)


@pytest.mark.parametrize(
    ("pipeline", "vae", "config", "wanted", "broken", "words"),
    [
        ("WanPipeline", "AutoencoderKLWan", {"dim_mult": [1, 2, 4, 4]}, 81, 80, "1 + k x 4"),
        (
            "LTXPipeline",
            "AutoencoderKLLTXVideo",
            {"block_out_channels": [1] * 4, "patch_size": 4},
            161,
            160,
            "1 + k x 8",
        ),
        ("MochiPipeline", "AutoencoderKLMochi", {"block_out_channels": [1] * 4}, 19, 20, "1 + k x 6"),
        ("HunyuanVideoPipeline", "AutoencoderKLHunyuanVideo", {"block_out_channels": [1] * 4}, 129, 128, "1 + k x 4"),
    ],
)
def test_frame_counts_that_a_pipeline_would_silently_mend_are_refused(
    pipeline: str, vae: str, config: dict[str, Any], wanted: int, broken: int, words: str
) -> None:
    takes = source.components(pipeline, "x")
    params = fake(
        pipeline, dict.fromkeys(takes, "X") | {"vae": vae, "scheduler": "FlowMatchEulerDiscreteScheduler"}, vae=config
    )
    spec = bound(params)
    good = request(spec, "t2v")
    assert good.num_frames == wanted and spec.problems(good, params, {}) == []
    assert [p for p in spec.problems(request(spec, "t2v", num_frames=broken), params, {}) if words in p]


def test_tasks_follow_the_media_that_a_call_takes() -> None:
    def does(name: str) -> dict[str, dict[str, bool]]:
        return dict(bound(fake(name, dict.fromkeys(source.components(name, "x"), "X"))).TASKS)

    assert does("WanPipeline") == {"t2v": {}}
    assert does("WanImageToVideoPipeline") == {"i2v": {"image": True, "last_image": False}}
    assert does("I2VGenXLPipeline") == does("StableVideoDiffusionPipeline") == {"i2v": {"image": True}}
    assert does("CogVideoXVideoToVideoPipeline") == does("Text2VideoZeroControlNet") == {"v2v": {"video": True}}
    assert list(does("LTXConditionPipeline")) == ["t2v", "i2v", "v2v"]


def test_text2video_zero_needs_guidance_and_a_way_back(checkpoint: Checkpoint) -> None:
    found = bind(open_checkpoint(str(checkpoint("sd"))), "TextToVideoZeroPipeline", {})
    spec, params = found.spec, found.params
    defaults = spec.defaults("t2v", params)
    assert (defaults["height"], defaults["num_frames"], defaults["fps"]) == (16, 8, 4.0)
    assert spec.problems(request(spec, "t2v"), params, {}) == []
    unguided = spec.problems(request(spec, "t2v", guidance_scale=1.0), params, {})
    short = spec.problems(request(spec, "t2v", num_inference_steps=20), params, {})
    assert unguided == ["guidance_scale is 1; TextToVideoZeroPipeline only runs guided, allowed: more than 1"]
    assert short == ["params.t0 is 44 and params.t1 is 47; allowed: 0 <= t0 < t1 < num_inference_steps, 20"]


@pytest.mark.parametrize(
    ("pipeline", "options", "words"),
    [
        (
            "AnimateDifPipeline",
            {},
            "'AnimateDifPipeline' is not a class of diffusers .*did you mean AnimateDiffPipeline",
        ),
        ("AutoencoderKL", {}, "is not a pipeline: it has no __call__"),
        ("StableDiffusionPipeline", {}, "makes no video"),
        ("Text2VideoZeroControlNet", {}, "needs controlnet.*model.options.components.controlnet"),
        (None, {"motion": {}}, "model.options.motion: unknown key; allowed: components, scheduler"),
        ("TextToVideoZeroPipeline", {"components": {"adapter": "x"}}, "has no config.json|cannot be listed|no such"),
        ("TextToVideoZeroPipeline", {"components": {"vae": {"place": "x"}}}, "components.vae: .*path, revision"),
        ("TextToVideoZeroPipeline", {"scheduler": {"beta_shape": "x"}}, "scheduler.beta_shape: PNDMScheduler has no"),
        (
            "TextToVideoZeroPipeline",
            {"scheduler": {"class": "Euler"}},
            "'Euler' cannot stand for PNDMScheduler; allowed",
        ),
        ("TextToVideoZeroPipeline", {"dtypes": {"vae": "fp16"}}, "dtypes.vae: 'fp16' is not a dtype"),
        ("TextToVideoZeroPipeline", {"dtypes": {"image_vae": "float16"}}, "dtypes.image_vae: .*no such component"),
        ("TextToVideoZeroPipeline", {"enable": {"magic": {}}}, "enable.magic: neither TextToVideoZeroPipeline nor"),
        ("TextToVideoZeroPipeline", {"enable": {"freeu": {"s1": 0.9}}}, "enable.freeu: s2 is missing"),
        ("TextToVideoZeroPipeline", {"enable": {"freeu": {"s3": 0.9}}}, "enable.freeu.s3: no such argument"),
        ("TextToVideoZeroPipeline", {"enable": {"vae_tiling": {}}}, "use engine.vae_tiling: on"),
        ("TextToVideoZeroPipeline", {"enable": {"model_cpu_offload": {}}}, "use engine.offload: model"),
    ],
)
def test_a_mistake_in_pipeline_or_options_is_named(
    checkpoint: Checkpoint, pipeline: str | None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=words):
        bind(open_checkpoint(str(checkpoint("sd"))), pipeline, options)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source._root.cache_clear()
    source._index.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(ConfigError, match=r"pip install 'vidgen\[diffusers\]'"):
            source.call("WanPipeline", "model.pipeline")
    finally:
        source._root.cache_clear()
        source._index.cache_clear()


def job(folder: Path, **model_keys: Any) -> configuration.JobConfig:
    keys = {"family": "diffusers", "checkpoint": str(folder), **model_keys}
    return configuration.from_dict({"model": keys, "dataset": {"path": "x"}, "output": {"path": "y"}})


def test_a_plan_resolves_pipeline_components_and_hash_without_torch(checkpoint: Checkpoint) -> None:
    options = {
        "components": {"motion_adapter": str(checkpoint("motion_adapter"))},
        "scheduler": {"class": "DDIMScheduler"},
    }
    keys = {
        "checkpoint": str(checkpoint("sd")),
        "family": "diffusers",
        "pipeline": "AnimateDiffPipeline",
        "options": options,
    }
    program = """
import json, sys
from vidgen import config
from vidgen.plan import model
job = config.from_dict({"model": json.loads(sys.argv[1]), "dataset": {"path": "x"}, "output": {"path": "y"}})
found = model.resolve(job)
assert not {"torch", "diffusers", "transformers"} & set(sys.modules), "imported"
print(found.checkpoint_hash, found.params.pipeline, found.spec.weight_bytes(found.params) > 100_000)
"""
    done = subprocess.run([sys.executable, "-c", program, json.dumps(keys)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known_hash = bind(open_checkpoint(str(checkpoint("sd"))), "AnimateDiffPipeline", options).checkpoint_hash
    assert done.stdout.split() == [known_hash, "AnimateDiffPipeline", "True"]


def test_what_changes_pixels_changes_hash_or_switches(checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapter = checkpoint("motion_adapter")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in adapter.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())

    def resolved(place: Path, **options: Any) -> model.Model:
        components = {"components": {"motion_adapter": str(place)}}
        return model.resolve(job(checkpoint("sd"), pipeline="AnimateDiffPipeline", options=components | options))

    first, second = resolved(adapter), resolved(moved)
    assert first.checkpoint_hash == second.checkpoint_hash and first.switches == second.switches
    assert (
        first.checkpoint_hash
        != model.resolve(job(checkpoint("sd"), pipeline="TextToVideoZeroPipeline")).checkpoint_hash
    )
    weights = moved / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert resolved(moved).checkpoint_hash != first.checkpoint_hash
    assert resolved(adapter, scheduler={"beta_schedule": "linear"}).switches != first.switches
    assert dict(first.switches) == {"model.pipeline": "AnimateDiffPipeline"}


def test_a_control_that_the_recipe_does_not_know_is_told_with_the_allowed_ones(checkpoint: Checkpoint) -> None:
    options = {"components": {"controlnet": str(checkpoint("controlnet"))}}
    found = bind(open_checkpoint(str(checkpoint("sd"))), "Text2VideoZeroControlNet", options)
    made = request(found.spec, "v2v", video=Media("", "x"), params={"control": "pose"})
    assert found.spec.problems(made, found.params, {}) == ["params.control is 'pose'; allowed: canny, given"]
    assert found.spec.PARAMS["control"] is str


def test_a_task_that_the_class_does_not_do_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ConfigError, match=r"model.task: 't2v' is not a task of StableVideoDiffusionPipeline; allowed: i2v"
    ):
        model.resolve(job(checkpoint("svd")))


def test_other_families_have_no_pipeline_and_no_options() -> None:
    for key, value in (("pipeline", "WanPipeline"), ("options", {"dtypes": {"vae": "float32"}})):
        with pytest.raises(ConfigError, match=f"model.{key}: .*model.family: diffusers takes more"):
            configuration.from_dict(
                {"model": {"family": "wan", key: value}, "dataset": {"path": "x"}, "output": {"path": "y"}}
            )


def test_a_component_can_be_left_out_where_the_class_can_do_without(checkpoint: Checkpoint) -> None:
    folder = open_checkpoint(str(checkpoint("svd")))
    with pytest.raises(ConfigError, match=r"components.unet: null, but StableVideoDiffusionPipeline cannot do without"):
        bind(folder, None, {"components": {"unet": None}})
    index = {"_class_name": "TextToVideoZeroPipeline", "safety_checker": ["stable_diffusion", "X"]}
    index |= {name: ["diffusers", "X"] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    kept = bindings.read({"model_index": index}, None, written.Options())
    dropped = bindings.read({"model_index": index}, None, written.read({"components": {"safety_checker": None}}))
    assert kept.class_of("safety_checker") == "X" and dropped.class_of("safety_checker") == ""
    assert dropped.options.canonical() == '{"without":["safety_checker"]}'


RECIPES = sorted(path for stem in STEMS for path in (Path(__file__).parents[3] / "configs").glob(f"{stem}*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_configs_fits_its_class(path: Path) -> None:
    job = configuration.load(str(path))
    assert job.model.family == "diffusers"
    name = job.model.pipeline or "WanPipeline"
    options = written.read(dict(configuration.model_options(job)))
    takes = source.components(name, "model.pipeline")
    classes = dict.fromkeys(takes, "DDIMScheduler") | {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
    index = {"_class_name": name, **{component: ["diffusers", cls] for component, cls in classes.items()}}
    params = bindings.read({"model_index": index, "unet": {"sample_size": 64, "num_frames": 25}}, name, options)
    spec = bound(params)
    assert job.model.task in spec.TASKS
    given = {name: value for name, value in configuration.to_dict(job)["sampling"].items() if value is not None}
    made = request(spec, job.model.task, **given, **{name: Media("", "x") for name in spec.TASKS[job.model.task]})
    assert spec.problems(made, params, {}) == []


def test_the_recipes_are_all_there() -> None:
    assert len(RECIPES) == 9


def test_cost_counts_forwards_and_positions(checkpoint: Checkpoint) -> None:
    found = bind(open_checkpoint(str(checkpoint("sd"))), "TextToVideoZeroPipeline", {})
    spec, params = found.spec, found.params
    made = request(spec, "t2v")
    assert spec.tokens(made, params) == 8 * 8 * 8
    unet = dict(params.weights)["unet"][1]
    assert spec.flops(made, params) == pytest.approx(2 * unet * known.UNET_SHARE * 512 * 50 * 2)
    stored = sum(path.stat().st_size for path in checkpoint("sd").rglob("*.safetensors"))
    assert spec.weight_bytes(params) == stored


def test_playback_rates_are_those_of_the_model_cards() -> None:
    rates = {
        name: known.fps_of(name)
        for name in ("WanVACEPipeline", "MochiPipeline", "AnimateDiffSDXLPipeline", "NewPipeline")
    }
    assert rates == {
        "WanVACEPipeline": 16.0,
        "MochiPipeline": 30.0,
        "AnimateDiffSDXLPipeline": 8.0,
        "NewPipeline": 10.0,
    }


def test_edges_are_those_of_opencv() -> None:
    """How many, and the sum of value x place, as cv2.Canny of OpenCV 5.0 gave them for these pictures."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    soft = np.asarray(Image.fromarray(noise[:6, :6]).resize((56, 40), Image.Resampling.BICUBIC))
    drawn = (edges(np.asarray(picture(48, 64))), edges(noise, 50, 300), edges(soft, 30, 60))
    counts = [int((lines[:, :, 0] > 0).sum()) for lines in drawn]
    places = [int((lines[:, :, 0].ravel().astype(np.int64) * np.arange(lines[:, :, 0].size)).sum()) for lines in drawn]
    assert counts == [82, 808, 402]
    assert places == [32629545, 227034915, 113439810]
    assert all(set(np.unique(lines)) == {0, 255} and (lines == lines[:, :, :1]).all() for lines in drawn)
