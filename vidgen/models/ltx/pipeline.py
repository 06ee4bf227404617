"""LTX-Video's half of the denoising loop: its three networks, and what goes into and comes out of each.

Latents are packed, one token a latent: [B, N, C]. Refuses to know the loop over steps, the guidance formula, batching
and caching of prompts: those are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import dtype_named, load_weights, published_dtype
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.models.ltx import spec
from vidgen.models.ltx.params import WITH_WEIGHTS, Params
from vidgen.models.ltx.transformer import LTXVideoTransformer3DModel, TextContext
from vidgen.models.ltx.vae import LTXVAE
from vidgen.nn.frames import shown
from vidgen.nn.rope import Rope
from vidgen.parallel import ALONE, IDENTITY, ContextParallel, Ranks
from vidgen.sampling.flow import dynamic_shift, euler, euler_schedule
from vidgen.sampling.step import Draws, Guidance, Sampler, Schedule, Start, branches
from vidgen.text.prompt import Prompt, Text, encoded, prompts_of
from vidgen.text.t5 import TextEncoder, load_text_encoder
from vidgen.types import Request

BASE_POSITIONS = (20, 2048, 2048)
"""Seconds, rows and columns that positions are a share of."""
LINEAR_UNTIL = 0.025
"""How far the linear half of LTXConditionPipeline's schedule goes from 1."""


@dataclass(frozen=True, slots=True)
class Given:
    """A given first frame: `clean` [1, N, 1] is true at its tokens; `noised` [S, B, n, C] is what stands there at each
    step, or None where it is the image itself at all of them."""

    clean: Tensor
    noised: Tensor | None


@dataclass(frozen=True, slots=True)
class Branch:
    """Conditioning of one branch of a batch."""

    text: TextContext
    rope: Rope
    given: Given | None


@dataclass
class LTXPipeline:
    """Text- and image-to-video. Implements `vidgen.loop.Pipeline`; the conditioning of a branch is a `Branch`."""

    params: Params
    transformer: LTXVideoTransformer3DModel
    vae: LTXVAE
    text_encoder: TextEncoder | None
    dtypes: Mapping[str, torch.dtype]
    device: torch.device

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch; a guidance scale of 1 or less has no unconditional one."""
        return prompts_of(request)

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, in the dtype of the transformer."""
        return encoded(self.text_encoder, prompts, self.dtypes["transformer"])

    def schedule(self, request: Request) -> Schedule:
        """Noise levels: evenly spaced from 1 to 1 / S, or LTXConditionPipeline's own, or the request's; shifted by the
        request's shift, else as the checkpoint's scheduler shifts them."""
        steps, options = request.num_inference_steps, self.params.scheduler
        if request.timesteps is not None:
            return euler_schedule(options, steps, timesteps=request.timesteps)
        sigmas = request.sigmas
        if sigmas is None:
            sigmas = linear_quadratic(steps) if self.params.condition else tuple(np.linspace(1.0, 1 / steps, steps))
        dynamic = options.use_dynamic_shifting and request.shift is None
        mu = dynamic_shift(options, spec.tokens(request, self.params)) if dynamic else None
        return euler_schedule(options, steps, shift=request.shift, sigmas=sigmas, mu=mu)

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        return euler(schedule)

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        """Noise [B, C, F, H, W], one draw an item in that shape, packed; its first frame replaced by the image."""
        request = requests[0]
        grid = spec.grid(request, self.params)
        shape = (self.params.transformer.in_channels, *grid)
        given, pin = None, None
        if request.task == "i2v":
            latents, value, noised = self._with_image(requests, media, shape, schedule, draws)
            clean = (torch.arange(latents.shape[1], device=self.device) < grid[1] * grid[2])[None, :, None]
            given, pin = Given(clean, noised), (clean, value)
        else:
            latents = pack(draws.normal(shape).to(self.device))
        rope = self.transformer.rope(self._positions(grid, request.fps))
        known = {text.digest: text for prompts in texts.values() for text in prompts}
        contexts = {
            digest: self.transformer.text_context(text.embedding[None, : text.tokens]) for digest, text in known.items()
        }
        conditioning = {
            branch: Branch(TextContext.join([contexts[text.digest] for text in prompts]), rope, given)
            for branch, prompts in texts.items()
        }
        return Start(latents, conditioning, pin)

    def _with_image(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        shape: tuple[int, int, int, int],
        schedule: Schedule,
        draws: Draws,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Start [B, N, C] with the images in its first frame, what that frame ends as [B, N, C], and what stands there
        at each step. The image's posterior is drawn before the start noise, by LTXConditionPipeline after it."""
        moments = [self._encoded(one, request) for one, request in zip(media, requests, strict=True)]
        mean, std = (torch.cat(part) for part in zip(*moments, strict=True))
        first = (shape[0], 1, *shape[2:])
        if self.params.condition:
            noise = draws.normal(shape).to(self.device)
            drawn = draws.normal(first).to(self.device)
        else:
            drawn = draws.normal(first).to(self.device)
            noise = draws.normal(shape).to(self.device)
        image = self.vae.normalise(mean + std * drawn)
        latents = pack(torch.cat([image, noise[:, :, 1:]], dim=2))
        scale = float(spec.param(requests[0], self.params, "image_cond_noise_scale") or 0.0)
        if scale == 0:
            return latents, latents, None
        # Noise of step i, which the pipeline draws just before it; nothing else is drawn between two of them.
        tokens = image.shape[3] * image.shape[4]
        levels = [scale * (timestep / 1000.0) ** 2 for timestep in schedule.timesteps]
        steps = [level * draws.normal(latents.shape[1:])[:, :tokens].to(self.device) for level in levels]
        noised = torch.stack([latents[:, :tokens] + step for step in steps])
        return latents, torch.cat([noised[-1], latents[:, tokens:]], dim=1), noised

    def _encoded(self, media: Conditioning, request: Request) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, C, 1, h, w] of one item's image, fp32."""
        assert media.image is not None, "checked at planning"
        pixels = torch.tensor(media.image, dtype=torch.float32, device=self.device).permute(2, 0, 1)[None, :, None]
        mean, logvar = self.vae.encode((pixels / 255 * 2 - 1).to(self.dtypes["vae"]), request.tiling)
        return mean.float(), torch.exp(0.5 * logvar).float()

    def _positions(self, grid: tuple[int, int, int], fps: float) -> Tensor:
        """[N, 3] seconds, rows and columns in pixels of each token, as shares of BASE_POSITIONS, fp32. The frames of
        LTXConditionPipeline are those that a latent begins with, of which the first has one alone."""
        space, time = self.params.vae.spatial_factor, self.params.vae.temporal_factor
        frames, rows, columns = (torch.arange(size, dtype=torch.float32, device=self.device) for size in grid)
        if self.params.condition:
            seconds = (frames * time + 1 - time).clamp(min=0) * (1.0 / fps)
        else:
            seconds = frames * (time / fps)
        axes = torch.meshgrid(seconds, rows * space, columns * space, indexing="ij")
        shares = [axis / base for axis, base in zip(axes, BASE_POSITIONS, strict=True)]
        return torch.stack(shares, dim=-1).flatten(0, 2)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        rescale = float(spec.param(request, self.params, "guidance_rescale") or 0.0)
        return Guidance(request.guidance_scale, branches(request.guidance_scale > 1), rescale)

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: Branch, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """The velocity [B, N, C] of packed latents x at step i, one forward. A given image's tokens are told that no
        noise is left in them. The timestep stays fp32: in bf16 neighbours of a schedule become one number."""
        given = conditioning.given
        if given is not None and given.noised is not None:
            x = torch.cat([given.noised[i], x[:, given.noised.shape[2] :]], dim=1)
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        clean = None if given is None else given.clean
        return self.transformer(x, timestep, conditioning.rope, conditioning.text, clean, cp)

    def decode(self, latents: Tensor, request: Request, draws: Draws, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Packed latents [1, N, C] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32. A
        decoder with a timestep is given latents with so much noise mixed in."""
        wide = self.vae.denormalise(unpack(latents, spec.grid(request, self.params)))
        timestep = 0.0
        if self.params.vae.timestep_conditioning:
            timestep = float(spec.param(request, self.params, "decode_timestep") or 0.0)
            chosen = spec.param(request, self.params, "decode_noise_scale")
            scale = timestep if chosen is None else float(chosen)
            wide = (1 - scale) * wide + scale * draws.normal(wide.shape[1:]).to(wide.device)
        for chunk in self.vae.decode_chunks(wide.to(self.dtypes["vae"]), request.tiling, timestep, draws, ranks=ranks):
            yield shown(chunk)


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device, first: bool = True
) -> LTXPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in; a named one is that
    of all three. float16 is refused: T5 v1.1 xxl overflows in it. Not `first`, a rank of a gang beside rank 0: without
    the text encoder."""
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in WITH_WEIGHTS}
    for name, chosen in dtypes.items():
        if chosen not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"model.dtype: {name} would run in {str(chosen)[6:]}, which overflows; allowed: float32, bfloat16"
            )
    with torch.device("meta"):
        transformer, vae = LTXVideoTransformer3DModel(params.transformer), LTXVAE(params.vae)
    load_weights(transformer, folder, "transformer", dtype=dtypes["transformer"], device=device)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device, keep_fp32=LTXVAE.KEEP_FP32)
    encoder = None
    if first:
        # LTXConditionPipeline masks the padding of a prompt; the other two let the encoder attend to it.
        encoder = load_text_encoder(
            folder,
            max_tokens=params.max_tokens,
            dtype=dtypes["text_encoder"],
            device=device,
            padding="none" if params.condition else "attended",
            clean=None,
        )
    return LTXPipeline(params, transformer, vae, encoder, dtypes, device)


def linear_quadratic(steps: int) -> tuple[float, ...]:
    """Noise levels of LTXConditionPipeline: for half of the steps evenly from 1 down to 1 - LINEAR_UNTIL, then along
    the parabola that goes on with the same slope and would reach 0 after the last step."""
    if steps < 2:
        return (1.0,)
    half = steps // 2
    slope, rest = LINEAR_UNTIL / half, steps - half
    bend = (1 - LINEAR_UNTIL - slope * rest) / rest**2
    gone = [slope * i + bend * max(0, i - half) ** 2 for i in range(steps)]
    return tuple(1.0 - x for x in gone)


def pack(latents: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B, N, C], frame by frame and row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(latents: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The way back, for a grid of (frames, rows, columns)."""
    return latents.transpose(1, 2).unflatten(2, grid)
