"""The config.json files of the published HunyuanVideo checkpoints, as diffusers' conversion writes them."""

from __future__ import annotations

from typing import Any

Configs = dict[str, dict[str, Any]]

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
TRANSFORMERS: Configs = {
    "HunyuanVideo": _TRANSFORMER,
    "HunyuanVideo-I2V": {**_TRANSFORMER, "image_condition_type": "token_replace"},
    "HunyuanVideo-I2V-33ch": {
        **_TRANSFORMER,
        "guidance_embeds": False,
        "image_condition_type": "latent_concat",
        "in_channels": 33,
    },
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "_diffusers_version": "0.32.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaModel"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "float16",
    "vocab_size": 128320,
}
LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 128257,
    "model_type": "llava",
    "pad_token_id": 128258,
    "projector_hidden_act": "gelu",
    # Older files say only what is not the default.
    "text_config": {
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "torch_dtype": "float16",
        "vocab_size": 128320,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "vocab_size": 49408,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 7.0,
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def configs(name: str) -> Configs:
    """All files of a published checkpoint, parsed."""
    with_image = "I2V" in name
    index: dict[str, Any] = {
        "_class_name": "HunyuanVideoImageToVideoPipeline" if with_image else "HunyuanVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "LlavaForConditionalGeneration" if with_image else "LlamaModel"],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "LlamaTokenizerFast"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    }
    if with_image:
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    return {
        "model_index": index,
        "transformer": dict(TRANSFORMERS[name]),
        "vae": dict(VAE),
        "text_encoder": dict(LLAVA if with_image else LLAMA),
        "text_encoder_2": dict(CLIP),
        "scheduler": dict(SCHEDULER),
    }


CHECKPOINTS = {name: configs(name) for name in TRANSFORMERS}
