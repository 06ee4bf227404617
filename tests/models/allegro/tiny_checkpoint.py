"""Makes tiny random Allegro checkpoints in the Diffusers layout, with an offline tokenizer and a tiny T5.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
The tiles are as small as the overlaps in AutoencoderKLAllegro's code let them be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from tests.models.case import Case
from tests.models.offline import randomise, tiny_t5, tokenizer

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "cross_attention_dim": 36,
    "num_layers": 2,
    "caption_channels": 16,
    "sample_height": 16,
    "sample_width": 16,
    "sample_frames": 6,
}
VAE: dict[str, Any] = {
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 128,
}
LOW: dict[str, Any] = {"interpolation_scale_t": 1.0, "interpolation_scale_h": 1.0, "interpolation_scale_w": 1.0}
"""The scales of the checkpoint for 360p."""


def build(
    folder: Path,
    *,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    euler: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint into `folder`: `transformer`, `vae` and `scheduler` change single options of the above."""
    torch.manual_seed(seed)
    scheduler_class = EulerDiscreteScheduler if euler else EulerAncestralDiscreteScheduler
    pipeline = AllegroPipeline(
        tokenizer=tokenizer(),
        text_encoder=tiny_t5(),
        transformer=randomise(AllegroTransformer3DModel(**TRANSFORMER | (transformer or {})), seed).to(dtype),
        vae=randomise(AutoencoderKLAllegro(**VAE | (vae or {})), seed + 1),
        scheduler=scheduler_class(**scheduler or {}),
    )
    pipeline.save_pretrained(folder)
    # Without it a transformer counts as published in bf16.
    named = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    (folder / "vidgen.json").write_text(json.dumps({"dtype": named}))
    return folder


SMALLEST: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 24, "num_inference_steps": 3}
"""One tile."""
RAW = {"params": {"clean_caption": False}}
CASES: dict[str, Case] = {
    "t2v": Case("t2v", lambda folder: build(folder) and None, SMALLEST | RAW, causal=False),
    "360p": Case("t2v", lambda folder: build(folder, transformer=LOW) and None, SMALLEST | RAW, causal=False),
    "euler": Case(
        "t2v",
        lambda folder: (
            build(folder, euler=True, scheduler={"timestep_spacing": "leading", "steps_offset": 1}, seed=2) and None
        ),
        SMALLEST | RAW,
        causal=False,
    ),
}
