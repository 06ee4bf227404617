"""Mochi 1 text-to-video: limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

Refuses to know what a tensor is, where a checkpoint lies, and how a plan is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vidgen.models.mochi.params import COMPONENTS as COMPONENTS
from vidgen.models.mochi.params import PIPELINES as PIPELINES
from vidgen.models.mochi.params import PUBLISHED, TransformerParams, VAEParams
from vidgen.models.mochi.params import Params as Params
from vidgen.models.mochi.params import read as read
from vidgen.specs import limits
from vidgen.specs.config import DTYPE_BYTES
from vidgen.specs.t5 import t5_weights
from vidgen.types import Request

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {"t2v": {}}
CHECKPOINT = True
PARAMS: Mapping[str, type] = {}
SAMPLERS = ("euler",)

DEFAULT_TILES = (256, 256, 192, 192)
WHOLE_PICTURE = 1280 * 720
"""Pixels of the largest picture that `vae_tiling: auto` decodes whole."""


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The published recipe, or what the checkpoint's vidgen.json says; the shift as its scheduler has it."""
    limits.check_task(task, TASKS, "mochi")
    own = {"sampler": "euler", "shift": params.scheduler.shift, "sigmas": None, "timesteps": None}
    return {**PUBLISHED, **own, "params": {}, **dict(params.recipe)}


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    multiple = params.vae.spatial_factor * params.transformer.patch_size
    found = limits.request_problems(request, TASKS, PARAMS)
    found += limits.size_problems(request, (multiple, multiple), (1, params.vae.temporal_factor))
    found += limits.schedule_problems(request, SAMPLERS, params.scheduler.num_train_timesteps, ("sigmas",))
    if request.num_inference_steps == 1 and request.sigmas is None:
        found.append("num_inference_steps is 1; allowed: 2 or more, or explicit sigmas (the schedule has two parts)")
    return found + limits.tile_problems(request, params.vae.spatial_factor)


def frames_out(request: Request) -> int:
    """Frames of the finished video."""
    return request.num_frames


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
    """Tiles for this shape: `on` those of diffusers wherever a picture is larger than one, `auto` the same above
    1280 x 720 pixels only, `off` none."""
    limits.check_tiling_mode(mode)
    fits = request.height <= DEFAULT_TILES[0] and request.width <= DEFAULT_TILES[1]
    small = request.height * request.width <= WHOLE_PICTURE
    return None if mode == "off" or fits or (mode == "auto" and small) else DEFAULT_TILES


def batch_key(request: Request, params: Params) -> str:
    """Equal for items that may share a batch. Prompts of different lengths may: they attend one by one."""
    return limits.batch_key(request)


def tokens(request: Request, params: Params) -> int:
    """Video tokens of one forward of the transformer: latent frames x height x width over the patch."""
    edge = params.vae.spatial_factor * params.transformer.patch_size
    frames = 1 + (request.num_frames - 1) // params.vae.temporal_factor
    return frames * (request.height // edge) * (request.width // edge)


def text_tokens(prompt: str, params: Params) -> int:
    """Text tokens of one forward, a word of the prompt counted as one: as near as it gets without a tokenizer, and all
    256 are 2 % of the work at the published size."""
    if prompt == "" and params.zero_empty_prompt:
        return 0
    return min(len(prompt.split()) + 1, params.text_tokens)


def flops(request: Request, params: Params) -> float:
    """Operations of all transformer forwards of the item: 2 per multiply-add of matrix products, convolutions and
    attention. The pooled caption and its projection are made once a prompt, not in a forward, and are not counted."""
    n = tokens(request, params)
    prompts = (request.prompt, request.negative_prompt)[: limits.branches(request)]
    forwards = sum(_forward(params.transformer, n, text_tokens(prompt, params)) for prompt in prompts)
    return 2.0 * forwards * request.num_inference_steps


def _forward(t: TransformerParams, n: int, text: int) -> int:
    """Multiply-adds of one forward over n video tokens and `text` text tokens."""
    d, wide, patch = t.width, t.pooled_projection_dim, t.patch_size**2
    # Video: queries, keys, values, the result, the feed-forward, and its modulation.
    video = n * d * (4 * d + 3 * t.ffn_dim) + 4 * d * d
    attention = 2 * d * (n + text) ** 2
    # Text: queries, keys, values; then, except in the last layer, the result, the feed-forward and three modulations.
    words = 3 * text * wide * d + d * wide
    answers = text * wide * (d + 3 * t.text_ffn_dim) + 3 * d * wide
    time = d * (t.time_embed_dim + d) + 2 * d * d
    ends = n * d * patch * (t.in_channels + t.out_channels)
    return t.num_layers * (video + attention + words) + (t.num_layers - 1) * answers + time + ends


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
    d, wide, patch = t.width, t.pooled_projection_dim, t.patch_size**2
    attention = 3 * d * d + 3 * wide * d + 4 * t.attention_head_dim + (d * d + d)
    block = (4 * d * d + 4 * d) + attention + 3 * d * t.ffn_dim + (d * wide + wide)
    # All but the last also write the text: the result, the feed-forward, and three more modulations.
    answers = (d * wide + wide) + 3 * wide * t.text_ffn_dim + 3 * (d * wide + wide)
    time = (t.time_embed_dim * d + d) + (d * d + d)
    embed = t.text_embed_dim
    pool = (2 * embed * embed + 2 * embed) + (embed * embed + embed) + (embed * d + d)
    caption = embed * wide + wide
    ends = (t.in_channels * patch * d + d) + (2 * d * d + 2 * d) + (d + 1) * patch * t.out_channels
    return t.num_layers * block + (t.num_layers - 1) * answers + time + pool + caption + 3 * d // 2 + ends


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights."""

    def stack(layers: int, c: int, attend: bool = False) -> int:
        """Residual blocks of two norms and two convolutions, each with an attention behind it or not."""
        residual = 2 * (2 * c) + 2 * (27 * c * c + c)
        return layers * (residual + (2 * c + 4 * c * c + c if attend else 0))

    grows = [time * space * space for time, space in zip(v.temporal_expansions, v.spatial_expansions, strict=True)]
    layers, attends = v.layers_per_block, v.add_attention_block
    widths = v.encoder_block_out_channels
    total = (v.in_channels + 1) * widths[0] + stack(layers[0], widths[0], attends[0])
    for level, (a, b) in enumerate(pairwise(widths)):
        total += a * b * grows[level] + b + stack(layers[level + 1], b, attends[level + 1])
    total += stack(layers[-1], widths[-1], attends[-1]) + 2 * widths[-1] + widths[-1] * 2 * v.latent_channels

    widths = v.decoder_block_out_channels
    total += (v.latent_channels + 1) * widths[-1] + stack(layers[-1], widths[-1])
    for level, (b, a) in enumerate(pairwise(widths)):
        total += stack(layers[level + 1], a) + (a + 1) * b * grows[level]
    return total + stack(layers[0], widths[0]) + (widths[0] + 1) * v.out_channels


def heads(params: Params) -> int:
    """Attention heads of the transformer."""
    return params.transformer.num_attention_heads


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the closing one included."""
    return "tokenizer", params.text_tokens
