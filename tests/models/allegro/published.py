"""The config.json files of the published Allegro checkpoints, as far as they are read."""

from __future__ import annotations

from typing import Any

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "AllegroPipeline",
    "_diffusers_version": "0.31.0.dev0",
    "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "AllegroTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLAllegro"],
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "AllegroTransformer3DModel",
    "_diffusers_version": "0.31.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 96,
    "caption_channels": 4096,
    "cross_attention_dim": 2304,
    "dropout": 0.0,
    "in_channels": 4,
    "interpolation_scale_h": 2.0,
    "interpolation_scale_t": 2.2,
    "interpolation_scale_w": 2.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 24,
    "num_layers": 32,
    "out_channels": 4,
    "patch_size": 2,
    "patch_size_t": 1,
    "sample_frames": 22,
    "sample_height": 90,
    "sample_size": [90, 160],
    "sample_size_t": 22,
    "sample_width": 160,
}
FEWER: dict[str, Any] = {"sample_frames": 10, "sample_size_t": 10, "interpolation_scale_t": 1.0}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Allegro": TRANSFORMER,
    "Allegro-T2V-40x720P": {**TRANSFORMER, **FEWER},
    "Allegro-T2V-40x360P": {
        **TRANSFORMER,
        **FEWER,
        "interpolation_scale_h": 1.0,
        "interpolation_scale_w": 1.0,
        "sample_height": 46,
        "sample_width": 80,
        "sample_size": [46, 80],
    },
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLAllegro",
    "_diffusers_version": "0.31.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["AllegroDownBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 320,
    "scaling_factor": 0.13,
    "temporal_compression_ratio": 4,
    "temporal_downsample_blocks": [True, True, False, False],
    "temporal_upsample_blocks": [False, True, True, False],
    "up_block_types": ["AllegroUpBlock3D"] * 4,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "_diffusers_version": "0.28.0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "trained_betas": None,
}
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "model_type": "t5",
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 32128,
}


def configs(name: str = "Allegro") -> dict[str, dict[str, Any]]:
    """The parsed JSON files of one checkpoint."""
    return {
        "model_index": dict(MODEL_INDEX),
        "transformer": dict(TRANSFORMERS[name]),
        "vae": dict(VAE),
        "text_encoder": dict(TEXT_ENCODER),
        "scheduler": dict(SCHEDULER),
    }


CHECKPOINTS = {name: configs(name) for name in TRANSFORMERS}
