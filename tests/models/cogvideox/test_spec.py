"""What spec.py and params.py read, refuse, limit and count, checked against the modules they count."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from tests.models.cogvideox import tiny_checkpoint
from tests.models.cogvideox.published import CHECKPOINTS, Configs
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.cogvideox import spec
from vidgen.models.cogvideox.transformer import CogVideoXTransformer3DModel
from vidgen.models.cogvideox.vae import CogVideoXVAE
from vidgen.types import Media, Request

MEDIA = Media("file:///x", "0" * 64)
TASK = {name: "i2v" if name.endswith("I2V") else "t2v" for name in CHECKPOINTS}


def params_of(name: str) -> spec.Params:
    return spec.read(CHECKPOINTS[name])


def request(name: str, task: str | None = None, **changes: Any) -> Request:
    """The default request of a published checkpoint."""
    task = task or TASK[name]
    values = spec.defaults(task, params_of(name))
    values |= {"image": MEDIA} if task == "i2v" else {"video": MEDIA} if task == "v2v" else {}
    family = {**values.pop("params"), **changes.pop("params", {})}
    return Request(task=task, prompt="x", seed=1, params=tuple(sorted(family.items())), **values | changes)


def broken(name: str, task: str | None = None, **changes: Any) -> str:
    return "; ".join(spec.problems(request(name, task, **changes), params_of(name), {}))


def with_change(name: str, component: str, **values: Any) -> Configs:
    configs = copy.deepcopy(CHECKPOINTS[name])
    configs[component] = {**configs.get(component, {}), **values}
    return configs


def test_it_is_standard_library_only() -> None:
    code = "import sys; import vidgen.models.cogvideox.spec; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("CogVideoX-2b", (480, 720, 49, 8.0)),
        ("CogVideoX-5b", (480, 720, 49, 8.0)),
        ("CogVideoX-5b-I2V", (480, 720, 49, 8.0)),
        ("CogVideoX1.5-5B", (768, 1360, 81, 16.0)),
        ("CogVideoX1.5-5B-I2V", (768, 1360, 81, 16.0)),
    ],
)
def test_defaults_are_the_model_cards(name: str, size: tuple[Any, ...]) -> None:
    made = request(name)
    assert (made.height, made.width, made.num_frames, made.fps) == size
    assert (made.num_inference_steps, made.guidance_scale, made.sampler, made.negative_prompt) == (50, 6.0, "ddim", "")
    assert dict(made.params) == {"strength": None, "use_dynamic_cfg": False}
    assert not spec.problems(made, params_of(name), {})


@pytest.mark.parametrize(("name", "frames"), [("CogVideoX-2b", 49), ("CogVideoX-5b", 49), ("CogVideoX1.5-5B", 80)])
def test_defaults_of_video_to_video_can_be_done(name: str, frames: int) -> None:
    made = request(name, "v2v")
    assert made.num_frames == frames and made.param("strength") == 0.8
    assert not spec.problems(made, params_of(name), {})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_task_is_the_checkpoints_or_refused(name: str) -> None:
    own = {"i2v"} if TASK[name] == "i2v" else {"t2v", "v2v"}
    for task in (*spec.TASKS, "t2i"):
        if task in own:
            assert set(spec.defaults(task, params_of(name))["params"]) == set(spec.PARAMS)
        else:
            with pytest.raises(ConfigError, match=f"'{task}' is not a task"):
                spec.defaults(task, params_of(name))
            found = spec.problems(replace(request(name), task=task), params_of(name), {})
            assert f"task is '{task}'; allowed: {', '.join(spec.tasks_of(params_of(name)))}" in found


@pytest.mark.parametrize(
    ("name", "task", "changes", "reason"),
    [
        ("CogVideoX-2b", "t2v", {"num_frames": 48}, "num_frames is 48; allowed: 1 + k x 8"),
        ("CogVideoX-2b", "t2v", {"num_frames": 5}, "num_frames is 5; allowed: 1 + k x 8"),
        ("CogVideoX-5b", "v2v", {"num_frames": 16}, "num_frames is 16; allowed: 1 + k x 8"),
        ("CogVideoX1.5-5B", "t2v", {"num_frames": 80}, "num_frames is 80; allowed: 1 + k x 8"),
        ("CogVideoX1.5-5B", "v2v", {"num_frames": 81}, "num_frames is 81; allowed: 8 + k x 8"),
        ("CogVideoX1.5-5B", "v2v", {"num_frames": 0}, "num_frames is 0; allowed: 8 + k x 8"),
        ("CogVideoX-2b", "t2v", {"height": 488}, "height is 488; allowed: positive multiples of 16"),
        ("CogVideoX-2b", "t2v", {"width": 0}, "width is 0"),
        ("CogVideoX1.5-5B", "t2v", {"height": 2416}, r"height is 2416; allowed: at most 2400 (150 positions)"),
        ("CogVideoX1.5-5B-I2V", "i2v", {"width": 2416}, "width is 2416; allowed: at most 2400"),
        ("CogVideoX-5b-I2V", "i2v", {"height": 464}, "height is 464; allowed: 480, because this checkpoint learned"),
        ("CogVideoX-5b-I2V", "i2v", {"width": 704}, "width is 704; allowed: 720"),
        ("CogVideoX-5b-I2V", "i2v", {"num_frames": 41}, "num_frames is 41; allowed: 49"),
        ("CogVideoX-2b", "t2v", {"video": MEDIA}, "video is given; t2v takes none"),
        ("CogVideoX-2b", "v2v", {"video": None}, "video is missing; v2v needs one"),
        ("CogVideoX-5b-I2V", "i2v", {"image": None}, "image is missing; i2v needs one"),
        ("CogVideoX-5b-I2V", "i2v", {"last_image": MEDIA}, "last_image is given"),
        ("CogVideoX-2b", "t2v", {"params": {"strength": 0.5}}, "params.strength is 0.5; only v2v has one"),
        ("CogVideoX-2b", "v2v", {"params": {"strength": None}}, "params.strength is missing; v2v needs one"),
        (
            "CogVideoX-2b",
            "v2v",
            {"params": {"strength": 1.5}},
            "params.strength is 1.5; allowed: more than 0, at most 1",
        ),
        ("CogVideoX-2b", "v2v", {"params": {"strength": 0.0}}, "params.strength is 0.0; allowed: more than 0"),
        ("CogVideoX-2b", "v2v", {"params": {"strength": 0.01}}, "leaves no step of num_inference_steps 50"),
        ("CogVideoX-2b", "v2v", {"params": {"strength": "half"}}, "params.strength is 'half'; it must be float"),
        ("CogVideoX-2b", "t2v", {"params": {"use_dynamic_cfg": 1}}, "params.use_dynamic_cfg is 1; it must be bool"),
        ("CogVideoX-2b", "t2v", {"params": {"eta": 0.0}}, "params.eta is not a parameter of this family"),
        ("CogVideoX-2b", "t2v", {"sampler": "unipc"}, "sampler is 'unipc'; allowed: ddim, dpm"),
        ("CogVideoX-2b", "t2v", {"shift": 3.0}, "shift is 3.0; CogVideoX's is part of the checkpoint"),
        ("CogVideoX-2b", "t2v", {"sigmas": (1.0,) * 50}, "sigmas is given; this family takes timesteps"),
        ("CogVideoX-2b", "t2v", {"num_inference_steps": 1001}, "num_inference_steps is 1001; allowed: 1 to 1000"),
        ("CogVideoX-2b", "t2v", {"num_inference_steps": 0}, "num_inference_steps is 0"),
        ("CogVideoX-2b", "t2v", {"timesteps": (999, 1)}, "timesteps has 2 values; num_inference_steps is 50"),
        ("CogVideoX-2b", "t2v", {"timesteps": (1000, 1), "num_inference_steps": 2}, "whole numbers from 1 to 999"),
        ("CogVideoX-2b", "t2v", {"timesteps": (9.5, 1), "num_inference_steps": 2}, "whole numbers from 1 to 999"),
        ("CogVideoX-2b", "t2v", {"guidance_scale": 0.5}, "guidance_scale is 0.5; allowed: 1"),
        ("CogVideoX-2b", "t2v", {"tiling": (240, 360, 200, 290)}, "tiling is (240, 360, 200, 290)"),
    ],
)
def test_a_broken_limit_is_named_with_its_reason(name: str, task: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in broken(name, task, **changes)


@pytest.mark.parametrize(
    ("name", "task", "changes"),
    [
        ("CogVideoX-2b", "t2v", {"height": 256, "width": 256, "num_frames": 1}),
        ("CogVideoX-5b", "t2v", {"height": 720, "width": 480, "num_frames": 57, "sampler": "dpm"}),
        ("CogVideoX1.5-5B", "t2v", {"num_frames": 161}),
        ("CogVideoX1.5-5B-I2V", "i2v", {"height": 1360, "width": 768}),
        ("CogVideoX-2b", "v2v", {"params": {"strength": 1}}),
        ("CogVideoX-2b", "t2v", {"timesteps": (999, 500, 20), "num_inference_steps": 3}),
        ("CogVideoX-2b", "t2v", {"params": {"use_dynamic_cfg": True}}),
    ],
)
def test_what_a_checkpoint_can_do_is_not_refused(name: str, task: str, changes: dict[str, Any]) -> None:
    assert broken(name, task, **changes) == ""


@pytest.mark.parametrize(
    ("name", "component", "values", "reason"),
    [
        (
            "CogVideoX-2b",
            "transformer",
            {"in_channels": 33},
            "in_channels is 33; allowed: the VAE's latent_channels, 16",
        ),
        ("CogVideoX-2b", "transformer", {"out_channels": 32}, "out_channels is 32; allowed: the VAE's latent_channels"),
        ("CogVideoX-2b", "transformer", {"text_embed_dim": 768}, "text_embed_dim is 768; allowed: the text encoder's"),
        ("CogVideoX-2b", "transformer", {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8"),
        ("CogVideoX-2b", "transformer", {"ofs_embed_dim": 512}, "ofs_embed_dim is 512; it belongs to image-to-video"),
        ("CogVideoX1.5-5B-I2V", "transformer", {"ofs_embed_dim": 256}, "ofs_embed_dim is 256; allowed: null, or"),
        ("CogVideoX-2b", "transformer", {"patch_size_t": 4}, "patch_size_t is 4; allowed: None, 2"),
        ("CogVideoX-2b", "transformer", {"patch_size_t": 2}, "patch_size_t is 2; such a checkpoint has rotary"),
        ("CogVideoX-2b", "transformer", {"use_learned_positional_embeddings": True}, "needs use_rotary"),
        ("CogVideoX-2b", "transformer", {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ("CogVideoX-2b", "transformer", {"timestep_activation_fn": "gelu"}, "timestep_activation_fn is 'gelu'"),
        ("CogVideoX-2b", "transformer", {"norm_elementwise_affine": False}, "norm_elementwise_affine is False"),
        ("CogVideoX-2b", "transformer", {"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ("CogVideoX-2b", "transformer", {"freq_shift": 1}, "freq_shift is 1"),
        (
            "CogVideoX-5b",
            "transformer",
            {"attention_head_dim": 40},
            "attention_head_dim is 40; allowed: multiples of 16",
        ),
        ("CogVideoX-2b", "transformer", {"attention_head_dim": 4}, "the width is 120"),
        ("CogVideoX-2b", "transformer", {"is_magic": True}, "is_magic is True, which is not known"),
        ("CogVideoX-2b", "transformer", {"num_layers": None}, "num_layers is missing"),
        ("CogVideoX-2b", "vae", {"use_quant_conv": True}, "use_quant_conv is True"),
        ("CogVideoX-2b", "vae", {"latents_mean": [0.1]}, "latents_mean is"),
        ("CogVideoX-2b", "vae", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ("CogVideoX-2b", "vae", {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; allowed: 4"),
        ("CogVideoX-2b", "vae", {"up_block_types": ["Other"] * 4}, "up_block_types is"),
        (
            "CogVideoX-2b",
            "vae",
            {"block_out_channels": [8, 8], "down_block_types": None, "up_block_types": None},
            "so 3",
        ),
        ("CogVideoX-2b", "vae", {"is_magic": 1}, "is_magic is 1, which is not known"),
        ("CogVideoX-2b", "scheduler", {"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler'"),
        ("CogVideoX-2b", "scheduler", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("CogVideoX-2b", "scheduler", {"prediction_type": "epsilon"}, "rescale_betas_zero_snr is true with"),
        ("CogVideoX-2b", "scheduler", {"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ("CogVideoX-2b", "scheduler", {"beta_schedule": "exp"}, "beta_schedule is 'exp'"),
        ("CogVideoX-2b", "scheduler", {"trained_betas": [0.1]}, "trained_betas is"),
        ("CogVideoX-2b", "scheduler", {"steps_offset": 1}, "steps_offset is 1"),
        ("CogVideoX-2b", "scheduler", {"set_alpha_to_one": False}, "set_alpha_to_one is False"),
        ("CogVideoX-2b", "text_encoder", {"model_type": "clip"}, "model_type is 'clip'"),
        ("CogVideoX-2b", "model_index", {"vae": ["diffusers", "AutoencoderKL"]}, "component vae is AutoencoderKL"),
        ("CogVideoX-2b", "vidgen", {"defaults": {"steps": 3}}, "defaults.steps is unknown"),
    ],
)
def test_an_option_that_is_not_honoured_is_refused_by_name(
    name: str, component: str, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        spec.read(with_change(name, component, **values))
    assert reason in str(error.value)


def test_a_missing_file_is_named() -> None:
    configs = copy.deepcopy(CHECKPOINTS["CogVideoX-2b"])
    del configs["vae"]
    with pytest.raises(CheckpointError, match=r"vae/config.json is missing"):
        spec.read(configs)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_counted_as_the_modules_have_them(name: str) -> None:
    params = params_of(name)
    with torch.device("meta"):
        transformer, vae = CogVideoXTransformer3DModel(params.transformer), CogVideoXVAE(params.vae)
    assert spec.transformer_weights(params.transformer) == sum(w.numel() for w in transformer.state_dict().values())
    assert spec.vae_weights(params.vae) == sum(w.numel() for w in vae.state_dict().values())
    assert params.dtypes[0] == ("transformer", "float16" if name == "CogVideoX-2b" else "bfloat16")
    billions = spec.transformer_weights(params.transformer) / 1e9
    assert billions == pytest.approx(1.69 if name == "CogVideoX-2b" else 5.57, rel=0.015)
    # T5 v1.1 xxl's encoder has 4.76 billion, the autoencoder 0.216.
    assert spec.weight_bytes(params) == pytest.approx(2e9 * (billions + 4.76 + 0.216), rel=1e-3)


@pytest.mark.parametrize("kind", tiny_checkpoint.KINDS)
def test_weight_bytes_are_those_of_the_files(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint.build(tmp_path, kind)
    names = {"model_index": folder / "model_index.json", "scheduler": folder / "scheduler/scheduler_config.json"}
    names |= {name: folder / name / "config.json" for name in ("transformer", "vae", "text_encoder")}
    params = spec.read({name: json.loads(path.read_text()) for name, path in names.items()})
    stored = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            stored += sum(4 * math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert spec.weight_bytes(params) == stored


@pytest.mark.parametrize(
    ("name", "task", "changes"),
    [
        ("CogVideoX-2b", "t2v", {}),
        ("CogVideoX-5b", "t2v", {"height": 240, "width": 368, "num_frames": 17}),
        ("CogVideoX-5b-I2V", "i2v", {}),
        ("CogVideoX1.5-5B", "t2v", {"height": 256, "width": 384, "num_frames": 17, "guidance_scale": 1.0}),
        ("CogVideoX1.5-5B-I2V", "i2v", {"height": 256, "width": 384, "num_frames": 9}),
        ("CogVideoX-2b", "v2v", {"params": {"strength": 0.5}}),
    ],
)
def test_flops_are_what_torch_counts(name: str, task: str, changes: dict[str, Any]) -> None:
    params, made = params_of(name), request(name, task, **changes)
    latent = spec.latent_frames(made, params) + spec.added_frames(made, params)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(params.transformer).eval()
        x = torch.empty(1, latent, params.transformer.in_channels, made.height // 8, made.width // 8)
        text, time = torch.empty(1, params.text_tokens, params.transformer.width), torch.empty(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(x, time, text)
    forwards = (1 if made.guidance_scale == 1 else 2) * (25 if task == "v2v" else 50)
    assert spec.flops(made, params) == pytest.approx(counter.get_total_flops() * forwards, rel=0.01)


def test_a_forward_of_the_5b_costs_what_is_known() -> None:
    made = request("CogVideoX-5b")
    assert spec.tokens(made, params_of("CogVideoX-5b")) == 17_550
    assert spec.flops(made, params_of("CogVideoX-5b")) / 100 == pytest.approx(332e12, rel=0.03)
    assert spec.tokens(request("CogVideoX1.5-5B"), params_of("CogVideoX1.5-5B")) == 11 * 48 * 85


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tiles_are_the_oracles_own(name: str) -> None:
    params = params_of(name)
    config = {key: value for key, value in CHECKPOINTS[name]["vae"].items() if not key.startswith("_")}
    with torch.device("meta"):
        oracle = AutoencoderKLCogVideoX(**config)
    tiles = spec.tiling("on", request(name), params)
    assert tiles == (240, 360, 200, 288)
    assert tiles[:2] == (oracle.tile_sample_min_height, oracle.tile_sample_min_width)
    factors = (oracle.tile_overlap_factor_height, oracle.tile_overlap_factor_width)
    latent = (oracle.tile_latent_min_height, oracle.tile_latent_min_width)
    assert tiles[2:] == tuple(8 * int(size * (1 - factor)) for size, factor in zip(latent, factors, strict=True))
    assert tiles[2:] == tuple(size - int(size * factor) for size, factor in zip(tiles[:2], factors, strict=True))
    assert spec.tiling("auto", request(name), params) is None and spec.tiling("off", request(name), params) is None
    assert spec.tiling("on", replace(request(name), height=240, width=352), params) is None
    assert spec.tiling("auto", replace(request(name), height=1360, width=784), params) == tiles
    with pytest.raises(ConfigError, match="vae_tiling"):
        spec.tiling("maybe", request(name), params)


def test_items_of_another_shape_schedule_strength_or_task_do_not_share_a_batch() -> None:
    name = "CogVideoX-5b"
    params, plain = params_of(name), request(name, "v2v")
    others = [
        request(name),
        request(name, "v2v", num_frames=17),
        request(name, "v2v", sampler="dpm"),
        request(name, "v2v", num_inference_steps=30),
        request(name, "v2v", guidance_scale=1.0),
        request(name, "v2v", params={"strength": 0.5}),
        request(name, "v2v", params={"use_dynamic_cfg": True}),
    ]
    keys = {spec.batch_key(made, params) for made in (plain, *others)}
    assert len(keys) == 8
    alike = replace(plain, prompt="another", seed=9, guidance_scale=3.0, negative_prompt="z")
    assert spec.batch_key(alike, params) == spec.batch_key(plain, params)


def test_a_prompt_may_have_as_many_tokens_as_the_transformer_was_trained_with() -> None:
    assert spec.text_limit(params_of("CogVideoX-2b")) == ("tokenizer", 226)
    assert spec.frames_out(request("CogVideoX1.5-5B")) == 81
    assert spec.added_frames(request("CogVideoX1.5-5B"), params_of("CogVideoX1.5-5B")) == 1
    assert spec.added_frames(request("CogVideoX1.5-5B", "v2v"), params_of("CogVideoX1.5-5B")) == 0
    assert spec.added_frames(request("CogVideoX-5b"), params_of("CogVideoX-5b")) == 0
