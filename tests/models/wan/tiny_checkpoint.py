"""Makes tiny random Wan checkpoints in the Diffusers layout, with an offline tokenizer and a tiny UMT5.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "green", "blue", "circle", "square", "moving", "left", "right", "the", "cat", "dog", "and", "or")

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


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a known word, `<unk>` for others, closed by `</s>`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


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
) -> Path:
    """Writes a checkpoint into `folder`: `transformer`, `vae` and `scheduler` change single options of the above."""
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    networks = (
        UMT5EncoderModel(config),
        WanTransformer3DModel(**TRANSFORMER | (transformer or {})),
        AutoencoderKLWan(**VAE | (vae or {})),
    )
    for network in networks:
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        network.to(dtype)
    options = UNIPC | (scheduler or {})
    pipeline = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=networks[0],
        transformer=networks[1],
        vae=networks[2],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else UniPCMultistepScheduler(**options),
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
