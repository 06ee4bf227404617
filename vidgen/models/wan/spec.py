"""Wan 2.1 and 2.2: tasks, limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

Refuses to know what a tensor is, where a checkpoint lies, and how a plan is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vidgen.models.wan.params import COMPONENTS as COMPONENTS
from vidgen.models.wan.params import Params as Params
from vidgen.models.wan.params import TransformerParams as TransformerParams
from vidgen.models.wan.params import VAEParams as VAEParams
from vidgen.models.wan.params import image_encoder_params as image_encoder_params
from vidgen.models.wan.params import read as read
from vidgen.models.wan.params import scheduler_params as scheduler_params
from vidgen.models.wan.params import transformer_params as transformer_params
from vidgen.models.wan.params import vae_params as vae_params
from vidgen.models.wan.recipes import (
    DENSE,
    EXPERTS,
    EXPERTS_IMAGE,
    EXPERTS_IMAGE_SECOND,
    EXPERTS_SECOND,
    FIRST_AND_LAST,
    PUBLISHED,
    STRENGTH,
)
from vidgen.specs.clip import clip_vision_weights
from vidgen.specs.config import DTYPE_BYTES
from vidgen.specs.limits import batch_key as shared_batch_key
from vidgen.specs.limits import (
    branches,
    check_task,
    check_tiling_mode,
    request_problems,
    schedule_problems,
    size_problems,
    tile_problems,
)
from vidgen.specs.t5 import t5_weights
from vidgen.types import Request

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {
    "t2v": {},
    "i2v": {"image": True, "last_image": False},
    "v2v": {"video": True},
}
CHECKPOINT = True
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "WanPipeline": ("t2v",),
    "WanImageToVideoPipeline": ("i2v",),
    "WanVideoToVideoPipeline": ("v2v",),
}
PARAMS: Mapping[str, type] = {"guidance_scale_2": float, "strength": float}
SAMPLERS = ("unipc", "euler")

DEFAULT_TILES = (256, 256, 192, 192)
WHOLE_PICTURE = 1280 * 720
"""Pixels of the largest picture that `vae_tiling: auto` decodes whole."""


def tasks_of(params: Params) -> dict[str, dict[str, bool]]:
    """The tasks that this checkpoint can do, as `TASKS` has them: its input channels, experts and image positions say.

    A video is changed by one transformer over all noise levels, as no published recipe has it for two.
    """
    if params.concatenates:
        # With an image encoder, as many images as it was trained for; without one, the mask says what is given.
        last = {0: {"last_image": False}, 1: {}, 2: {"last_image": True}}[params.images]
        return {"i2v": {"image": True, **last}}
    if params.expand_timesteps:
        return {"t2v": {}, "i2v": {"image": True}}
    return {"t2v": {}} if params.boundary_ratio is not None else {"t2v": {}, "v2v": {"video": True}}


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The recipe on the checkpoint's model card, or what its vidgen.json says; sampler and shift as its scheduler has
    them. Sizes in pixels and frames, fps in frames a second. Parameters that do not apply are left out."""
    check_task(task, TASKS, "wan")
    check_task(task, tasks_of(params), "this checkpoint of wan")
    published, second = PUBLISHED, None
    if params.boundary_ratio is not None and params.concatenates:
        published, second = EXPERTS_IMAGE, EXPERTS_IMAGE_SECOND
    elif params.boundary_ratio is not None:
        published, second = EXPERTS, EXPERTS_SECOND
    elif params.expand_timesteps:
        published = DENSE
    elif params.images == 2:
        published = FIRST_AND_LAST
    own = {"sampler": params.scheduler.sampler, "shift": params.scheduler.shift, "sigmas": None, "timesteps": None}
    given = {} if second is None else {"guidance_scale_2": second}
    if task == "v2v":
        given["strength"] = STRENGTH
    return {**published, **own, "params": given, **dict(params.recipe)}


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    found = request_problems(request, tasks_of(params), PARAMS) + _size_problems(request, params)
    found += schedule_problems(request, SAMPLERS, params.scheduler.num_train_timesteps)
    if request.timesteps is not None and request.sampler == "unipc":
        found.append("timesteps is given; sampler 'unipc' makes its own from the sigmas, allowed: sampler 'euler'")
    if request.last_image is not None and request.num_frames == 1:
        found.append("last_image is given and num_frames is 1; allowed: more frames, so that first and last differ")
    return found + _param_problems(request, params) + tile_problems(request, params.vae.spatial_factor)


def _param_problems(request: Request, params: Params) -> list[str]:
    found = []
    second, strength = request.param("guidance_scale_2"), request.param("strength")
    if second is not None and params.boundary_ratio is None:
        found.append(f"params.guidance_scale_2 is {second}; only a checkpoint with transformer_2 has a second scale")
    elif isinstance(second, (int, float)) and second < 1:
        found.append(f"params.guidance_scale_2 is {second}; allowed: 1 (no guidance) or more")
    if request.task != "v2v":
        if strength is not None:
            found.append(f"params.strength is {strength}; only v2v has a strength")
    elif strength is None:
        found.append("params.strength is missing; v2v needs one, more than 0, at most 1")
    elif isinstance(strength, (int, float)) and not 0 < strength <= 1:
        found.append(f"params.strength is {strength}; allowed: more than 0, at most 1")
    elif first_step(request) >= request.num_inference_steps > 0:
        found.append(
            f"params.strength is {strength}; of {request.num_inference_steps} steps it leaves none, "
            f"allowed: at least {1 / request.num_inference_steps:.6g}"
        )
    return found


def first_step(request: Request) -> int:
    """The step of the schedule at which denoising begins: a video to be changed stands for those before it. Counted as
    WanVideoToVideoPipeline does it."""
    strength = request.param("strength")
    if request.task != "v2v" or not isinstance(strength, (int, float)):
        return 0
    return max(request.num_inference_steps - int(request.num_inference_steps * strength), 0)


def _size_problems(request: Request, params: Params) -> list[str]:
    patch, limit = params.transformer.patch_size, params.transformer.rope_max_seq_len
    space, time = params.vae.spatial_factor, params.vae.temporal_factor
    found = size_problems(request, (space * patch[1], space * patch[2]), (1 + time * (patch[0] - 1), time * patch[0]))
    if found:
        return found
    names = ("num_frames", "height", "width")
    most = _largest(params)
    for name, positions, largest in zip(names, _grid(request, params), most, strict=True):
        if positions > limit:
            found.append(f"{name} is {getattr(request, name)}; allowed: at most {largest} ({limit} positions)")
    return found


def _largest(params: Params) -> tuple[int, int, int]:
    """Frames, height and width that fill the positions the model knows."""
    patch, limit = params.transformer.patch_size, params.transformer.rope_max_seq_len
    space = params.vae.spatial_factor * limit
    return 1 + params.vae.temporal_factor * (limit * patch[0] - 1), space * patch[1], space * patch[2]


def frames_out(request: Request) -> int:
    """Frames of the finished video."""
    return request.num_frames


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
    """Tiles for this shape: `on` those of diffusers wherever a picture is larger than one, `auto` the same above
    1280 x 720 pixels only, `off` none."""
    check_tiling_mode(mode)
    fits = request.height <= DEFAULT_TILES[0] and request.width <= DEFAULT_TILES[1]
    small = request.height * request.width <= WHOLE_PICTURE
    return None if mode == "off" or fits or (mode == "auto" and small) else DEFAULT_TILES


def batch_key(request: Request, params: Params) -> str:
    """Equal for items that may share a batch. Prompts are padded to one length, so that is not part of it."""
    return shared_batch_key(request)


def tokens(request: Request, params: Params) -> int:
    """Tokens of one forward of the transformer: latent frames x height x width over the patch."""
    return math.prod(_grid(request, params))


def flops(request: Request, params: Params) -> float:
    """Operations of all transformer forwards of the item: 2 per multiply-add of matrix products, convolutions and
    attention. Keys and values of text and images are made once, before the first, and are not counted, but for those
    that a second expert makes of the text when it takes over."""
    t = params.transformer
    n, d = tokens(request, params), t.width
    seen = params.text_tokens + (params.images * params.image.tokens if params.image is not None else 0)
    patch = math.prod(t.patch_size)
    # Four projections of self-attention, two of cross-attention (query, out), two of the feed-forward.
    linear = n * d * (4 * d + 2 * d + 2 * t.ffn_dim)
    attention = 2 * n * d * (n + seen)
    times = _grid(request, params)[0] if params.expand_timesteps and request.task == "i2v" else 1
    time = times * d * (t.freq_dim + d + 6 * d)
    ends = n * d * patch * (t.in_channels + t.out_channels)
    steps = request.num_inference_steps - first_step(request)
    forward = t.num_layers * (linear + attention) + time + ends
    handover = params.text_tokens * d * (t.text_dim + d + t.num_layers * 2 * d) * (len(params.experts) - 1)
    return 2.0 * (forward * steps + handover) * branches(request)


def weight_bytes(params: Params) -> int:
    """Bytes of every component with weights in its published dtype, counted from the sizes alone."""
    counts = {"vae": vae_weights(params.vae), "text_encoder": t5_weights(params.text)}
    counts |= {name: transformer_weights(params.transformer) for name in params.experts}
    if params.image is not None:
        counts["image_encoder"] = clip_vision_weights(params.image)
    dtypes = dict(params.dtypes)
    return sum(count * DTYPE_BYTES[dtypes[name]] for name, count in counts.items())


def transformer_weights(t: TransformerParams) -> int:
    """Numbers in the transformer's weights."""
    d, patch = t.width, math.prod(t.patch_size)
    attention = 4 * (d * d + d) + 2 * d
    norm2 = 2 * d if t.cross_attn_norm else 0
    added = 0 if t.added_kv_proj_dim is None else 2 * (t.added_kv_proj_dim * d + d) + d
    block = 2 * attention + added + norm2 + 2 * d * t.ffn_dim + t.ffn_dim + d + 6 * d
    time = (t.freq_dim * d + d) + (d * d + d) + (6 * d * d + 6 * d)
    text = (t.text_dim * d + d) + (d * d + d)
    image = 0
    if (i := t.image_dim) is not None:
        image = 2 * i + (i * i + i) + (i * d + d) + 2 * d + (t.pos_embed_seq_len or 0) * i
    ends = (t.in_channels * patch * d + d) + (d * t.out_channels * patch + t.out_channels * patch) + 2 * d
    return t.num_layers * block + time + text + image + ends


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights."""

    def conv(a: int, b: int, kernel: int) -> int:
        return a * b * kernel + b

    def residual(a: int, b: int) -> int:
        return a + b + conv(a, b, 27) + conv(b, b, 27) + (conv(a, b, 1) if a != b else 0)

    def attend(a: int) -> int:
        return a + conv(a, 3 * a, 1) + conv(a, a, 1)

    levels, halving = len(v.dim_mult), 1 if v.is_residual else 2
    widths = [v.base_dim * mult for mult in (1, *v.dim_mult)]
    total = conv(v.in_channels, widths[0], 27)
    for level, (a, b) in enumerate(pairwise(widths)):
        total += residual(a, b) + (v.num_res_blocks - 1) * residual(b, b)
        total += v.num_res_blocks * attend(b) if 2.0**-level in v.attn_scales else 0
        if level < levels - 1:
            total += conv(b, b, 9) + (conv(b, b, 3) if v.temperal_downsample[level] else 0)
    total += 2 * residual(b, b) + attend(b) + b + conv(b, 2 * v.z_dim, 27)
    total += conv(2 * v.z_dim, 2 * v.z_dim, 1) + conv(v.z_dim, v.z_dim, 1)

    widths = [v.decoder_base_dim * mult for mult in (v.dim_mult[-1], *reversed(v.dim_mult))]
    total += conv(v.z_dim, widths[0], 27) + 2 * residual(widths[0], widths[0]) + attend(widths[0])
    for level, (a, b) in enumerate(pairwise(widths)):
        total += residual(a if level == 0 else a // halving, b) + v.num_res_blocks * residual(b, b)
        if level < levels - 1:
            temporal = v.temperal_downsample[levels - 2 - level]
            total += conv(b, b // halving, 9) + (conv(b, 2 * b, 3) if temporal else 0)
    return total + b + conv(b, v.out_channels, 27)


def heads(params: Params) -> int:
    """Attention heads of the transformer."""
    return params.transformer.num_attention_heads


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the closing one included."""
    return "tokenizer", params.text_tokens


def _grid(request: Request, params: Params) -> tuple[int, int, int]:
    """Tokens along frames, height and width."""
    patch, vae = params.transformer.patch_size, params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_factor
    height, width = request.height // vae.spatial_factor, request.width // vae.spatial_factor
    return frames // patch[0], height // patch[1], width // patch[2]
