"""Wan 2.1 text-to-video: limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

Refuses to know what a tensor is, where a checkpoint lies, and how a plan is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vidgen.models.wan.params import COMPONENTS as COMPONENTS
from vidgen.models.wan.params import PUBLISHED
from vidgen.models.wan.params import Params as Params
from vidgen.models.wan.params import TransformerParams as TransformerParams
from vidgen.models.wan.params import VAEParams as VAEParams
from vidgen.models.wan.params import read as read
from vidgen.models.wan.params import scheduler_params as scheduler_params
from vidgen.models.wan.params import transformer_params as transformer_params
from vidgen.models.wan.params import vae_params as vae_params
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
TASKS: Mapping[str, Mapping[str, bool]] = {"t2v": {}}
CHECKPOINT = True
PIPELINES = ("WanPipeline",)
PARAMS: Mapping[str, type] = {}
SAMPLERS = ("unipc", "euler")

DEFAULT_TILES = (256, 256, 192, 192)
WHOLE_PICTURE = 1280 * 720
"""Pixels of the largest picture that `vae_tiling: auto` decodes whole."""


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The published recipe of Wan 2.1, or what the checkpoint's vidgen.json says; sampler and shift as its scheduler
    has them. Sizes in pixels and frames, fps in frames a second."""
    check_task(task, TASKS, "wan")
    own = {"sampler": params.scheduler.sampler, "shift": params.scheduler.shift, "sigmas": None, "timesteps": None}
    return {**PUBLISHED, **own, "params": {}, **dict(params.recipe)}


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    found = request_problems(request, TASKS, PARAMS) + _size_problems(request, params)
    found += schedule_problems(request, SAMPLERS, params.scheduler.num_train_timesteps)
    if request.timesteps is not None and request.sampler == "unipc":
        found.append("timesteps is given; sampler 'unipc' makes its own from the sigmas, allowed: sampler 'euler'")
    return found + tile_problems(request, params.vae.spatial_factor)


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
    attention. Keys and values of the text are made once a prompt, not in a forward, and are not counted."""
    t = params.transformer
    n, d, text = tokens(request, params), t.width, params.text_tokens
    patch = math.prod(t.patch_size)
    # Four projections of self-attention, two of cross-attention (query, out), two of the feed-forward.
    linear = n * d * (4 * d + 2 * d + 2 * t.ffn_dim)
    attention = 2 * n * d * (n + text)
    time = d * (t.freq_dim + d + 6 * d)
    ends = n * d * patch * (t.in_channels + t.out_channels)
    return 2.0 * (t.num_layers * (linear + attention) + time + ends) * request.num_inference_steps * branches(request)


def weight_bytes(params: Params) -> int:
    """Bytes of transformer, VAE and text encoder in their published dtype, counted from the sizes alone."""
    dtypes = dict(params.dtypes)
    counts = {
        "transformer": transformer_weights(params.transformer),
        "vae": vae_weights(params.vae),
        "text_encoder": t5_weights(params.text),
    }
    return sum(count * DTYPE_BYTES[dtypes[name]] for name, count in counts.items())


def transformer_weights(t: TransformerParams) -> int:
    """Numbers in the transformer's weights."""
    d, patch = t.width, math.prod(t.patch_size)
    attention = 4 * (d * d + d) + 2 * d
    norm2 = 2 * d if t.cross_attn_norm else 0
    block = 2 * attention + norm2 + 2 * d * t.ffn_dim + t.ffn_dim + d + 6 * d
    time = (t.freq_dim * d + d) + (d * d + d) + (6 * d * d + 6 * d)
    text = (t.text_dim * d + d) + (d * d + d)
    ends = (t.in_channels * patch * d + d) + (d * t.out_channels * patch + t.out_channels * patch) + 2 * d
    return t.num_layers * block + time + text + ends


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights."""

    def conv(a: int, b: int, kernel: int) -> int:
        return a * b * kernel + b

    def residual(a: int, b: int) -> int:
        return a + b + conv(a, b, 27) + conv(b, b, 27) + (conv(a, b, 1) if a != b else 0)

    def attend(a: int) -> int:
        return a + conv(a, 3 * a, 1) + conv(a, a, 1)

    levels = len(v.dim_mult)
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
        total += residual(a if level == 0 else a // 2, b) + v.num_res_blocks * residual(b, b)
        if level < levels - 1:
            temporal = v.temperal_downsample[levels - 2 - level]
            total += conv(b, b // 2, 9) + (conv(b, 2 * b, 3) if temporal else 0)
    return total + b + conv(b, v.out_channels, 27)


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the closing one included."""
    return "tokenizer", params.text_tokens


def _grid(request: Request, params: Params) -> tuple[int, int, int]:
    """Tokens along frames, height and width."""
    patch, vae = params.transformer.patch_size, params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_factor
    height, width = request.height // vae.spatial_factor, request.width // vae.spatial_factor
    return frames // patch[0], height // patch[1], width // patch[2]
