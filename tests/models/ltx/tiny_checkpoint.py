"""Makes tiny random LTX-Video checkpoints in the Diffusers layout, one a kind that was published.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tests.models.case import Case
from tests.models.offline import randomise, tiny_t5, tokenizer

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # a width of 32 leaves two channels that no rope turns, as 2048 does
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
VAE_090: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 12, 16, 16),
    "decoder_block_out_channels": (8, 12, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 2),
}
VAE_091: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 12, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 1, 2, 1),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
VAE_095: dict[str, Any] = VAE_091 | {
    "block_out_channels": (8, 16, 32, 64, 128),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
CAUSAL: dict[str, Any] = VAE_090 | {"decoder_causal": True}
VAES = {"0.9.0": VAE_090, "0.9.1": VAE_091, "0.9.5": VAE_095, "causal": CAUSAL}

DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
PIPELINES = {cls.__name__: cls for cls in (LTXPipeline, LTXImageToVideoPipeline, LTXConditionPipeline)}


def vae(version: str, **changes: Any) -> AutoencoderKLLTXVideo:
    """A random autoencoder of one of VAES, its latents' statistics included."""
    torch.manual_seed(0)
    made = randomise(AutoencoderKLLTXVideo(**VAES[version] | changes), seed=1, scale=0.05)
    made.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    made.latents_std.copy_(torch.tensor([1.1, 0.9, 1.5, 2.0]))
    return made


def build(
    folder: Path,
    *,
    version: str = "0.9.0",
    pipeline: str = "LTXPipeline",
    scheduler: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a checkpoint into `folder`: `version` one of VAES; `scheduler` null is the one published with it."""
    torch.manual_seed(0)
    if scheduler is None:
        scheduler = DYNAMIC if version in ("0.9.0", "0.9.1") else {}
    made = PIPELINES[pipeline](
        tokenizer=tokenizer(length=128),
        text_encoder=tiny_t5().to(dtype),
        transformer=randomise(LTXVideoTransformer3DModel(**TRANSFORMER), seed=2).to(dtype),
        vae=vae(version).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    made.save_pretrained(folder)
    return folder


LONG = "a red circle and the green square or " * 40
"""More tokens than any of the pipelines keeps, so that a forward is as long as a plan has to expect."""
SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 3, "guidance_scale": 3.0}


def _case(task: str, version: str, pipeline: str, oracle: str | None = None, /, **sampling: Any) -> Case:
    write = partial(build, version=version, pipeline=pipeline)
    sampling = SIZE | {"prompt": LONG, "negative_prompt": LONG + "dog"} | sampling
    return Case(task, lambda folder: write(folder) and None, sampling, causal=False, pipeline=oracle)


CASES: dict[str, Case] = {
    "t2v-0.9.0": _case("t2v", "0.9.0", "LTXPipeline", height=96, width=128),  # room for tiles that overlap
    "t2v-0.9.1": _case("t2v", "0.9.1", "LTXPipeline"),
    "t2v-0.9.5": _case("t2v", "0.9.5", "LTXConditionPipeline"),
    "i2v-0.9.0": _case("i2v", "0.9.0", "LTXPipeline", "LTXImageToVideoPipeline"),
    "i2v-0.9.1": _case("i2v", "0.9.1", "LTXImageToVideoPipeline"),
    "i2v-0.9.5": _case("i2v", "0.9.5", "LTXConditionPipeline"),
    "i2v-0.9.7-distilled": _case(
        "i2v", "0.9.5", "LTXConditionPipeline", timesteps=(1000, 725, 0.03), guidance_scale=1.0
    ),
}
