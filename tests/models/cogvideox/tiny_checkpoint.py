"""Makes tiny random CogVideoX checkpoints in the Diffusers layout: one of each published kind.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from tests.models import offline
from tests.models.case import Case

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 226,
}
VAE: dict[str, Any] = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 12, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 4,
    "sample_height": 32,
    "sample_width": 48,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
}
_ROTARY = {"use_rotary_positional_embeddings": True}
_FIFTEEN = {**_ROTARY, "patch_size_t": 2, "patch_bias": False, "sample_width": 20, "sample_height": 20}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "2b": {"scheduler": {"snr_shift_scale": 3.0}},
    "5b": {"transformer": _ROTARY, "vae": {"scaling_factor": 0.7}},
    "5b-i2v": {
        "transformer": {**_ROTARY, "use_learned_positional_embeddings": True, "in_channels": 8},
        "vae": {"scaling_factor": 0.7},
    },
    "1.5": {"transformer": _FIFTEEN, "vae": {"scaling_factor": 0.7}},
    "1.5-i2v": {
        "transformer": {**_FIFTEEN, "in_channels": 8, "ofs_embed_dim": 24},
        "vae": {"scaling_factor": 0.7, "invert_scale_latents": True},
    },
}
"""Each kind's changes to the options of its components."""


def build_transformer(kind: str, **changes: Any) -> CogVideoXTransformer3DModel:
    """Random, learned positions included."""
    torch.manual_seed(0)
    made = CogVideoXTransformer3DModel(**TRANSFORMER | KINDS[kind].get("transformer", {}) | changes)
    if made.config.use_learned_positional_embeddings:
        made.patch_embed.pos_embedding.normal_(generator=torch.Generator().manual_seed(1))
    return offline.randomise(made)


def build_vae(kind: str = "2b", **changes: Any) -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return offline.randomise(AutoencoderKLCogVideoX(**VAE | KINDS[kind].get("vae", {}) | changes))


def build(folder: Path, kind: str = "2b", *, dpm: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a checkpoint of one of `KINDS` into `folder`; `dpm` with the other scheduler class."""
    scheduler = (CogVideoXDPMScheduler if dpm else CogVideoXDDIMScheduler)(
        **SCHEDULER | KINDS[kind].get("scheduler", {})
    )
    pipeline = CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline
    pipeline(
        tokenizer=offline.tokenizer(length=226),
        text_encoder=offline.tiny_t5().to(dtype),
        transformer=build_transformer(kind).to(dtype),
        vae=build_vae(kind).to(dtype),
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


def _case(task: str, kind: str, *, dpm: bool = False, frames: int = 9, **params: Any) -> Case:
    sampling = {"height": 32, "width": 48, "num_frames": frames, "num_inference_steps": 4, "guidance_scale": 3.0}
    strength = 0.5 if task == "v2v" else None
    return Case(
        task=task,
        write=partial(build, kind=kind, dpm=dpm),
        sampling={**sampling, "params": {"strength": strength, "use_dynamic_cfg": False} | params},
        causal=False,  # Norms see the frames of a chunk together.
        pipeline="CogVideoXVideoToVideoPipeline" if task == "v2v" else None,
    )


CASES: dict[str, Case] = {
    "t2v-2b": _case("t2v", "2b"),
    "t2v-5b-dpm": _case("t2v", "5b", dpm=True, use_dynamic_cfg=True),
    "t2v-1.5": _case("t2v", "1.5"),
    "i2v-5b": _case("i2v", "5b-i2v"),
    "i2v-1.5-dpm": _case("i2v", "1.5-i2v", dpm=True),
    "v2v-2b": _case("v2v", "2b"),
    "v2v-5b-dpm": _case("v2v", "5b", dpm=True),
    "v2v-1.5": _case("v2v", "1.5", frames=8),
}
