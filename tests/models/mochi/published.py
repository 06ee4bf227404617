"""The config.json files of genmo/mochi-1-preview."""

from __future__ import annotations

from typing import Any

from tests.models.published import t5_xxl

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "MochiPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "MochiTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLMochi"],
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "MochiTransformer3DModel",
    "activation_fn": "swiglu",
    "attention_head_dim": 128,
    "in_channels": 12,
    "max_sequence_length": 256,
    "num_attention_heads": 24,
    "num_layers": 48,
    "out_channels": None,
    "patch_size": 2,
    "pooled_projection_dim": 1536,
    "qk_norm": "rms_norm",
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLMochi",
    "act_fn": "silu",
    "add_attention_block": [False, True, True, True, True],
    "decoder_block_out_channels": [128, 256, 512, 768],
    "encoder_block_out_channels": [64, 128, 256, 384],
    "in_channels": 15,
    "latent_channels": 12,
    "latents_mean": [
        -0.06730895953510081,
        -0.038011381506090416,
        -0.07477820912866141,
        -0.05565264470995561,
        0.012767231469026969,
        -0.04703542746246419,
        0.043896967884726704,
        -0.09346305707025976,
        -0.09918314763016893,
        -0.008729793427399178,
        -0.011931556316503654,
        -0.0321993391887285,
    ],
    "latents_std": [
        0.9263795028493863,
        0.9248894543193766,
        0.9393059390890617,
        0.959253732819592,
        0.8244560132752793,
        0.917259975397747,
        0.9294154431013696,
        1.3720942357788521,
        0.881393668867029,
        0.9168315692124348,
        0.9185249279345552,
        0.9274757570805041,
    ],
    "layers_per_block": [3, 3, 4, 6, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "spatial_expansions": [2, 2, 2],
    "temporal_expansions": [1, 2, 3],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": True,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
CHECKPOINTS = {
    "Mochi": {
        "model_index": MODEL_INDEX,
        "transformer": TRANSFORMER,
        "vae": VAE,
        "text_encoder": t5_xxl(),
        "scheduler": SCHEDULER,
    }
}
