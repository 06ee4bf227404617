"""The recipes on the model cards of the published Wan checkpoints. Standard library only.

Refuses to know how a checkpoint is told from another: `vidgen.models.wan.spec` picks one by what the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
NEGATIVE_PROMPT_2 = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The same words in Chinese: what Wan 2.2 calls its sample negative prompt."""

PUBLISHED: Mapping[str, Any] = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "fps": 16.0,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "negative_prompt": NEGATIVE_PROMPT,
}
"""Wan2.1-T2V-1.3B, -T2V-14B and -I2V-14B."""

FIRST_AND_LAST: Mapping[str, Any] = {**PUBLISHED, "height": 720, "width": 1280, "guidance_scale": 5.5}
"""Wan2.1-FLF2V-14B-720P."""

EXPERTS: Mapping[str, Any] = {
    **PUBLISHED,
    "height": 720,
    "width": 1280,
    "num_inference_steps": 40,
    "guidance_scale": 4.0,
    "negative_prompt": NEGATIVE_PROMPT_2,
}
"""Wan2.2-T2V-A14B; below the boundary the guidance is `EXPERTS_SECOND`."""
EXPERTS_SECOND = 3.0

EXPERTS_IMAGE: Mapping[str, Any] = {**EXPERTS, "height": 480, "width": 832, "guidance_scale": 3.5}
"""Wan2.2-I2V-A14B; below the boundary the guidance is `EXPERTS_IMAGE_SECOND`."""
EXPERTS_IMAGE_SECOND = 3.5

DENSE: Mapping[str, Any] = {
    **PUBLISHED,
    "height": 704,
    "width": 1280,
    "num_frames": 121,
    "fps": 24.0,
    "negative_prompt": NEGATIVE_PROMPT_2,
}
"""Wan2.2-TI2V-5B."""

STRENGTH = 0.8
"""How much of a video is made anew, in WanVideoToVideoPipeline."""
