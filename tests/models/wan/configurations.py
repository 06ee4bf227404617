"""The parsed JSON files of tiny and published Wan checkpoints, by kind, and a request of theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import UniPCMultistepScheduler
from transformers import UMT5Config

from vidgen.types import Request

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


EYES: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
KINDS: dict[str, Configs] = {
    "text": {},
    "image": {
        "model_index": {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        },
        "transformer": {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 32},
        "image_encoder": EYES,
    },
    "experts": {
        "model_index": {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]},
        "transformer_2": tiny()["transformer"],
    },
    "dense": {
        "model_index": {"expand_timesteps": True},
        "vae": {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "decoder_base_dim": 12,
            "dim_mult": [1, 2, 4, 4],
        },
    },
}
KINDS["first_and_last"] = {
    **KINDS["image"],
    "transformer": {**KINDS["image"]["transformer"], "pos_embed_seq_len": 10},
}
KINDS["image_experts"] = {
    "model_index": {**KINDS["experts"]["model_index"], "boundary_ratio": 0.9},
    "transformer": {"in_channels": 12},
    "transformer_2": {**tiny()["transformer"], "in_channels": 12},
}
"""What each published kind changes in `tiny`."""


def of_kind(kind: str, component: str = "vidgen", **values: Any) -> Configs:
    configs = tiny()
    for name, change in {**KINDS[kind]}.items():
        configs[name] = {**configs.get(name, {}), **change}
    configs[component] = {**configs.get(component, {}), **values}
    return configs


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
