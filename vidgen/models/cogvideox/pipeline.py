"""CogVideoX's half of the denoising loop: its three networks, and what goes into and comes out of each.

Refuses to know the loop over steps, the guidance formula, batching and caching of prompts: those are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import dtype_named, load_weights, published_dtype
from vidgen.conditioning import Conditioning
from vidgen.models.cogvideox.params import WITH_WEIGHTS, Params
from vidgen.models.cogvideox.spec import added_frames, latent_frames, steps
from vidgen.models.cogvideox.transformer import CogVideoXTransformer3DModel
from vidgen.models.cogvideox.vae import CogVideoXVAE
from vidgen.nn.frames import shown
from vidgen.parallel import ALONE, IDENTITY, ContextParallel, Ranks
from vidgen.sampling.diffusion import add_noise, alpha_bars, betas, cogvideox_dpm, ddim, diffusion_schedule
from vidgen.sampling.step import Draws, Guidance, Sampler, Schedule, Start, branches
from vidgen.text.prompt import Prompt, Text, encoded, prompts_of
from vidgen.text.t5 import TextEncoder, load_text_encoder
from vidgen.types import Request


@dataclass(frozen=True, slots=True)
class Condition:
    """What one branch of a batch is conditioned on: text tokens [B, L, D], and for image-to-video the image's latents
    [B, F, C, H, W], zero after the first frame."""

    text: Tensor
    image: Tensor | None


@dataclass
class CogVideoXPipeline:
    """Text-, image- and video-to-video. Implements `vidgen.loop.Pipeline`; latents are [B, F, C, H, W]."""

    params: Params
    task: str
    transformer: CogVideoXTransformer3DModel
    vae: CogVideoXVAE
    text_encoder: TextEncoder | None
    dtypes: Mapping[str, torch.dtype]
    device: torch.device

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch; a guidance scale of 1 or less has no unconditional one."""
        return prompts_of(request)

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, padding included, in the dtype of the transformer."""
        return encoded(self.text_encoder, prompts, self.dtypes["transformer"])

    def schedule(self, request: Request) -> Schedule:
        """Levels of the checkpoint's schedule; explicit timesteps replace its spacing, and `strength` leaves its last
        steps."""
        s = self.params.scheduler
        bars = alpha_bars(
            betas(s.beta_schedule, s.num_train_timesteps, s.beta_start, s.beta_end),
            snr_shift_scale=s.snr_shift_scale,
            zero_terminal_snr=s.rescale_betas_zero_snr,
        )
        whole = diffusion_schedule(
            bars, request.num_inference_steps, spacing=s.timestep_spacing, timesteps=request.timesteps
        )
        return whole.tail(whole.steps - steps(request))

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        kind = self.params.scheduler.prediction_type
        return cogvideox_dpm(schedule, kind) if request.sampler == "dpm" else ddim(schedule, kind)

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        """The start [B, F, C, H, W] and the text's tokens. Drawn in this order: the latents of an image or a video from
        the autoencoder's posterior, then the noise."""
        first, space = requests[0], self.params.vae.spatial_factor
        frames = latent_frames(first, self.params) + added_frames(first, self.params)
        shape = (frames, self.params.vae.latent_channels, first.height // space, first.width // space)
        known, image = self._sampled([_pixels(own) for own in media], first, draws), None
        noise = draws.normal(shape).to(self.device)
        if self.task == "i2v":
            assert known is not None, "image-to-video without an image"
            scale = self.vae.params.scaling_factor
            known = known / scale if self.vae.params.invert_scale_latents else known * scale
            image = torch.cat([known, torch.zeros_like(noise[:, 1:])], dim=1)
        elif self.task == "v2v":
            assert known is not None, "video-to-video without a video"
            noise = add_noise(known * self.vae.params.scaling_factor, noise, schedule)
        conditioning = {}
        for branch, prompts in texts.items():
            tokens = {text.digest: self.transformer.text_tokens(text.embedding[None]) for text in prompts}
            conditioning[branch] = Condition(torch.cat([tokens[text.digest] for text in prompts]), image)
        return Start(noise, conditioning)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        """With `use_dynamic_cfg` the scale follows CogVideoXPipeline's formula, the timestep taken as it stands."""
        scale = request.guidance_scale
        if scale <= 1:
            return Guidance(scale, branches(False))
        if request.param("use_dynamic_cfg", False):
            passed = (schedule.steps - schedule.timesteps[i]) / schedule.steps
            scale = 1 + scale * ((1 - math.cos(math.pi * passed**5.0)) / 2)
        return Guidance(scale, branches(True))

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: Condition, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """What the scheduler's prediction type says [B, F, C, H, W] of latents x at step i, one forward."""
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        seen = x if conditioning.image is None else torch.cat([x, conditioning.image], dim=2)
        return self.transformer(seen.to(self.dtypes["transformer"]), timestep, conditioning.text, cp)

    def decode(self, latents: Tensor, request: Request, draws: Draws, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Latents [1, F, C, H, W] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32."""
        kept = latents[:, added_frames(request, self.params) :].transpose(1, 2)
        scaled = (1 / self.vae.params.scaling_factor * kept).to(self.dtypes["vae"])
        for chunk in self.vae.decode_chunks(scaled, request.tiling, ranks=ranks):
            yield shown(chunk)

    def _sampled(self, clips: Sequence[Tensor | None], request: Request, draws: Draws) -> Tensor | None:
        """Latents [B, f, C, H, W] fp32, not scaled, drawn from the posterior of each item's clip [1, 3, F, H, W]."""
        moments = []
        for clip in clips:
            if clip is not None:
                pixels = clip.to(self.device, self.dtypes["vae"])
                moments.append(self.vae.encode(pixels, request.tiling))
        if not moments:
            return None
        mean = torch.cat([mean for mean, _ in moments]).float()
        std = torch.exp(0.5 * torch.cat([logvar for _, logvar in moments]).float())
        return (mean + std * draws.normal(mean.shape[1:]).to(self.device)).transpose(1, 2)


def _pixels(media: Conditioning) -> Tensor | None:
    """The image or the video as [1, 3, F, H, W] fp32 in [-1, 1]."""
    given = media.video if media.image is None else media.image[None]
    if given is None:
        return None
    return 2.0 * (torch.from_numpy(np.ascontiguousarray(given)).permute(3, 0, 1, 2)[None].float() / 255) - 1.0


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device, first: bool = True
) -> CogVideoXPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in: fp16 for the 2B,
    bf16 for the others; a named one is that of all three. Not `first`, a rank of a gang beside rank 0: without the text
    encoder."""
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in WITH_WEIGHTS}
    with torch.device("meta"):
        transformer, vae = CogVideoXTransformer3DModel(params.transformer), CogVideoXVAE(params.vae)
    load_weights(transformer, folder, "transformer", dtype=dtypes["transformer"], device=device)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device)
    encoder = None
    if first:
        encoder = load_text_encoder(
            folder,
            max_tokens=params.text_tokens,
            dtype=dtypes["text_encoder"],
            device=device,
            padding="attended",
            clean=None,
        )
    return CogVideoXPipeline(params, task, transformer, vae, encoder, dtypes, device)
