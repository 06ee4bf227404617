"""Makes tiny random Wan checkpoints in the Diffusers layout, of every published kind, with an offline tokenizer.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.models.case import Case
from tests.models.offline import WORDS as WORDS
from tests.models.offline import tokenizer as tokenizer

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.1, 0.9, 1.5, 2.0],
}
STILL: dict[str, Any] = {"dim_mult": [1, 2], "temperal_downsample": [False], "scale_factor_temporal": 1} | {
    "scale_factor_spatial": 2
}
"""Changes to the VAE: 2 x 2 in space, and every frame a latent frame."""
UNSHUFFLED: dict[str, Any] = {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "patch_size": 2} | {
    "in_channels": 12,
    "out_channels": 12,
}
"""Changes to the VAE: 2 of its 8 x 8 in space by pixel unshuffle."""
UNIPC: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}
"""Five tokens an image."""
CONCATENATED: dict[str, Any] = {"in_channels": 12}
"""Changes to the transformer: 4 latent, 4 mask, and 4 image channels."""
ONE_IMAGE: dict[str, Any] = {**CONCATENATED, "image_dim": 20, "added_kv_proj_dim": 24}
TWO_IMAGES: dict[str, Any] = {**ONE_IMAGE, "pos_embed_seq_len": 10}
DENSE_VAE: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
}
"""Changes to the VAE: that of Wan 2.2 5B, with one spatial halving less."""


def build(
    folder: Path,
    *,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    euler: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
) -> Path:
    """Writes a checkpoint into `folder`: `transformer`, `vae` and `scheduler` change single options of the above. A
    boundary brings a second transformer, an `image_dim` an image encoder."""
    torch.manual_seed(seed)
    sizes = TRANSFORMER | (transformer or {})
    config = UMT5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    networks: dict[str, torch.nn.Module] = {
        "text_encoder": UMT5EncoderModel(config),
        "transformer": WanTransformer3DModel(**sizes),
        "vae": AutoencoderKLWan(**VAE | (vae or {})),
    }
    if boundary_ratio is not None:
        networks["transformer_2"] = WanTransformer3DModel(**sizes)
    if "image_dim" in sizes:
        networks["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**IMAGE_ENCODER))
    for network in networks.values():
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        network.to(dtype)
    parts: dict[str, Any] = {**networks, "boundary_ratio": boundary_ratio, "expand_timesteps": expand_timesteps}
    if "image_dim" in sizes:
        parts["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    options = UNIPC | (scheduler or {})
    kind = WanImageToVideoPipeline if sizes["in_channels"] != sizes["out_channels"] else WanPipeline
    pipeline = kind(
        tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else UniPCMultistepScheduler(**options),
        **parts,
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


LAST = ("last_image",)


def _case(
    task: str,
    *,
    pipeline: str | None = None,
    sampling: dict[str, Any] | None = None,
    media: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    asked = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "negative_prompt": "blue dog"}
    write = partial(_write, **options)
    return Case(task=task, write=write, sampling=asked | (sampling or {}), media=media, pipeline=pipeline)


def _write(folder: Path, **options: Any) -> None:
    build(folder, **options)


CASES: dict[str, Case] = {
    "t2v": _case("t2v"),
    "v2v": _case("v2v", pipeline="WanVideoToVideoPipeline", sampling={"params": {"strength": 0.8}}),
    "i2v": _case("i2v", transformer=ONE_IMAGE),
    "first_and_last": _case("i2v", transformer=TWO_IMAGES, media=LAST),
    "experts_t2v": _case("t2v", boundary_ratio=0.875, sampling={"params": {"guidance_scale_2": 3.0}}),
    "experts_i2v": _case("i2v", boundary_ratio=0.9, transformer=CONCATENATED),
    "experts_first_and_last": _case(
        "i2v",
        boundary_ratio=0.9,
        transformer=CONCATENATED,
        media=LAST,
        sampling={"params": {"guidance_scale_2": 3.5}},
    ),
    "dense_t2v": _case("t2v", vae=DENSE_VAE, expand_timesteps=True),
    "dense_i2v": _case("i2v", vae=DENSE_VAE, expand_timesteps=True, pipeline="WanImageToVideoPipeline"),
}
"""Every task of every kind: Wan 2.1 for text, a video, an image, two images; Wan 2.2 of two experts, and dense (5B)."""
