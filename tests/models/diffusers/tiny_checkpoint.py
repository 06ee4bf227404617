"""Tiny random checkpoints of pipelines that have no native family, written by diffusers' own `save_pretrained`.

Offline CLIP tokenizer and encoders; every weight gets noise, so that no constant initialisation hides a mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from tests.models.offline import WORDS, randomise

WIDTH = 32
BLOCKS = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1} | {
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def tokenizer(length: int = 12) -> PreTrainedTokenizerFast:
    """One token a known word between the start and end tokens of CLIP."""
    vocabulary = {word: index for index, word in enumerate(["<start>", "<end>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        model_max_length=length,
    )


def text_encoder(layers: int = 3, length: int = 12) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return randomise(CLIPTextModel(config))


def image_encoder(size: int = 224) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=size // 2,
    )
    return randomise(CLIPVisionModelWithProjection(config))


def vae(**changes: Any) -> AutoencoderKL:
    """2 x 2 pixels a latent."""
    types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return randomise(AutoencoderKL(latent_channels=4, sample_size=32, **BLOCKS, **types | changes), 1, 0.05)


def unet(**changes: Any) -> UNet2DConditionModel:
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return randomise(UNet2DConditionModel(**BLOCKS, **sizes | changes), 2, 0.05)


def stable_diffusion(folder: Path, scheduler: Any = None) -> Path:
    """A Stable Diffusion checkpoint without a safety checker: what AnimateDiff and Text2Video-Zero start from."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=scheduler or PNDMScheduler(skip_prk_steps=True, **_without_clip()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def instruct_pix2pix(folder: Path) -> Path:
    torch.manual_seed(0)
    StableDiffusionInstructPix2PixPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(in_channels=8),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def controlnet(folder: Path) -> Path:
    torch.manual_seed(0)
    made = ControlNetModel(
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(2, 4),
        **BLOCKS,
    )
    randomise(made, 3, 0.2).save_pretrained(folder)
    return folder


def motion_adapter(folder: Path) -> Path:
    torch.manual_seed(0)
    made = MotionAdapter(
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=16,
        use_motion_mid_block=False,
    )
    randomise(made, 4, 0.2).save_pretrained(folder)
    return folder


def motion_lora(folder: Path, adapter: Path) -> Path:
    """A motion LoRA of rank 2 in the very keys of those that are published."""
    weights = load_file(adapter / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for key, weight in weights.items():
        module, _, name = key.removesuffix(".weight").rpartition(".attn1.to_")
        if not module or name not in ("q", "k", "v", "out.0") or not key.endswith(".weight"):
            continue
        own = f"unet.{module}.attn1.processor.to_{name.partition('.')[0]}_lora"
        tensors[f"{own}.down.weight"] = torch.randn((2, weight.shape[1]), generator=generator)
        tensors[f"{own}.up.weight"] = torch.randn((weight.shape[0], 2), generator=generator)
    assert tensors
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def stable_video_diffusion(folder: Path, frames: int) -> Path:
    """`frames` is what the UNet's config names: 14 for SVD, 25 for SVD-XT."""
    torch.manual_seed(0)
    network = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
        num_frames=frames,
    )
    StableVideoDiffusionPipeline(
        vae=randomise(
            AutoencoderKLTemporalDecoder(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                latent_channels=4,
                layers_per_block=1,
            ),
            1,
            0.05,
        ),
        image_encoder=image_encoder(),
        unet=randomise(network, 2, 0.05),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            num_train_timesteps=1000,
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    ).save_pretrained(folder)
    return folder


def i2vgen_xl(folder: Path) -> Path:
    torch.manual_seed(0)
    network = I2VGenXLUNet(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        num_attention_heads=None,
    )
    I2VGenXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        image_encoder=image_encoder(32),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
        unet=randomise(network, 2, 0.05),
        scheduler=DDIMScheduler(**SCHEDULE),
    ).save_pretrained(folder)
    return folder


def _without_clip() -> dict[str, Any]:
    return {name: value for name, value in SCHEDULE.items() if name != "clip_sample"}
