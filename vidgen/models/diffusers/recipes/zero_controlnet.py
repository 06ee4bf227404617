"""Text2Video-Zero with control: every frame of a video steers its frame through a ControlNet.

Khachatryan et al. 2023, section 4.2 (conditional generation): cross-frame attention in UNet and ControlNet, the same
start for all frames. Refuses to know where the video comes from.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image

from vidgen.models.diffusers.recipes.canny import edges
from vidgen.models.diffusers.recipes.cross_frame import cross_frame_attention


class Text2VideoZeroControlNet(StableDiffusionControlNetPipeline):
    """A Stable Diffusion checkpoint and a ControlNet (`model.options.components.controlnet`).

    `control` canny: edges are made of each frame, as white lines on black, between `low_threshold` and
    `high_threshold`; given: the frames are the control as they are (poses, depth, edges).
    """

    unet: Any
    controlnet: Any
    vae_scale_factor: int
    _execution_device: torch.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        video: list[Image.Image],
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        control: Literal["canny", "given"] = "canny",
        low_threshold: int = 100,
        high_threshold: int = 200,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        clip_skip: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> Any:
        """One image of the control frames' number each, made together; `images` [F, H, W, 3] in [0, 1]."""
        frames = video
        if control == "canny":
            frames = [Image.fromarray(edges(np.asarray(frame), low_threshold, high_threshold)) for frame in video]
        across = (
            (height or frames[0].height) // self.vae_scale_factor,
            (width or frames[0].width) // self.vae_scale_factor,
        )
        size = (1, self.unet.config.in_channels, *across)
        start = torch.randn(size, generator=generator).to(self._execution_device, self.unet.dtype)
        with cross_frame_attention(2 if guidance_scale > 1 else 1, self.unet, self.controlnet):
            return super().__call__(  # type: ignore[misc]
                prompt=[prompt] * num_frames,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * num_frames,
                image=frames,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                control_guidance_start=control_guidance_start,
                control_guidance_end=control_guidance_end,
                clip_skip=clip_skip,
                eta=eta,
                generator=generator,
                latents=start.repeat(num_frames, 1, 1, 1),
                output_type=output_type,
            )
