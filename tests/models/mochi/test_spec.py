"""What spec.py reads, refuses, limits and counts, checked against the modules it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMochi
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from tests.models.mochi import published, tiny_checkpoint
from tests.models.published import T5_XXL, t5_xxl
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.mochi import spec
from vidgen.models.mochi.transformer import MochiTransformer3DModel
from vidgen.models.mochi.vae import MochiVAE
from vidgen.types import Media, Request

Configs = dict[str, dict[str, Any]]


def full_size() -> Configs:
    """The parsed JSON files of genmo/mochi-1-preview."""
    return {
        "model_index": dict(published.MODEL_INDEX),
        "transformer": dict(published.TRANSFORMER),
        "vae": dict(published.VAE),
        "text_encoder": t5_xxl("float32"),
        "scheduler": dict(published.SCHEDULER),
    }


def with_change(component: str, **values: Any) -> Configs:
    configs = full_size()
    configs[component] = {**configs.get(component, {}), **values}
    return configs


def request(**values: Any) -> Request:
    base = Request(
        task="t2v",
        prompt="a red circle",
        negative_prompt="",
        seed=7,
        height=32,
        width=48,
        num_frames=13,
        fps=8.0,
        num_inference_steps=4,
        guidance_scale=4.5,
        sampler="euler",
        shift=1.0,
    )
    return replace(base, **values)


PARAMS = spec.read(full_size())


def test_sizes_are_those_of_the_config_files() -> None:
    assert (PARAMS.transformer.width, PARAMS.transformer.ffn_dim, PARAMS.transformer.text_ffn_dim) == (3072, 8192, 4096)
    assert PARAMS.transformer.out_channels == 12
    assert (PARAMS.vae.temporal_factor, PARAMS.vae.spatial_factor) == (6, 8)
    assert PARAMS.scheduler.invert_sigmas and PARAMS.scheduler.sampler == "euler"
    assert not PARAMS.zero_empty_prompt
    assert spec.read(with_change("model_index", force_zeros_for_empty_prompt=True)).zero_empty_prompt
    assert hash(PARAMS) == hash(spec.read(full_size()))


def test_every_config_that_diffusers_writes_is_read(tmp_path: Path) -> None:
    tiny_checkpoint.build(tmp_path)
    names = {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}
    parts = ("model_index", "transformer", "vae", "text_encoder", "scheduler")
    params = spec.read({n: json.loads((tmp_path / names.get(n, f"{n}/config.json")).read_text()) for n in parts})
    assert params.transformer.num_layers == 3 and params.vae.scaling_factor == 1.25
    stored = 0
    for component in ("transformer", "vae", "text_encoder"):
        for path in (tmp_path / component).glob("*.safetensors"):
            with safe_open(str(path), framework="pt") as file:
                stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (not a mapping)
    assert spec.weight_bytes(params) == stored


def test_reading_and_counting_import_no_torch() -> None:
    code = "import sys, vidgen.models.mochi.spec; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("component", "option", "value"),
    [
        ("model_index", "vae", ["diffusers", "AutoencoderKLWan"]),
        ("model_index", "transformer", ["diffusers", "WanTransformer3DModel"]),
        ("model_index", "text_encoder", ["transformers", "UMT5EncoderModel"]),
        ("model_index", "scheduler", ["diffusers", "UniPCMultistepScheduler"]),
        ("transformer", "qk_norm", None),
        ("transformer", "qk_norm", "layer_norm"),
        ("transformer", "activation_fn", "gelu"),
        ("transformer", "in_channels", 16),
        ("transformer", "out_channels", 5),
        ("transformer", "text_embed_dim", 2048),
        ("transformer", "text_embed_dim", 4097),
        ("transformer", "num_layers", None),
        ("transformer", "attention_head_dim", 15),
        ("transformer", "time_embed_dim", 255),
        ("transformer", "quantization_config", {"quant_method": "torchao"}),
        ("vae", "in_channels", 3),
        ("vae", "act_fn", "relu"),
        ("vae", "latents_mean", None),
        ("vae", "latents_mean", [0.0] * 3),
        ("vae", "latents_std", [1.0] * 16),
        ("vae", "layers_per_block", [3, 3, 4, 6]),
        ("vae", "temporal_expansions", [2, 3]),
        ("vae", "spatial_expansions", [2, 2, 2, 2]),
        ("vae", "add_attention_block", [True]),
        ("vae", "decoder_block_out_channels", [128, 256, 512]),
        ("vae", "decoder_block_out_channels", [128, 256, 512, 700]),
        ("vae", "encoder_block_out_channels", [48, 64, 64, 64]),
        ("vae", "an_option_of_tomorrow", "on"),
        ("scheduler", "_class_name", "UniPCMultistepScheduler"),
        ("scheduler", "invert_sigmas", False),
        ("scheduler", "use_dynamic_shifting", True),
        ("scheduler", "use_karras_sigmas", True),
        ("scheduler", "stochastic_sampling", True),
        ("text_encoder", "model_type", "llama"),
        ("text_encoder", "d_ff", None),
        ("vidgen", "defaults", {"heigth": 64}),
        ("vidgen", "dtype", "int3"),
    ],
)
def test_an_option_we_do_not_support_is_refused_by_name(component: str, option: str, value: Any) -> None:
    named = next(iter(value)) if option == "defaults" else option
    with pytest.raises(CheckpointError, match=named):
        spec.read(with_change(component, **{option: value}))


@pytest.mark.parametrize("component", ["model_index", "transformer", "vae", "text_encoder", "scheduler"])
def test_a_missing_component_is_named(component: str) -> None:
    configs = full_size()
    del configs[component]
    with pytest.raises(CheckpointError, match=component):
        spec.read(configs)


def test_defaults_are_the_published_recipe() -> None:
    values = spec.defaults("t2v", PARAMS)
    assert (values["height"], values["width"], values["num_frames"], values["fps"]) == (480, 848, 85, 30)
    assert (values["num_inference_steps"], values["guidance_scale"], values["negative_prompt"]) == (64, 4.5, "")
    assert (values["sampler"], values["shift"], values["sigmas"], values["params"]) == ("euler", 1.0, None, {})
    assert spec.problems(request(**{**values, "params": ()}), PARAMS, {}) == []
    with pytest.raises(ConfigError, match=r"'i2v'.*t2v"):
        spec.defaults("i2v", PARAMS)


def test_a_checkpoint_brings_its_own_recipe_text_limit_shift_and_dtype() -> None:
    own = {"height": 64, "width": 64, "num_frames": 19, "fps": 8, "num_inference_steps": 20, "guidance_scale": 3.5}
    configs = with_change("vidgen", defaults=own, max_text_tokens=32, dtype="bfloat16")
    configs["scheduler"]["shift"] = 2.0
    params = spec.read(configs)
    assert spec.defaults("t2v", params) == {**spec.defaults("t2v", PARAMS), **own, "shift": 2.0}
    assert spec.text_limit(params) == ("tokenizer", 32)
    assert spec.text_limit(PARAMS) == ("tokenizer", 256)
    assert 2 * spec.weight_bytes(params) == spec.weight_bytes(PARAMS)


def test_a_good_request_has_no_problems() -> None:
    assert spec.problems(request(), PARAMS, {}) == []
    assert spec.problems(request(sigmas=(1.0, 0.7, 0.4, 0.1), shift=3.0), PARAMS, {}) == []
    assert spec.problems(request(num_frames=1, guidance_scale=1.0, num_inference_steps=2), PARAMS, {}) == []
    assert spec.problems(request(num_inference_steps=1, sigmas=(1.0,)), PARAMS, {}) == []
    assert spec.frames_out(request(num_frames=19)) == 19


MEDIA = Media(url="x.png", digest="")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "i2v"}, "task is 'i2v'; allowed: t2v"),
        ({"image": MEDIA}, "image is given"),
        ({"last_image": MEDIA}, "last_image is given"),
        ({"video": MEDIA}, "video is given"),
        ({"params": (("strength", 0.5),)}, "params.strength is not a parameter"),
        ({"seed": -1}, "seed is -1"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; allowed: 1"),
        ({"num_frames": 12}, "num_frames is 12; allowed: 1 + k x 6"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": -5}, "num_frames is -5"),
        ({"height": 40}, "height is 40; allowed: positive multiples of 16"),
        ({"height": 0}, "height is 0"),
        ({"width": 24}, "width is 24; allowed: positive multiples of 16"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 1000"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1; allowed: 2 or more, or explicit sigmas"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"sampler": "unipc"}, "sampler is 'unipc'; allowed: euler"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"sigmas": (1.0, 0.5)}, "sigmas has 2 values; num_inference_steps is 4"),
        ({"sigmas": (1.0, 0.5, 0.5, 0.1)}, "sigmas is [1.0, 0.5, 0.5, 0.1]; allowed: strictly falling"),
        ({"timesteps": (900.0, 800.0, 3.0, 2.0)}, "timesteps is given; this family takes sigmas"),
        ({"tiling": (256, 256, 200, 190)}, "tiling is (256, 256, 200, 190)"),
        ({"tiling": (64, 64, 72, 64)}, "stride at most the tile"),
    ],
)
def test_each_limit_rejects_with_the_value_and_the_allowed_ones(change: dict[str, Any], reason: str) -> None:
    found = spec.problems(request(**change), PARAMS, {})
    assert len(found) == 1 and reason in found[0], found


def test_sizes_follow_the_checkpoints_own_factors() -> None:
    configs = with_change("vae", temporal_expansions=[1, 2, 2], spatial_expansions=[1, 2, 2])
    configs["transformer"]["patch_size"] = 1
    params = spec.read(configs)
    assert spec.problems(request(height=36, width=4, num_frames=9), params, {}) == []
    assert spec.tokens(request(height=36, width=4, num_frames=9), params) == 9 * 3


def test_tiles_depend_on_the_shape_and_the_mode_alone() -> None:
    small, hd, large = request(height=256, width=256), request(height=720, width=1280), request(height=736, width=1280)
    tiles = (256, 256, 192, 192)
    assert [spec.tiling("auto", r, PARAMS) for r in (small, hd, large)] == [None, None, tiles]
    assert [spec.tiling("on", r, PARAMS) for r in (small, hd, large)] == [None, tiles, tiles]
    assert [spec.tiling("off", r, PARAMS) for r in (small, hd, large)] == [None, None, None]
    with pytest.raises(ConfigError, match="'yes'"):
        spec.tiling("yes", small, PARAMS)


def test_default_tiles_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLMochi()
    assert (
        vae.tile_sample_min_height,
        vae.tile_sample_min_width,
        vae.tile_sample_stride_height,
        vae.tile_sample_stride_width,
    ) == spec.DEFAULT_TILES


def test_items_share_a_batch_when_only_words_seed_and_guidance_strength_differ() -> None:
    key = spec.batch_key(request(), PARAMS)
    same: list[dict[str, Any]] = [{"prompt": "b"}, {"negative_prompt": "b"}, {"seed": 8}, {"guidance_scale": 3.0}]
    assert {spec.batch_key(request(**change), PARAMS) for change in same} == {key}
    other: list[dict[str, Any]] = [
        {"height": 64},
        {"num_frames": 7},
        {"num_inference_steps": 5},
        {"shift": 5.0},
        {"sigmas": (1.0, 0.7, 0.4, 0.1)},
        {"guidance_scale": 1.0},
        {"tiling": (16, 16, 8, 8)},
    ]
    assert len({spec.batch_key(request(**change), PARAMS) for change in other} | {key}) == len(other) + 1


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("scale", [4.5, 1.0])
@pytest.mark.parametrize("zero", [True, False])
def test_flops_are_what_torch_counts_in_the_forwards(layers: int, patch: int, scale: float, zero: bool) -> None:
    configs = with_change("transformer", num_layers=layers, patch_size=patch)
    configs["model_index"]["force_zeros_for_empty_prompt"] = zero
    params = spec.read(configs)
    asked, counted = request(guidance_scale=scale), 0
    with torch.device("meta"):
        model = MochiTransformer3DModel(params.transformer)
        latents, timestep = torch.empty(1, 12, 3, 4, 6), torch.empty(1)
        # "a red circle" and its closing token, and a negative prompt that has none or one.
        for length in (4, 0 if zero else 1)[: 2 if scale > 1 else 1]:
            with torch.no_grad():
                context = model.text_context(torch.empty(1, length, params.text.d_model))
                with FlopCounterMode(display=False) as counter:
                    model(latents, timestep, context)
            counted += counter.get_total_flops()
    # Both count 2 per multiply-add and nothing elementwise, so nothing but a term left out could differ.
    assert spec.flops(asked, params) == pytest.approx(counted * asked.num_inference_steps, rel=1e-9)
    assert spec.tokens(asked, params) == 3 * 4 * 6 // patch**2


def test_cost_of_the_published_model() -> None:
    changes = {"height": 480, "width": 848, "num_frames": 85, "num_inference_steps": 1, "guidance_scale": 1.0}
    short, long = request(**changes), request(**changes, prompt="word " * 500)
    assert spec.tokens(long, PARAMS) == 15 * 30 * 53
    # The reference number is rounded to a teraflop, and is that of a prompt of 256 tokens.
    assert spec.flops(long, PARAMS) / 1e12 == pytest.approx(603, abs=0.5)
    assert 0.98 < spec.flops(short, PARAMS) / spec.flops(long, PARAMS) < 1


def numbers(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {}),
        ("transformer", {"patch_size": 1, "num_layers": 1, "attention_head_dim": 64, "time_embed_dim": 128}),
        ("vae", {"add_attention_block": [True, False, False, True, False], "layers_per_block": [1, 2, 1, 3, 2]}),
        ("vae", {"spatial_expansions": [1, 2, 4], "temporal_expansions": [2, 1, 2], "latent_channels": 12}),
        ("text_encoder", {"feed_forward_proj": "relu"}),
    ],
)
def test_weight_bytes_equal_the_parameters_of_every_variant(component: str, change: dict[str, Any]) -> None:
    configs = with_change(component, **change)
    params = spec.read(configs)
    values = {key: configs["text_encoder"][key] for key in T5_XXL}
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**values))
        total = numbers(MochiTransformer3DModel(params.transformer)) + numbers(MochiVAE(params.vae)) + numbers(encoder)
    assert spec.weight_bytes(params) == 4 * total


def test_the_published_model_has_ten_billion_parameters() -> None:
    assert spec.transformer_weights(PARAMS.transformer) == pytest.approx(10.03e9, rel=1e-3)
