"""Wan's half of the denoising loop: its three networks, and what goes into and comes out of each.

Refuses to know the loop over steps, the guidance formula, batching and caching of prompts: those are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import dtype_named, load_weights, published_dtype
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.models.wan.params import Params
from vidgen.models.wan.transformer import TextContext, WanTransformer3DModel
from vidgen.models.wan.vae import WanVAE
from vidgen.parallel import IDENTITY, ContextParallel
from vidgen.sampling.flow import euler, euler_schedule
from vidgen.sampling.step import Draws, Guidance, Sampler, Schedule, Start
from vidgen.sampling.unipc import unipc, unipc_schedule
from vidgen.text.prompt import Prompt, Text, padded
from vidgen.text.t5 import TextEncoder, load_text_encoder
from vidgen.types import Request

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
WITH_WEIGHTS = ("text_encoder", "transformer", "vae")


@dataclass
class WanPipeline:
    """Text-to-video. Implements `vidgen.loop.Pipeline`; the conditioning of a branch is a `TextContext`."""

    params: Params
    transformer: WanTransformer3DModel
    vae: WanVAE
    text_encoder: TextEncoder
    dtypes: Mapping[str, torch.dtype]
    device: torch.device
    _negative: dict[str, TextContext] = field(default_factory=dict, repr=False)
    """Keys and values of the last negative prompt, by digest: one entry."""

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch; a guidance scale of 1 or less has no unconditional one."""
        prompts = {CONDITIONAL: Prompt(request.prompt)}
        if request.guidance_scale > 1:
            prompts[UNCONDITIONAL] = Prompt(request.negative_prompt)
        return prompts

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, in the dtype of the transformer."""
        return [self.text_encoder.encode(prompt).to(self.dtypes["transformer"]) for prompt in prompts]

    def schedule(self, request: Request) -> Schedule:
        """Noise levels of the request's sampler; an explicit shift, sigmas or timesteps replace the checkpoint's."""
        steps, shift, sigmas = request.num_inference_steps, request.shift, request.sigmas
        if request.sampler == "unipc":
            return unipc_schedule(self.params.scheduler, steps, shift=shift, sigmas=sigmas)
        return euler_schedule(self.params.scheduler, steps, shift=shift, sigmas=sigmas, timesteps=request.timesteps)

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        return unipc(schedule, self.params.scheduler) if request.sampler == "unipc" else euler(schedule)

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        """Pure noise [B, C, F, H, W], one draw an item in that shape, and the text's keys and values."""
        request, vae = requests[0], self.params.vae
        shape = (
            self.params.transformer.in_channels,
            1 + (request.num_frames - 1) // vae.temporal_factor,
            request.height // vae.spatial_factor,
            request.width // vae.spatial_factor,
        )
        known = dict(self._negative)
        conditioning = {}
        for branch, prompts in texts.items():
            for text in prompts:
                if text.digest not in known:
                    known[text.digest] = self.transformer.text_context(padded(text, self.text_encoder.max_tokens))
            conditioning[branch] = TextContext.join([known[text.digest] for text in prompts])
        if UNCONDITIONAL in texts:
            last = texts[UNCONDITIONAL][-1].digest
            self._negative = {last: known[last]}
        return Start(draws.normal(shape).to(self.device), conditioning)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        guided = request.guidance_scale > 1
        return Guidance(request.guidance_scale, (CONDITIONAL, UNCONDITIONAL) if guided else (CONDITIONAL,))

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: TextContext, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """The velocity [B, C, F, H, W] of latents x at step i, one forward. The timestep stays fp32: in bf16 neighbours
        of a schedule become one number."""
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        return self.transformer(x.to(self.dtypes["transformer"]), timestep, conditioning, cp)

    def decode(self, latents: Tensor, request: Request, draws: Draws) -> Iterator[Tensor]:
        """Latents [1, C, F, H, W] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32."""
        wide = self.vae.denormalise(latents.to(self.dtypes["vae"]))
        for chunk in self.vae.decode_chunks(wide, request.tiling):
            yield (chunk[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device
) -> WanPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in; a named one is that
    of all three, with Wan's norms, time embedding and modulation tables in fp32. float16 is refused."""
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in WITH_WEIGHTS}
    for name, chosen in dtypes.items():
        if chosen not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"model.dtype: {name} would run in {str(chosen)[6:]}, which gives noise; allowed: float32, bfloat16"
            )
    with torch.device("meta"):
        transformer, vae = WanTransformer3DModel(params.transformer), WanVAE(params.vae)
    keep = WanTransformer3DModel.KEEP_FP32
    load_weights(transformer, folder, "transformer", dtype=dtypes["transformer"], device=device, keep_fp32=keep)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device)
    encoder = load_text_encoder(folder, max_tokens=params.text_tokens, dtype=dtypes["text_encoder"], device=device)
    return WanPipeline(params, transformer, vae, encoder, dtypes, device)
