"""Makes tiny random Mochi checkpoints in the Diffusers layout, with an offline tokenizer and a tiny T5.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from tests.models.case import Case
from tests.models.offline import randomise, tiny_t5, tokenizer

TRANSFORMER: dict[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 3,
    "pooled_projection_dim": 12,
    "in_channels": 12,
    "text_embed_dim": 16,
    "time_embed_dim": 14,
}
VAE: dict[str, Any] = {
    "encoder_block_out_channels": (32, 32, 64, 32),
    "decoder_block_out_channels": (32, 32, 32, 64),
    "layers_per_block": (1, 1, 2, 1, 1),
    "scaling_factor": 1.25,
}
"""Group norms and attention heads come in 32 channels, so it cannot be smaller. The latents' statistics are the
published ones."""
SCHEDULER: dict[str, Any] = {"invert_sigmas": True}


def build(
    folder: Path,
    *,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    zero_empty_prompt: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """Writes a checkpoint into `folder`: `transformer`, `vae` and `scheduler` change single options of the above."""
    torch.manual_seed(seed)
    pipeline = MochiPipeline(
        tokenizer=tokenizer(),
        text_encoder=tiny_t5().to(dtype),
        transformer=randomise(MochiTransformer3DModel(**TRANSFORMER | (transformer or {}))).to(dtype),
        vae=randomise(AutoencoderKLMochi(**VAE | (vae or {})), scale=0.02).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER | (scheduler or {})),
        force_zeros_for_empty_prompt=zero_empty_prompt,
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 13, "num_inference_steps": 3}

CASES = {
    "t2v": Case(task="t2v", write=build, sampling=SMALL),
    "t2v_zero_empty_prompt": Case(task="t2v", write=partial(build, zero_empty_prompt=True), sampling=SMALL),
}
