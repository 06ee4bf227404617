"""The config.json files of the published CogVideoX checkpoints, as their folders hold them."""

from __future__ import annotations

from typing import Any

Configs = dict[str, dict[str, Any]]

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 30,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
    "use_rotary_positional_embeddings": False,
}
_LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_FIFTEEN = {
    **_LARGE,
    "ofs_embed_dim": None,
    "patch_bias": False,
    "patch_size_t": 2,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
    "use_learned_positional_embeddings": False,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 3,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_SCHEDULER: dict[str, Any] = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
_TEXT: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "model_type": "t5",
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32128,
}


def _checkpoint(pipeline: str, transformer: dict[str, Any], vae: dict[str, Any], **changes: Any) -> Configs:
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    configs = {"model_index": index, "transformer": {**_TRANSFORMER, **transformer}, "vae": {**_VAE, **vae}}
    return {**configs, "text_encoder": _TEXT, "scheduler": _SCHEDULER} | changes


CHECKPOINTS: dict[str, Configs] = {
    "CogVideoX-2b": _checkpoint(
        "CogVideoXPipeline",
        {},
        {},
        scheduler={**_SCHEDULER, "snr_shift_scale": 3.0},
        text_encoder={**_TEXT, "torch_dtype": "float16"},
    ),
    "CogVideoX-5b": _checkpoint("CogVideoXPipeline", _LARGE, {"scaling_factor": 0.7}),
    "CogVideoX-5b-I2V": _checkpoint(
        "CogVideoXImageToVideoPipeline",
        {**_LARGE, "in_channels": 32, "use_learned_positional_embeddings": True},
        {"scaling_factor": 0.7, "invert_scale_latents": False},
    ),
    "CogVideoX1.5-5B": _checkpoint("CogVideoXPipeline", _FIFTEEN, {"scaling_factor": 0.7}),
    "CogVideoX1.5-5B-I2V": _checkpoint(
        "CogVideoXImageToVideoPipeline",
        {**_FIFTEEN, "in_channels": 32, "ofs_embed_dim": 512},
        {"scaling_factor": 0.7, "invert_scale_latents": True},
    ),
}
"""Transformers of 1.69 and 5.57 billion parameters, by their authors' count."""
