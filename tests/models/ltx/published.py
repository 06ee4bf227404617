"""The published LTX-Video checkpoints: what their networks change in diffusers' defaults, and their parsed files."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

from tests.models.published import t5_xxl

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2B": {},
    "13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
}
VAES: dict[str, dict[str, Any]] = {
    "0.9.0": {},
    "0.9.1": {
        "decoder_block_out_channels": (256, 512, 1024),
        "decoder_layers_per_block": (5, 6, 7, 8),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (True, True, True, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
    },
    "0.9.5": {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "layers_per_block": (4, 6, 6, 2, 2),
        "spatio_temporal_scaling": (True, True, True, True),
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "decoder_block_out_channels": (256, 512, 1024),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}


def _configs(size: str, version: str) -> dict[str, dict[str, Any]]:
    with torch.device("meta"):
        transformer = LTXVideoTransformer3DModel(**TRANSFORMERS[size]).config
        vae = AutoencoderKLLTXVideo(**VAES[version]).config
    return {
        "model_index": {"_class_name": "LTXPipeline"},
        "transformer": {**transformer, "_class_name": "LTXVideoTransformer3DModel"},
        "vae": {**vae, "_class_name": "AutoencoderKLLTXVideo"},
        "text_encoder": t5_xxl(),
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    }


CHECKPOINTS = {f"LTX {size} {version}": _configs(size, version) for size in TRANSFORMERS for version in VAES}
