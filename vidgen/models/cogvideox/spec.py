"""CogVideoX 1.0 and 1.5: limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

A checkpoint whose transformer reads latents alone does text-to-video and video-to-video; one that reads an image's
latents beside them does image-to-video and nothing else. Refuses to know what a tensor is, where a checkpoint lies,
and how a plan is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vidgen.models.cogvideox.params import COMPONENTS as COMPONENTS
from vidgen.models.cogvideox.params import PUBLISHED, PUBLISHED_1_5, TransformerParams, VAEParams
from vidgen.models.cogvideox.params import Params as Params
from vidgen.models.cogvideox.params import read as read
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
TASKS: Mapping[str, Mapping[str, bool]] = {"t2v": {}, "i2v": {"image": True}, "v2v": {"video": True}}
CHECKPOINT = True
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "CogVideoXPipeline": ("t2v",),
    "CogVideoXImageToVideoPipeline": ("i2v",),
    "CogVideoXVideoToVideoPipeline": ("v2v",),
}
PARAMS: Mapping[str, type] = {"strength": float, "use_dynamic_cfg": bool}
SAMPLERS = ("ddim", "dpm")

STRENGTH = 0.8
"""Of the noise that video-to-video starts from, by default: 0.8 of the steps are done."""
WHOLE_PICTURE = 1360 * 768
"""Pixels of the largest picture that `vae_tiling: auto` decodes whole: the one of 1.5."""
CHUNK = 8
"""Frames that the autoencoder takes together; the first frame of a clip is one more."""


def tasks_of(params: Params) -> dict[str, Mapping[str, bool]]:
    """The tasks of this checkpoint."""
    return {task: media for task, media in TASKS.items() if (task == "i2v") == params.from_image}


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The published recipe of 1.0 or 1.5, or what the checkpoint's vidgen.json says; the sampler is its scheduler's.
    1.0 has the size it was trained on. `strength` is null where the task has none. ConfigError for another task than
    the checkpoint's."""
    check_task(task, TASKS, "cogvideox")
    check_task(task, tasks_of(params), "this checkpoint of cogvideox")
    t, space = params.transformer, params.vae.spatial_factor
    if t.patch_size_t is None:
        trained = {"height": t.sample_height * space, "width": t.sample_width * space, "num_frames": t.sample_frames}
        given = {**PUBLISHED, **trained}
    else:
        given = dict(PUBLISHED_1_5)
    if task == "v2v" and t.patch_size_t is not None:
        given["num_frames"] -= 1
    own = {"sampler": params.scheduler.sampler, "shift": None, "sigmas": None, "timesteps": None}
    family = {"strength": STRENGTH if task == "v2v" else None, "use_dynamic_cfg": False}
    return {**given, **own, "params": family, **dict(params.recipe)}


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    found = request_problems(request, tasks_of(params), PARAMS)
    if request.task in tasks_of(params):
        found += _size_problems(request, params) + _strength_problems(request)
    found += schedule_problems(request, SAMPLERS, params.scheduler.num_train_timesteps, ("timesteps",))
    if request.shift is not None:
        found.append(f"shift is {request.shift}; CogVideoX's is part of the checkpoint, allowed: null")
    last = params.scheduler.num_train_timesteps - 1
    if any(t != int(t) or t > last for t in request.timesteps or ()):
        found.append(f"timesteps is {list(request.timesteps or ())}; allowed: whole numbers from 1 to {last}")
    return found + tile_problems(request, params.vae.spatial_factor)


def _size_problems(request: Request, params: Params) -> list[str]:
    t, space = params.transformer, params.vae.spatial_factor
    pixels = space * t.patch_size
    found = size_problems(request, (pixels, pixels), (_first(request.task, params), CHUNK))
    if found:
        return found
    names, grid = ("num_frames", "height", "width"), _grid(request, params)
    if t.use_learned_positional_embeddings:
        trained = (t.sample_frames, t.sample_height * space, t.sample_width * space)
        return [
            f"{name} is {getattr(request, name)}; allowed: {size}, because this checkpoint learned a position a token"
            for name, size in zip(names, trained, strict=True)
            if getattr(request, name) != size
        ]
    if t.patch_size_t is None:
        return []
    return [
        f"{name} is {getattr(request, name)}; allowed: at most {most * pixels} ({most} positions)"
        for name, count, most in zip(names[1:], grid[1:], t.trained_grid[1:], strict=True)
        if count > most
    ]


def _first(task: str, params: Params) -> int:
    """The smallest number of frames; more come by eights, for any other number is not what would be decoded.

    1 + 8 k frames have an odd number of latent frames. 1.5 takes them in pairs: it makes one too many and drops it,
    but cannot where the latents come from a video, so that one has 8 k.
    """
    return CHUNK if task == "v2v" and params.transformer.patch_size_t else 1


def _strength_problems(request: Request) -> list[str]:
    strength = request.param("strength")
    if request.task != "v2v":
        return [] if strength is None else [f"params.strength is {strength}; only v2v has one, allowed: null"]
    if strength is None:
        return ["params.strength is missing; v2v needs one"]
    if not isinstance(strength, (int, float)):
        return []  # Its type is named already.
    if not 0 < strength <= 1:
        return [f"params.strength is {strength}; allowed: more than 0, at most 1"]
    if steps(request) < 1:
        least = 1 / request.num_inference_steps if request.num_inference_steps > 0 else 1
        return [
            f"params.strength is {strength}, which leaves no step of num_inference_steps "
            f"{request.num_inference_steps}; allowed: {least:g} or more"
        ]
    return []


def steps(request: Request) -> int:
    """Steps that are done: with `strength` the last ones of the schedule."""
    strength = request.param("strength")
    if strength is None:
        return request.num_inference_steps
    return min(int(request.num_inference_steps * float(strength)), request.num_inference_steps)


def frames_out(request: Request) -> int:
    """Frames of the finished video."""
    return request.num_frames


def latent_frames(request: Request, params: Params) -> int:
    """Latent frames of the finished video."""
    return 1 + (request.num_frames - 1) // params.vae.temporal_factor


def added_frames(request: Request, params: Params) -> int:
    """Latent frames that are denoised before those of the video to fill a patch of 1.5, and dropped."""
    return -latent_frames(request, params) % params.transformer.depth


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
    """Tiles for this shape: `on` those of diffusers (half the autoencoder's sample size, overlapping by a sixth of the
    height and a fifth of the width) wherever a picture is larger than one, `auto` the same above 1360 x 768 pixels
    only, `off` none."""
    check_tiling_mode(mode)
    vae = params.vae
    factor = vae.spatial_factor
    height, width = (size // 2 // factor for size in (vae.sample_height, vae.sample_width))
    tiles = tuple(factor * size for size in (height, width, height - height // 6, width - width // 5))
    fits = request.height <= tiles[0] and request.width <= tiles[1]
    small = request.height * request.width <= WHOLE_PICTURE
    return None if mode == "off" or fits or (mode == "auto" and small) else (tiles[0], tiles[1], tiles[2], tiles[3])


def batch_key(request: Request, params: Params) -> str:
    """Equal for items that may share a batch. Prompts are padded to one length, so that is not part of it."""
    return shared_batch_key(request)


def tokens(request: Request, params: Params) -> int:
    """Video tokens of one forward of the transformer: latent frames x height x width over the patch. The text's are
    attended to beside them and not counted here."""
    return math.prod(_grid(request, params))


def flops(request: Request, params: Params) -> float:
    """Operations of all transformer forwards of the item: 2 per multiply-add of matrix products, convolutions and
    attention. A prompt's projection to tokens is made once, not in a forward, and is not counted."""
    t = params.transformer
    n, d, time = tokens(request, params), t.width, t.time_embed_dim
    joint = n + params.text_tokens
    # Four projections and two products of attention, the feed-forward of width 4 D, two modulations.
    block = joint * d * (4 * d + 2 * joint + 8 * d) + 2 * time * 6 * d
    embeddings = d * time + time * time + (2 * t.ofs_embed_dim**2 if t.ofs_embed_dim else 0)
    ends = n * d * t.patch_volume * (t.in_channels + t.out_channels) + time * 2 * d
    return 2.0 * (t.num_layers * block + embeddings + ends) * steps(request) * branches(request)


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
    """Numbers in the transformer's weights, learned positions included."""
    d, time = t.width, t.time_embed_dim
    attention = 4 * d * d + (4 * d if t.attention_bias else d) + 4 * t.attention_head_dim
    modulation = time * 6 * d + 6 * d + 2 * d
    block = attention + 2 * modulation + 8 * d * d + 5 * d
    patch_bias = d if t.patch_bias or t.patch_size_t else 0
    embed = t.in_channels * t.patch_volume * d + patch_bias + t.text_embed_dim * d + d
    embed += d * time + time + time * time + time
    embed += 2 * (t.ofs_embed_dim**2 + t.ofs_embed_dim) if t.ofs_embed_dim else 0
    learned = (t.max_text_seq_length + math.prod(t.trained_grid)) * d if t.use_learned_positional_embeddings else 0
    outputs = t.patch_volume * t.out_channels
    out = 2 * d + time * 2 * d + 2 * d + 2 * d + d * outputs + outputs
    return t.num_layers * block + embed + learned + out


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights."""

    def conv(a: int, b: int, kernel: int) -> int:
        return a * b * kernel + b

    def norm(a: int, spatial: bool) -> int:
        return 2 * a + (2 * conv(v.latent_channels, a, 1) if spatial else 0)

    def residual(a: int, b: int, spatial: bool) -> int:
        shortcut = conv(a, b, 1) if a != b else 0
        return norm(a, spatial) + norm(b, spatial) + conv(a, b, 27) + conv(b, b, 27) + shortcut

    def half(widths: tuple[int, ...], layers: int, ends: tuple[int, int], spatial: bool) -> int:
        """An encoder or decoder, block after block; every block but the last resamples. The middle one, two residual
        blocks deep, has the widest channels."""
        total = conv(ends[0], widths[0], 27) + conv(widths[-1], ends[1], 27) + norm(widths[-1], spatial)
        total += 2 * residual(max(widths), max(widths), spatial)
        for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
            total += residual(a, b, spatial) + (layers - 1) * residual(b, b, spatial)
            total += conv(b, b, 9) if level < len(widths) - 1 else 0
        return total

    widths = v.block_out_channels
    down = half(widths, v.layers_per_block, (v.in_channels, 2 * v.latent_channels), spatial=False)
    up = half(widths[::-1], v.layers_per_block + 1, (v.latent_channels, v.out_channels), spatial=True)
    return down + up


def heads(params: Params) -> int:
    """Attention heads of the transformer."""
    return params.transformer.num_attention_heads


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the closing one included."""
    return "tokenizer", params.text_tokens


def _grid(request: Request, params: Params) -> tuple[int, int, int]:
    """Patches along frames, height and width, the added frames included."""
    t, pixels = params.transformer, params.vae.spatial_factor * params.transformer.patch_size
    frames = latent_frames(request, params) + added_frames(request, params)
    return frames // t.depth, request.height // pixels, request.width // pixels
