"""Mochi's half of the denoising loop: its three networks, and what goes into and comes out of each.

Mochi counts from noise (0) to picture (1). Here its levels are ordinary noise levels, sigma = 1 - level, and the
prediction is the negated one: the trajectory is the same, and the step and the guidance are everybody's.

Refuses to know the loop over steps, the guidance formula, batching and caching of prompts: those are the engine's.
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
from vidgen.models.mochi.params import Params
from vidgen.models.mochi.transformer import MochiTransformer3DModel, TextContext
from vidgen.models.mochi.vae import MochiVAE
from vidgen.nn.frames import shown
from vidgen.parallel import ALONE, IDENTITY, ContextParallel, Ranks
from vidgen.sampling.flow import euler, euler_schedule
from vidgen.sampling.step import Draws, Guidance, Sampler, Schedule, Start, branches
from vidgen.text.prompt import Prompt, Text, encoded, prompts_of
from vidgen.text.t5 import TextEncoder, load_text_encoder
from vidgen.types import Request

WITH_WEIGHTS = ("text_encoder", "transformer", "vae")
THRESHOLD_NOISE = 0.025
"""How far the linear half of the schedule goes from noise to picture."""


def linear_quadratic(steps: int, threshold: float = THRESHOLD_NOISE) -> list[float]:
    """Noise levels of `steps` >= 2 steps, from 1 down: the first half falls by `threshold` in equal steps, the second
    on as a parabola, without a kink, towards 0 (the linear-quadratic schedule of Movie Gen, arXiv 2410.13720)."""
    linear = steps // 2
    quadratic = steps - linear
    slope = threshold / linear
    bend = (1 - threshold - slope * quadratic) / quadratic**2
    rest = [threshold + slope * i + bend * i**2 for i in range(quadratic)]
    return [1.0 - level for level in [*(slope * i for i in range(linear)), *rest]]


@dataclass
class MochiPipeline:
    """Text-to-video. Implements `vidgen.loop.Pipeline`; the conditioning of a branch is a `TextContext`."""

    params: Params
    transformer: MochiTransformer3DModel
    vae: MochiVAE
    text_encoder: TextEncoder | None
    dtypes: Mapping[str, torch.dtype]
    device: torch.device

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch; a guidance scale of 1 or less has no unconditional one."""
        return prompts_of(request)

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, in the dtype of the transformer. Where the checkpoint forces zeros for an empty
        prompt, that masks all of its tokens, the closing one too: it has none."""
        dtype = self.dtypes["transformer"]
        nothing = torch.zeros(0, self.params.text.d_model, dtype=dtype, device=self.device)
        return [
            Text(prompt.digest, nothing, 0)
            if self.params.zero_empty_prompt and prompt.text == ""
            else encoded(self.text_encoder, [prompt], dtype)[0]
            for prompt in prompts
        ]

    def schedule(self, request: Request) -> Schedule:
        """Linear-quadratic noise levels, or the request's sigmas, shifted; the model is told 1 - sigma, in thousandths.
        float32 as the scheduler computes it."""
        sigmas = request.sigmas or linear_quadratic(request.num_inference_steps)
        options = self.params.scheduler
        made = euler_schedule(options, request.num_inference_steps, shift=request.shift, sigmas=sigmas)
        levels = np.float32(1) - np.array(made.sigmas, dtype=np.float32)
        told = levels * np.float32(options.num_train_timesteps)
        return Schedule.flow(told.tolist(), [*(1.0 - levels.astype(np.float64)).tolist(), 0.0])

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
        """Pure noise [B, C, F, H, W], one draw an item in that shape, and what the transformer makes of each text."""
        request, vae = requests[0], self.params.vae
        shape = (
            self.params.transformer.in_channels,
            1 + (request.num_frames - 1) // vae.temporal_factor,
            request.height // vae.spatial_factor,
            request.width // vae.spatial_factor,
        )
        conditioning = {
            branch: TextContext.join([self.transformer.text_context(own.embedding[None, : own.tokens]) for own in row])
            for branch, row in texts.items()
        }
        return Start(draws.normal(shape).to(self.device), conditioning)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        return Guidance(request.guidance_scale, branches(request.guidance_scale > 1))

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: TextContext, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """The velocity [B, C, F, H, W] from picture to noise of latents x at step i, one forward. The timestep stays
        fp32: in bf16 neighbours of a schedule become one number."""
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        return -self.transformer(x.to(self.dtypes["transformer"]), timestep, conditioning, cp)

    def decode(self, latents: Tensor, request: Request, draws: Draws, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Latents [1, C, F, H, W] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32."""
        wide = self.vae.denormalise(latents).to(self.dtypes["vae"])
        for chunk in self.vae.decode_chunks(wide, request.tiling, ranks=ranks):
            yield shown(chunk)


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device, first: bool = True
) -> MochiPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in; a named one is that
    of all three, with `MochiTransformer3DModel.KEEP_FP32` in fp32. float16 is refused. Not `first`, a rank of a gang
    beside rank 0: without the text encoder."""
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in WITH_WEIGHTS}
    for name, chosen in dtypes.items():
        if chosen not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"model.dtype: {name} would run in {str(chosen)[6:]}, in which T5 overflows; allowed: float32, bfloat16"
            )
    with torch.device("meta"):
        transformer, vae = MochiTransformer3DModel(params.transformer), MochiVAE(params.vae)
    keep = MochiTransformer3DModel.KEEP_FP32
    load_weights(transformer, folder, "transformer", dtype=dtypes["transformer"], device=device, keep_fp32=keep)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device)
    encoder = None
    if first:
        encoder = load_text_encoder(
            folder, max_tokens=params.text_tokens, dtype=dtypes["text_encoder"], device=device, clean=None
        )
    return MochiPipeline(params, transformer, vae, encoder, dtypes, device)
