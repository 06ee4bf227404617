"""What the published pipelines mean where their call says nothing: playback rates, sizes, rules of their networks.

Standard library only; refuses to know how a pipeline is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DEFAULT_FPS = 10.0
"""For a pipeline that is not told a frame rate and is not listed: what diffusers' own `export_to_video` assumes."""
FPS: Mapping[str, float] = {
    "Allegro": 15.0,
    "AnimateDiff": 8.0,
    "CogVideoX": 8.0,
    "HunyuanVideo": 24.0,
    "Latte": 8.0,
    "Mochi": 30.0,
    "PIA": 8.0,
    "SkyReelsV2": 24.0,
    "Text2VideoZero": 4.0,
    "TextToVideoSD": 8.0,
    "TextToVideoZero": 4.0,
    "VideoToVideoSD": 8.0,
    "Wan": 16.0,
}
"""Frames a second that the model cards play the result at, by the beginning of the class's name."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "MochiPipeline": {"height": 480, "width": 848},
    "CogVideoXVideoToVideoPipeline": {"num_frames": 49},
    "CogVideoXFunControlPipeline": {"num_frames": 49},
    "WanVideoToVideoPipeline": {"num_frames": 81},
}
"""Sizes of the model cards that stand neither in the call nor in a config."""

NEEDS_IMAGE = re.compile(
    r"I(mage)?(2|To)V(ideo)?(Pipeline|$|[A-Z])|StableVideoDiffusion|I2VGenXL|ConsisID|FramepackPipeline"
)
NEEDS_VIDEO = re.compile(r"VideoToVideo|Video2Video|V2V|AnimateDiffControlNet|FunControl|Text2VideoZero")
"""Classes that cannot do without the medium, though their call gives it a default."""
GUIDED_ONLY = ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline")
"""They take the unconditional embeddings for granted and fail at a scale of 1."""

VIDEO_FRAMES = 16
"""Frames of a class whose result is as long as the video it is given, where nothing names a length."""
FRAME_STEPS: Mapping[str, int] = {
    "AutoencoderKLHunyuanVideo": 4,
    "AutoencoderKLLTXVideo": 8,
    "AutoencoderKLMochi": 6,
    "AutoencoderKLWan": 4,
}
"""VAEs whose clips have 1 + k x this many frames; their pipelines turn other counts into one without a word."""
ALWAYS_TILED = ("AutoencoderKLAllegro",)
"""VAEs that only work in tiles, of sizes that cannot be chosen."""
UNET_SHARE = 1 / 9
"""Multiply-adds of a UNet's forward over (parameters x latent positions): 0.40 T for Stable Diffusion 1.5 with its
860 M parameters at 64 x 64; most of its layers see a quarter of the positions or less."""


def fps_of(pipeline: str) -> float:
    """The playback rate of a class that is not told one."""
    found = [name for name in FPS if pipeline.startswith(name)]
    return FPS[max(found, key=len)] if found else DEFAULT_FPS


def spatial_factor(vae: Mapping[str, Any]) -> int:
    """Pixels a latent stands for, along height and width, as vae/config.json tells it."""
    for name in ("scale_factor_spatial", "spatial_compression_ratio"):
        if vae.get(name):
            return int(vae[name])
    levels = vae.get("block_out_channels") or vae.get("dim_mult")
    if not levels:
        return 8
    patch = vae.get("patch_size")
    return int(2 ** (len(levels) - 1)) * (patch if isinstance(patch, int) else 1)


def frame_step(vae_class: str, vae: Mapping[str, Any]) -> int | None:
    """Frames come as 1 + k x this, or None for no such rule."""
    if vae_class not in FRAME_STEPS:
        return None
    for name in ("scale_factor_temporal", "temporal_compression_ratio"):
        if vae.get(name):
            return int(vae[name])
    down = vae.get("temperal_downsample")
    return int(2 ** sum(down)) if down else FRAME_STEPS[vae_class]


def size_multiple(denoiser_class: str, denoiser: Mapping[str, Any], factor: int) -> int:
    """What height and width are multiples of: the VAE's factor, times the patch of a transformer, or times the halvings
    of a UNet that cannot mend odd sizes."""
    if denoiser_class == "UNetSpatioTemporalConditionModel":
        return factor * int(2 ** (len(denoiser.get("down_block_types") or ()) - 1))
    patch = denoiser.get("patch_size") or 1
    return factor * int(patch[-1] if isinstance(patch, (list, tuple)) else patch)


def native_size(denoiser: Mapping[str, Any], factor: int) -> dict[str, int]:
    """Height, width and frames that the denoiser's config names."""
    found: dict[str, int] = {}
    sample = denoiser.get("sample_size")
    if sample:
        height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
        found |= {"height": int(height) * factor, "width": int(width) * factor}
    for name in ("height", "width"):
        if denoiser.get(f"sample_{name}"):
            found[name] = int(denoiser[f"sample_{name}"]) * factor
    for name in ("num_frames", "sample_frames"):
        if denoiser.get(name):
            found["num_frames"] = int(denoiser[name])
            break
    return found
