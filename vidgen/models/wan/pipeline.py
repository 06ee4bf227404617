"""Wan's half of the denoising loop: its networks, and what goes into and comes out of each.

Refuses to know the loop over steps, the guidance formula, batching and caching of prompts: those are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import dtype_named, load_weights, published_dtype
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.models.wan.params import Params
from vidgen.models.wan.spec import first_step, tasks_of
from vidgen.models.wan.transformer import Context, WanTransformer3DModel
from vidgen.models.wan.vae import Tiling, WanVAE
from vidgen.nn.frames import shown
from vidgen.parallel import ALONE, IDENTITY, ContextParallel, Ranks
from vidgen.sampling.flow import euler, euler_schedule
from vidgen.sampling.step import UNCONDITIONAL, Draws, Guidance, Sampler, Schedule, Start, branches
from vidgen.sampling.unipc import unipc, unipc_schedule
from vidgen.specs.limits import check_task
from vidgen.text.clip_vision import ImageEncoder, load_image_encoder
from vidgen.text.prompt import Prompt, Text, encoded, padded, prompts_of
from vidgen.text.t5 import TextEncoder, load_text_encoder
from vidgen.types import Request

IN_FP32 = ("encoder", "quant_conv")
"""Parts of the VAE that encode. In bf16 the condition of image-to-video is visibly off."""


@dataclass
class Branch:
    """What one branch of a batch is conditioned on. `texts` are the prompts, `extra` [B, C, F, H, W] goes in beside the
    latents, `image` is looked at by cross-attention, `first_known` says that the first latent frame is clean.

    `made` holds the prompts' keys and values for the expert that is at work, and for that one alone: at 14B they take
    0.4 GB a prompt and expert, and an item leaves the first expert for good. `negative`: the next batch will want them.
    """

    texts: tuple[Text, ...]
    extra: Tensor | None = None
    image: Context | None = None
    first_known: bool = False
    negative: bool = False
    made: tuple[str, Context] | None = field(default=None, repr=False)


@dataclass
class WanPipeline:
    """Text, image and video to video. Implements `vidgen.loop.Pipeline`; a branch is conditioned on a `Branch`."""

    params: Params
    experts: Mapping[str, WanTransformer3DModel]
    vae: WanVAE
    text_encoder: TextEncoder | None
    image_encoder: ImageEncoder | None
    dtypes: Mapping[str, torch.dtype]
    device: torch.device
    _negative: dict[str, Context] = field(default_factory=dict, repr=False)
    """Keys and values of the last negative prompt, by digest: one entry. Of two experts none are kept: the next batch
    begins with the one that this batch has left."""

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The only transformer, or the expert for high noise."""
        return self.experts["transformer"]

    def forget(self) -> None:
        """Lets go of what is kept from one batch to the next."""
        self._negative = {}

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch; a guidance scale of 1 or less has no unconditional one."""
        return prompts_of(request)

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Each prompt's embeddings, in the dtype of the transformer."""
        return encoded(self.text_encoder, prompts, self.dtypes["transformer"])

    def schedule(self, request: Request) -> Schedule:
        """Noise levels of the request's sampler, for v2v from the level to which the video is noised. An explicit
        shift, sigmas or timesteps replace the checkpoint's."""
        options, steps = self.params.scheduler, request.num_inference_steps
        shift, sigmas = request.shift, request.sigmas
        if request.sampler == "unipc":
            whole = unipc_schedule(options, steps, shift=shift, sigmas=sigmas)
        else:
            whole = euler_schedule(options, steps, shift=shift, sigmas=sigmas, timesteps=request.timesteps)
        return whole.tail(first_step(request))

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        if request.sampler != "unipc":
            return euler(schedule)
        # The checkpoint counts the steps without corrector from the start of the whole schedule.
        without = tuple(i - first_step(request) for i in self.params.scheduler.disable_corrector)
        return unipc(schedule, replace(self.params.scheduler, disable_corrector=without))

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        """Noise [B, z, f, h, w], one draw an item in that shape, or videos with that noise mixed in; and what the
        branches are conditioned on. Images and videos are encoded to the mean of their posterior, which draws nothing.
        """
        request = requests[0]
        x = draws.normal(self._latent_shape(request)).to(self.device)
        extra = image = pin = None
        if request.task == "v2v":
            clean = torch.cat([self._encoded(_given(one.video), request.tiling) for one in media])
            x = schedule.alphas[0] * clean + schedule.sigmas[0] * x
        elif request.task == "i2v" and self.params.concatenates:
            extra = torch.cat([self._mask_and_images(one, request) for one in media])
            image = self._image_tokens(media)
        elif request.task == "i2v":
            first = torch.zeros(1, 1, x.shape[2], 1, 1, dtype=torch.bool, device=self.device)
            first[:, :, 0] = True
            pin = (first, torch.cat([self._encoded(_given(one.image)[None], request.tiling) for one in media]))
        conditioning = {
            name: Branch(tuple(prompts), extra, image, pin is not None, name == UNCONDITIONAL)
            for name, prompts in texts.items()
        }
        for branch in conditioning.values():
            self._text_context(branch, self._expert(schedule, 0))
        return Start(x, conditioning, pin)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        """The first scale decides whether there is guidance, also where the second expert has a scale of its own."""
        expert, scale = self._expert(schedule, i), request.guidance_scale
        second = request.param("guidance_scale_2")
        if expert == "transformer_2" and isinstance(second, (int, float)):
            scale = second
        return Guidance(scale, branches(request.guidance_scale > 1), expert=expert)

    def predict(
        self, x: Tensor, schedule: Schedule, i: int, conditioning: Branch, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """The velocity [B, z, f, h, w] of latents x at step i, one forward. The timestep stays fp32: in bf16 neighbours
        of a schedule become one number."""
        expert = self._expert(schedule, i)
        timestep = torch.full((len(x),), schedule.timesteps[i], dtype=torch.float32, device=x.device)
        if conditioning.first_known:
            timestep = timestep[:, None].repeat(1, x.shape[2])
            timestep[:, 0] = 0
        x = x.to(self.dtypes[expert])
        x = x if conditioning.extra is None else torch.cat([x, conditioning.extra], dim=1)
        text = self._text_context(conditioning, expert)
        return self.experts[expert](x, timestep, text, conditioning.image, cp)

    def decode(self, latents: Tensor, request: Request, draws: Draws, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Latents [1, z, f, h, w] of one item -> its frames as they come, [n, height, width, 3] in [0, 1], fp32."""
        wide = self.vae.denormalise(latents.to(self.dtypes["vae"]))
        for chunk in self.vae.decode_chunks(wide, request.tiling, ranks=ranks):
            yield shown(chunk)

    def _latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        vae = self.params.vae
        frames = 1 + (request.num_frames - 1) // vae.temporal_factor
        return vae.z_dim, frames, request.height // vae.spatial_factor, request.width // vae.spatial_factor

    def _expert(self, schedule: Schedule, i: int) -> str:
        boundary = self.params.boundary_ratio
        if boundary is None or schedule.timesteps[i] >= boundary * self.params.scheduler.num_train_timesteps:
            return "transformer"
        return "transformer_2"

    def _text_context(self, branch: Branch, expert: str) -> Context:
        """Keys and values of the branch's prompts for one expert: kept by the branch, or from the last negative prompt,
        or made now."""
        if branch.made is None or branch.made[0] != expert:
            branch.made = None  # before the next are made: both at once would not be needed
            known = dict(self._negative)
            for text in branch.texts:
                if text.digest not in known:
                    whole = padded(text, self.params.text_tokens)
                    known[text.digest] = self.experts[expert].text_context(whole)
            branch.made = (expert, Context.join([known[text.digest] for text in branch.texts]))
            if branch.negative and len(self.experts) == 1:
                last = branch.texts[-1].digest
                self._negative = {last: known[last]}
        return branch.made[1]

    def _encoded(self, frames: np.ndarray, tiling: Tiling | None) -> Tensor:
        """Pixels, uint8 [F, H, W, 3] -> normalised latents [1, z, f, h, w], fp32."""
        return self.vae.normalise(self.vae.encode(_pixels(frames).to(self.device), tiling)[0])

    def _mask_and_images(self, media: Conditioning, request: Request) -> Tensor:
        """[1, temporal factor + z, f, h, w] in the transformer's dtype: which frames are given, a channel for each that
        a latent frame stands for (the first frame counts for all of its latent's), and the encoded clip of the given
        frames with mid-grey between them."""
        first, last = _pixels(_given(media.image)[None]), media.last_image
        clip = torch.zeros(1, 3, request.num_frames, *first.shape[3:])
        given = torch.zeros(request.num_frames)
        clip[:, :, :1], given[0] = first, 1
        if last is not None:
            clip[:, :, -1:], given[-1] = _pixels(last[None]), 1
        latents = self.vae.normalise(self.vae.encode(clip.to(self.device), request.tiling)[0])
        factor = self.params.vae.temporal_factor
        given = torch.cat([given[:1].repeat(factor), given[1:]]).view(1, -1, factor, 1, 1).transpose(1, 2)
        mask = given.expand(-1, -1, -1, *latents.shape[3:]).to(latents)
        return torch.cat([mask, latents], dim=1).to(self.dtypes["transformer"])

    def _image_tokens(self, media: Sequence[Conditioning]) -> Context | None:
        """Keys and values of what the image encoder sees in each item's images, the same for both branches."""
        if self.params.image is None:
            return None
        assert self.image_encoder is not None, "rank 0 of a gang alone looks at pictures"
        seen = []
        for one in media:
            images = [_given(one.image)] + ([] if one.last_image is None else [one.last_image])
            seen.append(self.image_encoder.encode(images).flatten(0, 1).unsqueeze(0))
        return self.transformer.image_context(torch.cat(seen).to(self.dtypes["transformer"]))


def load(
    folder: CheckpointFolder, params: Params, *, task: str, dtype: str | None, device: torch.device, first: bool = True
) -> WanPipeline:
    """The networks of a local checkpoint. `dtype` null runs each in the dtype it was published in; a named one is that
    of all, with Wan's norms, time embedding and modulation tables and the VAE's encoder in fp32. float16 is refused.
    Not `first`, a rank of a gang beside rank 0: without the encoders of texts and pictures."""
    check_task(task, tasks_of(params), "this checkpoint of wan")
    components = (*params.experts, "vae", "text_encoder", *(() if params.image is None else ("image_encoder",)))
    dtypes = {name: dtype_named(dtype) if dtype else published_dtype(folder, name) for name in components}
    for name, chosen in dtypes.items():
        if chosen not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"model.dtype: {name} would run in {str(chosen)[6:]}, which gives noise; allowed: float32, bfloat16"
            )
    with torch.device("meta"):
        experts = {name: WanTransformer3DModel(params.transformer) for name in params.experts}
        vae = WanVAE(params.vae)
    keep = WanTransformer3DModel.KEEP_FP32
    for name, expert in experts.items():
        load_weights(expert, folder, name, dtype=dtypes[name], device=device, keep_fp32=keep)
    load_weights(vae, folder, "vae", dtype=dtypes["vae"], device=device, keep_fp32=IN_FP32)
    encoder = eyes = None
    if first:
        encoder = load_text_encoder(folder, max_tokens=params.text_tokens, dtype=dtypes["text_encoder"], device=device)
    if first and params.image is not None:
        eyes = load_image_encoder(folder, dtype=dtypes["image_encoder"], device=device)
    return WanPipeline(params, experts, vae, encoder, eyes, dtypes, device)


def _given(image: np.ndarray | None) -> np.ndarray:
    assert image is not None, "media that a task needs are there: the spec's problems and the loop's reading say so"
    return image


def _pixels(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, F, H, W] in [-1, 1], rounded as diffusers' VideoProcessor does it."""
    return 2.0 * (torch.tensor(frames).permute(3, 0, 1, 2)[None].float() / 255.0) - 1.0
