"""Video editing with an instruction: InstructPix2Pix over all frames, each looking at the first.

Khachatryan et al. 2023, section 4.2 (Video Instruct-Pix2Pix). Refuses to know where the video comes from.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from vidgen.models.diffusers.recipes.cross_frame import cross_frame_attention


class Text2VideoZeroInstructPix2Pix(StableDiffusionInstructPix2PixPipeline):
    """An InstructPix2Pix checkpoint (timbrooks/instruct-pix2pix); the prompt is the instruction."""

    unet: Any

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        video: list[Image.Image],
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 8,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        negative_prompt: str | None = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> Any:
        """Every frame edited, all together; `images` [F, H, W, 3] in [0, 1]. Sizes are those of the video."""
        guided = guidance_scale > 1 and image_guidance_scale >= 1
        with cross_frame_attention(3 if guided else 1, self.unet):
            return super().__call__(  # type: ignore[misc]
                prompt=[prompt] * num_frames,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * num_frames,
                image=video,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                eta=eta,
                generator=generator,
                output_type=output_type,
            )
