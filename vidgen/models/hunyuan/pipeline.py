"""HunyuanVideo's half of the denoising loop: its networks, and what goes into and comes out of each.

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
from vidgen.models.hunyuan import spec
from vidgen.models.hunyuan.params import CONCAT, REPLACE, TEXT_TOKENS, WITH_WEIGHTS, Params
from vidgen.models.hunyuan.transformer import HunyuanVideoTransformer3DModel, TextContext
from vidgen.models.hunyuan.vae import HunyuanVAE
from vidgen.nn.frames import shown
from vidgen.parallel import ALONE, IDENTITY, ContextParallel, Ranks
from vidgen.sampling.flow import euler, euler_schedule
from vidgen.sampling.step import CONDITIONAL, UNCONDITIONAL, Draws, Guidance, Sampler, Schedule, Start, branches
from vidgen.text.llama_clip import LlamaClipEncoder, PicturePrompt, load_llama_clip
from vidgen.text.prompt import Prompt, Text, encoded
from vidgen.types import Request

NOISE_SHARE = 0.999
"""How much of an image-to-video start is noise; the rest is the image, in every frame."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Conditioning of one branch of a batch. `guidance` [B] is a thousand times the embedded scale, None where there is
    none; `image` [B, z + 1, f, h, w] goes beside the latents: those of the image, zero after the first frame, and a
    mask of that frame."""

    text: TextContext
    guidance: Tensor | None
    image: Tensor | None


@dataclass
class HunyuanPipeline:
    """Text- and image-to-video. Implements `vidgen.loop.Pipeline`; the conditioning of a branch is a `Branch`."""

    params: Params
    transformer: HunyuanVideoTransformer3DModel
    vae: HunyuanVAE
    text_encoder: LlamaClipEncoder | None
    dtypes: Mapping[str, torch.dtype]
    device: torch.device

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch; the unconditional one is there for a `true_cfg_scale` above 1 only. With an image
        its picture is black, and of that picture's tokens every second is kept, whatever the checkpoint keeps of an
        image's: so the reference calls it."""
        image, guided = media.image, spec.branches(request) > 1
        if image is None:
            prompts = {CONDITIONAL: Prompt(request.prompt)}
            return prompts | ({UNCONDITIONAL: Prompt(request.negative_prompt)} if guided else {})
        interleave = int(request.param("image_embed_interleave") or 1)
        pictured: dict[str, Prompt] = {CONDITIONAL: PicturePrompt(request.prompt, image, interleave)}
        if guided:
            pictured[UNCONDITIONAL] = PicturePrompt(
                request.negative_prompt, np.zeros_like(image), spec.INTERLEAVE[CONCAT]
            )
        return pictured

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, in the dtype of the transformer."""
        return encoded(self.text_encoder, prompts, self.dtypes["transformer"])

    def schedule(self, request: Request) -> Schedule:
        """Noise levels: evenly from 1 to 1 / S, shifted; explicit sigmas or timesteps replace the spacing, an explicit
        shift the checkpoint's."""
        steps, sigmas = request.num_inference_steps, request.sigmas
        if sigmas is None and request.timesteps is None:
            sigmas = tuple(np.linspace(1.0, 0.0, steps + 1)[:-1])
        return euler_schedule(
            self.params.scheduler, steps, shift=request.shift, sigmas=sigmas, timesteps=request.timesteps
        )

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
        """Noise [B, z, f, h, w], one draw an item in that shape; with images a thousandth of them in every frame, and
        the first frame pinned or further channels, as the checkpoint has it."""
        request, vae = requests[0], self.params.vae
        kind = self.params.transformer.image_condition_type
        shape = (
            vae.latent_channels,
            1 + (request.num_frames - 1) // vae.temporal_compression_ratio,
            request.height // vae.spatial_compression_ratio,
            request.width // vae.spatial_compression_ratio,
        )
        latents = draws.normal(shape).to(self.device)
        channels, pin = None, None
        if kind is not None:
            images = torch.cat([self._encoded(one, r) for one, r in zip(media, requests, strict=True)])
            share = torch.tensor([NOISE_SHARE], device=self.device)
            latents = latents * share + images * (1 - share)
            frames = torch.arange(shape[1], device=self.device).view(1, 1, -1, 1, 1)
            if kind == REPLACE:
                pin = (frames == 0, images)
            else:
                first = (frames == 0).float().expand(len(requests), 1, *shape[1:])
                channels = torch.cat([images * first, first], dim=1)
        guidance = self._guidance(requests)
        known = {text.digest: text for prompts in texts.values() for text in prompts}
        contexts = {digest: self._context(text) for digest, text in known.items()}
        conditioning = {
            branch: Branch(TextContext.join([contexts[text.digest] for text in prompts]), guidance, channels)
            for branch, prompts in texts.items()
        }
        return Start(latents, conditioning, pin)

    def _encoded(self, media: Conditioning, request: Request) -> Tensor:
        """Latents [1, z, 1, h, w] of one item's image, fp32: the mode of the posterior, nothing is drawn."""
        assert media.image is not None, "checked at planning"
        pixels = torch.tensor(media.image, device=self.device).float().permute(2, 0, 1)[None, :, None]
        mean, _ = self.vae.encode((pixels / 255 * 2 - 1).to(self.dtypes["vae"]), request.tiling)
        return mean.float() * self.params.vae.scaling_factor

    def _guidance(self, requests: Sequence[Request]) -> Tensor | None:
        """Embedded scales, multiplied in the transformer's dtype: 6 is told as 6016 in bf16, as in the reference."""
        if not self.params.transformer.guidance_embeds:
            return None
        scales = [request.guidance_scale for request in requests]
        return torch.tensor(scales, dtype=self.dtypes["transformer"], device=self.device) * 1000.0

    def _context(self, text: Text) -> TextContext:
        assert text.pooled is not None, "CLIP's vector comes with the prompt"
        return self.transformer.text_context(text.embedding[None, : text.tokens], text.pooled[None])

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        """The scale of the formula is `true_cfg_scale`; `guidance_scale` is embedded."""
        guided = spec.branches(request) > 1
        scale = float(request.param("true_cfg_scale") or 1.0)
        return Guidance(scale, branches(guided))

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: Branch, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """The velocity [B, z, f, h, w] of latents x at step i, one forward. The timestep stays fp32: in bf16 neighbours
        of a schedule become one number."""
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        seen = x if conditioning.image is None else torch.cat([x, conditioning.image], dim=1)
        return self.transformer(
            seen.to(self.dtypes["transformer"]), timestep, conditioning.text, conditioning.guidance, cp
        )

    def decode(self, latents: Tensor, request: Request, draws: Draws, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Latents [1, z, f, h, w] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32; of a
        checkpoint that puts the image beside the latents without the first 4."""
        concat = self.params.transformer.image_condition_type == CONCAT
        dropped = spec.DROPPED_FRAMES if concat else 0
        wide = latents.to(self.dtypes["vae"]) / self.params.vae.scaling_factor
        for chunk in self.vae.decode_chunks(wide, request.tiling, ranks=ranks):
            # Only the first tile in time is cut, and it is longer than that.
            yield shown(chunk[:, :, dropped:])
            dropped = 0


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device, first: bool = True
) -> HunyuanPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in; a named one is that
    of all four. float16 is refused for the transformer: it was trained and published in bfloat16, whose range it needs.
    Not `first`, a rank of a gang beside rank 0: without the encoders of texts and pictures."""
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in WITH_WEIGHTS}
    if dtypes["transformer"] not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"model.dtype: transformer would run in {str(dtypes['transformer'])[6:]}, which overflows; allowed: "
            "float32, bfloat16"
        )
    with torch.device("meta"):
        transformer, vae = HunyuanVideoTransformer3DModel(params.transformer), HunyuanVAE(params.vae)
    load_weights(transformer, folder, "transformer", dtype=dtypes["transformer"], device=device)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device)
    encoder = load_llama_clip(folder, max_tokens=TEXT_TOKENS, dtypes=dtypes, device=device) if first else None
    return HunyuanPipeline(params, transformer, vae, encoder, dtypes, device)
