"""Allegro's half of the denoising loop: its three networks, and what goes into and comes out of each.

Latents are [B, z, f, h, w] with the noise of k-diffusion on them, and are scaled for the transformer alone. Refuses to
know the loop over steps, the guidance formula, batching and caching of prompts: those are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import dtype_named, load_weights, published_dtype
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.models.allegro import spec
from vidgen.models.allegro.caption import prepared
from vidgen.models.allegro.params import Params
from vidgen.models.allegro.transformer import AllegroTransformer3DModel, TextContext
from vidgen.models.allegro.vae import AllegroVAE
from vidgen.nn.frames import shown
from vidgen.parallel import ALONE, IDENTITY, ContextParallel, Ranks
from vidgen.sampling.ancestral import euler, euler_ancestral, input_scale, sigma_schedule, start_sigma
from vidgen.sampling.diffusion import alpha_bars, betas
from vidgen.sampling.step import Draws, Guidance, Sampler, Schedule, Start, branches
from vidgen.specs.limits import check_task
from vidgen.text.prompt import Prompt, Text, encoded, padded, prompts_of
from vidgen.text.t5 import TextEncoder, load_text_encoder
from vidgen.types import Request


@dataclass
class AllegroPipeline:
    """Text-to-video. Implements `vidgen.loop.Pipeline`; a branch is conditioned on its prompts' `TextContext`."""

    params: Params
    transformer: AllegroTransformer3DModel
    vae: AllegroVAE
    text_encoder: TextEncoder | None
    dtypes: Mapping[str, torch.dtype]
    device: torch.device

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch, cleaned; a guidance scale of 1 or less has no unconditional one."""
        return prompts_of(request, partial(prepared, clean=bool(request.param("clean_caption"))))

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, in the dtype of the transformer."""
        return encoded(self.text_encoder, prompts, self.dtypes["transformer"])

    def schedule(self, request: Request) -> Schedule:
        """Levels of the checkpoint's noise schedule at its spacing, or at the request's timesteps."""
        s = self.params.scheduler
        variances = betas(s.beta_schedule, s.num_train_timesteps, s.beta_start, s.beta_end)
        return sigma_schedule(
            alpha_bars(variances, zero_terminal_snr=s.rescale_betas_zero_snr),
            request.num_inference_steps,
            spacing=s.timestep_spacing,
            offset=s.steps_offset,
            timesteps=request.timesteps,
        )

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        make = euler_ancestral if request.sampler == "euler_ancestral" else euler
        return make(schedule, self.params.scheduler.prediction_type)

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        """Noise [B, z, f, h, w], one draw an item in that shape, at the level where the schedule starts."""
        shape = (self.params.vae.latent_channels, *spec.grid(requests[0], self.params))
        noise = draws.normal(shape) * start_sigma(schedule, self.params.scheduler.timestep_spacing)
        return Start(noise.to(self.device), {branch: self._context(prompts) for branch, prompts in texts.items()})

    def _context(self, prompts: Sequence[Text]) -> TextContext:
        """Keys and values of a batch of prompts; where they differ in length, the shorter ones are masked."""
        lengths = torch.tensor([text.tokens for text in prompts], device=self.device)
        longest = int(lengths.max())
        whole = torch.cat([padded(text, longest) for text in prompts])
        shown = torch.arange(longest, device=self.device) < lengths[:, None]
        return self.transformer.text_context(whole, None if bool(shown.all()) else shown)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        return Guidance(request.guidance_scale, branches(request.guidance_scale > 1))

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: TextContext, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """The noise, or v, [B, z, f, h, w] of latents x at step i, one forward. The timestep stays fp32: it is not
        whole, and in bf16 neighbours of a schedule become one number."""
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        return self.transformer(x * input_scale(schedule.sigmas[i]), timestep, conditioning, cp)

    def decode(self, latents: Tensor, request: Request, draws: Draws, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Latents [1, z, f, h, w] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32."""
        wide = (1 / self.params.vae.scaling_factor * latents).to(self.dtypes["vae"])
        for chunk in self.vae.decode_chunks(wide, request.tiling, ranks=ranks):
            yield shown(chunk)


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device, first: bool = True
) -> AllegroPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in; a named one is that
    of all, but for the transformer's timestep embedding and modulation tables, and for an autoencoder with
    `force_upcast`, which stay fp32. float16 is refused: T5 v1.1 xxl overflows in it. Not `first`, a rank of a gang
    beside rank 0: without the text encoder."""
    check_task(task, spec.TASKS, "allegro")
    components = ("transformer", "vae", "text_encoder")
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in components}
    if params.vae.force_upcast:
        dtypes["vae"] = torch.float32
    for name, chosen in dtypes.items():
        if chosen not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"model.dtype: {name} would run in {str(chosen)[6:]}, which overflows; allowed: float32, bfloat16"
            )
    with torch.device("meta"):
        transformer, vae = AllegroTransformer3DModel(params.transformer), AllegroVAE(params.vae)
    keep = AllegroTransformer3DModel.KEEP_FP32
    load_weights(transformer, folder, "transformer", dtype=dtypes["transformer"], device=device, keep_fp32=keep)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device)
    encoder = None
    if first:
        encoder = load_text_encoder(
            folder, max_tokens=params.text_tokens, dtype=dtypes["text_encoder"], device=device, clean=None
        )
    return AllegroPipeline(params, transformer, vae, encoder, dtypes, device)
