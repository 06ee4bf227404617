"""What spec.py reads, refuses, limits and counts, checked against the modules it counts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers import WanTransformer3DModel as OracleTransformer
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.wan import spec
from vidgen.models.wan.transformer import WanTransformer3DModel
from vidgen.models.wan.vae import WanVAE
from vidgen.types import Media, Request

Configs = dict[str, dict[str, Any]]


def tiny() -> Configs:
    """The parsed JSON files of a tiny checkpoint, as a Diffusers folder holds them."""
    return {
        "model_index": {
            "_class_name": "WanPipeline",
            "boundary_ratio": None,
            "expand_timesteps": False,
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": [None, None],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "transformer": {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": None,
            "attention_head_dim": 16,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "ffn_dim": 48,
            "freq_dim": 32,
            "image_dim": None,
            "in_channels": 4,
            "num_attention_heads": 2,
            "num_layers": 2,
            "out_channels": 4,
            "patch_size": [1, 2, 2],
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 64,
            "text_dim": 24,
        },
        "vae": {
            "_class_name": "AutoencoderKLWan",
            "attn_scales": [],
            "base_dim": 8,
            "dim_mult": [1, 2, 2, 2],
            "dropout": 0.0,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "z_dim": 4,
        },
        "text_encoder": UMT5Config(
            d_model=24, d_kv=8, d_ff=40, num_heads=2, num_layers=3, vocab_size=50, feed_forward_proj="gated-gelu"
        ).to_dict(),
        "scheduler": {
            **UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).config,
            "_class_name": "UniPCMultistepScheduler",
        },
    }


def with_change(component: str, **values: Any) -> Configs:
    configs = tiny()
    configs[component] = {**configs.get(component, {}), **values}
    return configs


def full_size(heads: int, ffn: int, layers: int) -> Configs:
    configs = with_change(
        "transformer",
        attention_head_dim=128,
        ffn_dim=ffn,
        freq_dim=256,
        in_channels=16,
        num_attention_heads=heads,
        num_layers=layers,
        out_channels=16,
        rope_max_seq_len=1024,
        text_dim=4096,
    )
    configs["vae"] |= {"base_dim": 96, "z_dim": 16, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]}
    configs["vae"] |= {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    configs["text_encoder"] = UMT5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=256384, dtype="bfloat16"
    ).to_dict()
    return configs


def request(**values: Any) -> Request:
    base = Request(
        task="t2v",
        prompt="a red circle",
        negative_prompt="",
        seed=7,
        height=32,
        width=48,
        num_frames=9,
        fps=8.0,
        num_inference_steps=4,
        guidance_scale=5.0,
        sampler="unipc",
        shift=3.0,
    )
    return replace(base, **values)


PARAMS = spec.read(tiny())


def test_sizes_are_those_of_the_config_files() -> None:
    assert PARAMS.transformer.width == 32
    assert PARAMS.transformer.patch_size == (1, 2, 2)
    assert (PARAMS.vae.temporal_factor, PARAMS.vae.spatial_factor) == (4, 8)
    assert PARAMS.vae.patch_size == 1 and PARAMS.vae.in_channels == 3 and PARAMS.vae.decoder_base_dim == 8
    assert PARAMS.scheduler == spec.scheduler_params(tiny()["scheduler"])
    assert (PARAMS.scheduler.sampler, PARAMS.scheduler.shift, PARAMS.scheduler.solver_order) == ("unipc", 3.0, 2)
    assert hash(PARAMS) == hash(spec.read(tiny()))


def test_every_config_that_diffusers_writes_is_read() -> None:
    with torch.device("meta"):
        transformer, vae = OracleTransformer().config, AutoencoderKLWan().config
    scheduler = {**FlowMatchEulerDiscreteScheduler().config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert spec.transformer_params(dict(transformer)).num_layers == transformer["num_layers"]
    assert spec.vae_params(dict(vae)).z_dim == vae["z_dim"]
    assert spec.scheduler_params(scheduler).sampler == "euler"


def test_reading_and_counting_import_no_torch() -> None:
    code = "import sys, vidgen.models.wan.spec; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("component", "option", "value"),
    [
        ("model_index", "expand_timesteps", True),
        ("model_index", "boundary_ratio", 0.875),
        ("model_index", "transformer_2", ["diffusers", "WanTransformer3DModel"]),
        ("model_index", "image_encoder", ["transformers", "CLIPVisionModel"]),
        ("model_index", "vae", ["diffusers", "AutoencoderKLMochi"]),
        ("transformer", "image_dim", 1280),
        ("transformer", "added_kv_proj_dim", 5120),
        ("transformer", "pos_embed_seq_len", 514),
        ("transformer", "qk_norm", None),
        ("transformer", "qk_norm", "layer_norm"),
        ("transformer", "in_channels", 36),
        ("transformer", "out_channels", 5),
        ("transformer", "text_dim", 25),
        ("transformer", "num_layers", None),
        ("transformer", "attention_head_dim", 15),
        ("transformer", "quantization_config", {"quant_method": "torchao"}),
        ("vae", "is_residual", True),
        ("vae", "base_dim", None),
        ("vae", "temperal_downsample", [True]),
        ("vae", "latents_mean", [0.0] * 3),
        ("vae", "latents_std", [1.0] * 5),
        ("vae", "scale_factor_spatial", 16),
        ("vae", "scale_factor_temporal", 8),
        ("vae", "an_option_of_tomorrow", "on"),
        ("scheduler", "_class_name", "DDIMScheduler"),
        ("scheduler", "prediction_type", "epsilon"),
        ("scheduler", "use_flow_sigmas", False),
        ("scheduler", "predict_x0", False),
        ("scheduler", "use_karras_sigmas", True),
        ("scheduler", "use_exponential_sigmas", True),
        ("scheduler", "use_beta_sigmas", True),
        ("scheduler", "use_dynamic_shifting", True),
        ("scheduler", "thresholding", True),
        ("scheduler", "solver_p", {"_class_name": "DDIMScheduler"}),
        ("scheduler", "solver_order", 4),
        ("scheduler", "solver_type", "heun"),
        ("scheduler", "final_sigmas_type", "last"),
        ("scheduler", "lower_order_final", False),
        ("text_encoder", "model_type", "llama"),
        ("text_encoder", "d_ff", None),
        ("vidgen", "defaults", {"heigth": 64}),
        ("vidgen", "defaults", {"height": "64"}),
        ("vidgen", "dtype", "int3"),
    ],
)
def test_an_option_we_do_not_support_is_refused_by_name(component: str, option: str, value: Any) -> None:
    named = next(iter(value)) if option == "defaults" else option
    with pytest.raises(CheckpointError, match=named):
        spec.read(with_change(component, **{option: value}))


@pytest.mark.parametrize("component", ["model_index", "transformer", "vae", "text_encoder", "scheduler"])
def test_a_missing_component_is_named(component: str) -> None:
    configs = tiny()
    del configs[component]
    with pytest.raises(CheckpointError, match=component):
        spec.read(configs)


def test_defaults_are_the_published_recipe() -> None:
    values = spec.defaults("t2v", PARAMS)
    assert (values["height"], values["width"], values["num_frames"], values["fps"]) == (480, 832, 81, 16)
    assert (values["num_inference_steps"], values["guidance_scale"]) == (50, 5.0)
    assert values["negative_prompt"].startswith("Bright tones, overexposed")
    assert (values["sampler"], values["shift"], values["params"]) == ("unipc", 3.0, {})
    with pytest.raises(ConfigError, match=r"'i2v'.*t2v"):
        spec.defaults("i2v", PARAMS)


def test_a_checkpoint_brings_its_own_recipe_text_limit_and_dtype() -> None:
    own = {"height": 64, "width": 64, "num_frames": 17, "fps": 8, "num_inference_steps": 20, "guidance_scale": 4}
    configs = with_change("vidgen", defaults={**own, "negative_prompt": ""}, max_text_tokens=32, dtype="bfloat16")
    params = spec.read(configs)
    assert spec.defaults("t2v", params) == {**spec.defaults("t2v", PARAMS), **own, "negative_prompt": ""}
    assert spec.text_limit(params) == ("tokenizer", 32)
    assert spec.text_limit(PARAMS) == ("tokenizer", 512)
    assert 2 * spec.weight_bytes(params) == spec.weight_bytes(PARAMS)


def test_sampler_and_shift_default_to_the_checkpoints_scheduler() -> None:
    configs = tiny()
    configs["scheduler"] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    values = spec.defaults("t2v", spec.read(configs))
    assert (values["sampler"], values["shift"]) == ("euler", 5.0)


def test_a_good_request_has_no_problems() -> None:
    assert spec.problems(request(), PARAMS, {}) == []
    explicit = request(sampler="euler", sigmas=(1.0, 0.7, 0.4, 0.1), timesteps=(1000.0, 700.0, 400.0, 100.0))
    assert spec.problems(explicit, PARAMS, {}) == []
    assert spec.problems(request(num_frames=1, guidance_scale=1.0, num_inference_steps=1), PARAMS, {}) == []


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
        ({"seed": 2**48}, "seed is 281474976710656"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; allowed: 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_frames": 10}, "num_frames is 10; allowed: 1 + k x 4"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": -3}, "num_frames is -3"),
        ({"num_frames": 257}, "num_frames is 257; allowed: at most 253"),
        ({"height": 40}, "height is 40; allowed: positive multiples of 16"),
        ({"height": 0}, "height is 0"),
        ({"width": 24}, "width is 24; allowed: positive multiples of 16"),
        ({"width": -16}, "width is -16"),
        ({"height": 1040}, "height is 1040; allowed: at most 1024"),
        ({"width": 1040}, "width is 1040; allowed: at most 1024"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; allowed: unipc, euler"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"sigmas": (1.0, 0.5)}, "sigmas has 2 values; num_inference_steps is 4"),
        ({"sigmas": (1.0, 0.5, 0.5, 0.1)}, "sigmas is [1.0, 0.5, 0.5, 0.1]; allowed: strictly falling"),
        ({"sigmas": (1.1, 0.5, 0.4, 0.1)}, "at most 1"),
        ({"sigmas": (1.0, 0.5, 0.4, 0.0)}, "more than 0"),
        ({"sigmas": (1.0, float("nan"), 0.4, 0.1)}, "sigmas is"),
        ({"sampler": "euler", "timesteps": (900.0, 800.0)}, "timesteps has 2 values"),
        ({"sampler": "euler", "timesteps": (1e4, 800.0, 3.0, 2.0)}, "at most 1000"),
        ({"timesteps": (900.0, 800.0, 3.0, 2.0)}, "timesteps is given; sampler 'unipc'"),
        ({"tiling": (256, 256, 200, 190)}, "tiling is (256, 256, 200, 190)"),
        ({"tiling": (64, 64, 72, 64)}, "stride at most the tile"),
    ],
)
def test_each_limit_rejects_with_the_value_and_the_allowed_ones(change: dict[str, Any], reason: str) -> None:
    found = spec.problems(request(**change), PARAMS, {})
    assert len(found) == 1 and reason in found[0], found


def test_all_broken_rules_are_reported_at_once() -> None:
    assert len(spec.problems(request(height=33, num_frames=10, seed=-1, sampler="x"), PARAMS, {})) == 4


def test_frame_counts_follow_the_checkpoints_own_temporal_factor() -> None:
    configs = with_change("vae", temperal_downsample=[False, False, True])
    two = spec.read(configs)
    assert spec.problems(request(num_frames=7), two, {}) == []
    assert spec.problems(request(num_frames=8), two, {}) == ["num_frames is 8; allowed: 1 + k x 2"]
    configs["transformer"]["patch_size"] = [2, 2, 2]
    pairs = spec.read(configs)
    assert [n for n in range(-2, 14) if not spec.problems(request(num_frames=n), pairs, {})] == [3, 7, 11]


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
        vae = AutoencoderKLWan()
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
        {"width": 32},
        {"num_frames": 5},
        {"num_inference_steps": 5},
        {"sampler": "euler"},
        {"shift": 5.0},
        {"sigmas": (1.0, 0.7, 0.4, 0.1)},
        {"timesteps": (1000.0, 700.0, 400.0, 100.0)},
        {"guidance_scale": 1.0},
        {"tiling": (16, 16, 8, 8)},
    ]
    assert len({spec.batch_key(request(**change), PARAMS) for change in other} | {key}) == len(other) + 1


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_flops_equal_what_torch_counts_in_a_forward_times_forwards(patch: tuple[int, int, int], scale: float) -> None:
    params = spec.read(with_change("transformer", patch_size=list(patch)))
    asked = request(guidance_scale=scale)
    with torch.device("meta"):
        model = WanTransformer3DModel(params.transformer)
        text = torch.empty(1, params.text_tokens, params.text.d_model)
        latents, timestep = torch.empty(1, 4, 3, 4, 6), torch.empty(1)
    context = model.text_context(text)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, timestep, context)
    forwards = asked.num_inference_steps * (2 if scale > 1 else 1)
    # Both count 2 per multiply-add and nothing elementwise, so nothing but a term left out could differ.
    assert spec.flops(asked, params) == pytest.approx(counter.get_total_flops() * forwards, rel=1e-9)
    assert spec.tokens(asked, params) == 3 * 4 * 6 // (patch[1] * patch[2])


@pytest.mark.parametrize(
    ("sizes", "shape", "tokens", "teraflops"),
    [
        ((12, 8960, 30), (480, 832, 81), 32760, 283),
        ((40, 13824, 40), (480, 832, 81), 32760, 1678),
        ((40, 13824, 40), (720, 1280, 81), 75600, 6523),
    ],
)
def test_cost_of_the_published_models(
    sizes: tuple[int, int, int], shape: tuple[int, int, int], tokens: int, teraflops: float
) -> None:
    params = spec.read(full_size(*sizes))
    height, width, frames = shape
    asked = request(height=height, width=width, num_frames=frames, num_inference_steps=1, guidance_scale=1.0)
    assert spec.problems(asked, params, {}) == []
    assert spec.tokens(asked, params) == tokens
    # The reference numbers are rounded to a teraflop and count 2 x parameters x tokens, text projections among them.
    assert spec.flops(asked, params) / 1e12 == pytest.approx(teraflops, rel=0.06)


def numbers(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("sizes", [(12, 8960, 30), (40, 13824, 40)], ids=["1.3B", "14B"])
def test_weight_bytes_equal_the_parameters_of_the_published_models(sizes: tuple[int, int, int]) -> None:
    configs = full_size(*sizes)
    params = spec.read(configs)
    with torch.device("meta"):
        fp32 = numbers(WanTransformer3DModel(params.transformer)) + numbers(WanVAE(params.vae))
        bf16 = numbers(UMT5EncoderModel(UMT5Config(**configs["text_encoder"])))
    assert spec.weight_bytes(params) == 4 * fp32 + 2 * bf16


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {"cross_attn_norm": False, "patch_size": [1, 1, 1]}),
        ("vae", {"attn_scales": [1.0, 0.25], "num_res_blocks": 2, "decoder_base_dim": 12}),
        ("vae", {"patch_size": 2, "in_channels": 12, "out_channels": 12, "temperal_downsample": [True, False, True]}),
        ("text_encoder", {"feed_forward_proj": "relu"}),
        ("text_encoder", {"model_type": "t5"}),
    ],
)
def test_weight_bytes_equal_the_parameters_of_every_variant(component: str, change: dict[str, Any]) -> None:
    configs = with_change(component, **change)
    params = spec.read(configs)
    values = {
        key: value for key, value in configs["text_encoder"].items() if key not in ("is_gated_act", "dense_act_fn")
    }
    t5 = values["model_type"] == "t5"
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**values)) if t5 else UMT5EncoderModel(UMT5Config(**values))
        total = numbers(WanTransformer3DModel(params.transformer)) + numbers(WanVAE(params.vae)) + numbers(encoder)
    assert spec.weight_bytes(params) == 4 * total
