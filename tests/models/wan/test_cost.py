"""Operations and bytes that spec.py counts, against the modules it counts and the numbers that are published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from tests.models.wan.configurations import EYES, KINDS, full_size, of_kind, request, tiny, with_change
from vidgen.models.wan import spec
from vidgen.models.wan.transformer import WanTransformer3DModel
from vidgen.models.wan.vae import WanVAE
from vidgen.specs.clip import clip_vision_weights

PARAMS = spec.read(tiny())


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
    ("kind", "change", "steps"),
    [
        ("text", {"task": "v2v", "params": (("strength", 0.5),)}, 2),
        ("text", {"task": "v2v", "params": (("strength", 0.74),)}, 2),
        ("image", {"task": "i2v"}, 4),
        ("first_and_last", {"task": "i2v"}, 4),
        ("experts", {}, 4),
        ("image_experts", {"task": "i2v"}, 4),
        ("dense", {}, 4),
        ("dense", {"task": "i2v"}, 4),
    ],
)
def test_flops_of_each_kind_equal_what_torch_counts(kind: str, change: dict[str, Any], steps: int) -> None:
    params = spec.read(of_kind(kind))
    asked = request(height=64, width=64, **change)
    t, side = params.transformer, 64 // params.vae.spatial_factor
    with torch.device("meta"):
        model = WanTransformer3DModel(t)
        x, text = torch.empty(1, t.in_channels, 3, side, side), torch.empty(1, params.text_tokens, t.text_dim)
        per_frame = kind == "dense" and asked.task == "i2v"
        timestep = torch.empty(1, 3) if per_frame else torch.empty(1)
        seen = None if params.image is None else torch.empty(1, params.images * params.image.tokens, t.image_dim or 0)
    with FlopCounterMode(display=False) as making, torch.no_grad():
        context = model.text_context(text)
    image = None if seen is None else model.image_context(seen)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x, timestep, context, image)
    second = making.get_total_flops() if len(params.experts) == 2 else 0
    expected = 2 * (steps * forward.get_total_flops() + second)
    assert spec.flops(asked, params) == pytest.approx(expected, rel=1e-9)


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


@pytest.mark.parametrize("kind", KINDS)
def test_weight_bytes_equal_the_parameters_of_each_kind(kind: str) -> None:
    configs = of_kind(kind)
    params = spec.read(configs)
    with torch.device("meta"):
        total = sum(numbers(WanTransformer3DModel(params.transformer)) for _ in params.experts)
        total += numbers(WanVAE(params.vae)) + numbers(UMT5EncoderModel(UMT5Config(**configs["text_encoder"])))
        if params.image is not None:
            total += numbers(CLIPVisionModel(CLIPVisionConfig(**EYES)))
    assert spec.weight_bytes(params) == 4 * total
    assert params.experts == (("transformer", "transformer_2") if "experts" in kind else ("transformer",))


@pytest.mark.parametrize(
    ("component", "change", "billions"),
    [
        ("transformer", {"in_channels": 36}, 14.29),
        ("transformer", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 16.40),
        (
            "transformer",
            {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
            5.00,
        ),
        ("image_encoder", {}, 0.63),
        ("vae", {}, 0.70),
    ],
    ids=["2.2 I2V", "2.1 I2V", "5B", "CLIP ViT-H", "5B VAE"],
)
def test_parameter_counts_of_the_published_models(component: str, change: dict[str, Any], billions: float) -> None:
    """The safetensors indices on the hub, divided by the bytes of their dtype."""
    if component == "transformer":
        count = spec.transformer_weights(spec.transformer_params({**full_size(40, 13824, 40)["transformer"], **change}))
    elif component == "vae":
        with torch.device("meta"):
            oracle = AutoencoderKLWan(
                base_dim=160,
                decoder_base_dim=256,
                z_dim=48,
                latents_mean=[0.0] * 48,
                latents_std=[1.0] * 48,
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_spatial=16,
            )
        count = spec.vae_weights(spec.vae_params(dict(oracle.config)))
        assert count == numbers(oracle)
    else:
        config = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
        )
        with torch.device("meta"):
            oracle = CLIPVisionModel(config)
        count = clip_vision_weights(spec.image_encoder_params(config.to_dict()))
        assert count == numbers(oracle)
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


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
