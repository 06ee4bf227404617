"""LTX-Video: limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

Refuses to know what a tensor is, where a checkpoint lies, and how a plan is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from vidgen.models.ltx.params import COMPONENTS as COMPONENTS
from vidgen.models.ltx.params import PIPELINES as PIPELINES
from vidgen.models.ltx.params import PUBLISHED, STRIDES, TIME_CHANNELS, TransformerParams, VAEParams
from vidgen.models.ltx.params import Params as Params
from vidgen.models.ltx.params import read as read
from vidgen.specs import limits
from vidgen.specs.config import DTYPE_BYTES
from vidgen.specs.t5 import t5_weights
from vidgen.types import Request, Scalar

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {"t2v": {}, "i2v": {"image": True}}
CHECKPOINT = True
PARAMS: Mapping[str, type] = {
    "decode_timestep": float,
    "decode_noise_scale": float,
    "guidance_rescale": float,
    "image_cond_noise_scale": float,
}
SAMPLERS = ("euler",)

DEFAULT_TILES = (512, 512, 448, 448)
WHOLE_PICTURE = 1280 * 720
"""Pixels of the largest picture that `vae_tiling: auto` decodes whole."""


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The defaults of the published pipelines, or what the checkpoint's vidgen.json says. A shift of null is the
    checkpoint's own: by the number of tokens, where its scheduler shifts dynamically. The decoder's timestep and noise
    are those of the published examples, and 0 and null for a decoder that takes none; noise on a given image is
    LTXConditionPipeline's alone."""
    limits.check_task(task, TASKS, "ltx")
    timed = params.vae.timestep_conditioning
    own: dict[str, Scalar] = {
        "decode_timestep": 0.05 if timed else 0.0,
        "decode_noise_scale": 0.025 if timed else None,
        "guidance_rescale": 0.0,
    }
    if params.condition:
        own["image_cond_noise_scale"] = 0.15 if task == "i2v" else 0.0
    schedule = {"sampler": "euler", "shift": None, "sigmas": None, "timesteps": None}
    return {**PUBLISHED, **schedule, **dict(params.recipe), "params": own}


def param(request: Request, params: Params, name: str) -> Scalar:
    """A family parameter of the request, or its default where the request does not name it."""
    return request.param(name, defaults(request.task, params)["params"].get(name))


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    found = limits.request_problems(request, TASKS, PARAMS)
    if request.task not in TASKS:
        return found
    space, time = params.vae.spatial_factor, params.vae.temporal_factor
    first = 1 if request.task == "t2v" else 1 + time  # an image alone leaves nothing to denoise
    found += limits.size_problems(request, (space, space), (first, time))
    found += _schedule_problems(request, params)
    return found + limits.tile_problems(request, space) + _param_problems(request, params)


def _schedule_problems(request: Request, params: Params) -> list[str]:
    explicit = ("sigmas", "timesteps") if params.plain_levels else ("sigmas",)
    found = limits.schedule_problems(request, SAMPLERS, params.scheduler.num_train_timesteps, explicit)
    if request.num_inference_steps == 1 and params.scheduler.shift_terminal:
        last = params.scheduler.shift_terminal
        found.append(f"num_inference_steps is 1; allowed: 2 or more, for levels that are stretched from 1 to {last}")
    if request.timesteps is not None and params.plain_levels and request.shift not in (None, 1):
        found.append(f"shift is {request.shift}; allowed beside timesteps: null, since these are told as they are")
    return found


def _param_problems(request: Request, params: Params) -> list[str]:
    decoder = (1.0, "0 to 1") if params.vae.timestep_conditioning else (0.0, "0, this decoder takes no timestep")
    image = (math.inf, "0 or more")
    if not (params.condition and request.task == "i2v"):
        image = (0.0, "0, but for i2v of an LTXConditionPipeline")
    allowed = {
        "decode_timestep": decoder,
        "decode_noise_scale": decoder,
        "guidance_rescale": (1.0, "0 to 1"),
        "image_cond_noise_scale": image,
    }
    return [
        f"params.{name} is {value}; allowed: {allowed[name][1]}"
        for name, value in request.params
        if name in allowed and _is_number(value) and not 0 <= value <= allowed[name][0]
    ]


def _is_number(value: Scalar) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    """Equal for items that may share a batch. The frame rate scales the positions of all its items. Prompts are masked
    and guidance scales are a vector, so neither is part of it."""
    return limits.batch_key(request, f"fps={request.fps}")


def grid(request: Request, params: Params) -> tuple[int, int, int]:
    """Latent frames, rows and columns: a token each."""
    vae = params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_factor
    return frames, request.height // vae.spatial_factor, request.width // vae.spatial_factor


def tokens(request: Request, params: Params) -> int:
    """Tokens of one forward of the transformer."""
    return math.prod(grid(request, params))


def flops(request: Request, params: Params) -> float:
    """Operations of all transformer forwards of the item: 2 per multiply-add of matrix products and attention. Keys
    and values of the text are made once a prompt, not in a forward, and are not counted; prompts count as full."""
    t = params.transformer
    n, d = tokens(request, params), t.width
    # Four projections of self-attention, two of cross-attention (query, out), two of the feed-forward, 4 D wide.
    linear = n * d * (4 * d + 2 * d + 8 * d)
    attention = 2 * n * d * (n + params.max_tokens)
    times = 2 if request.task == "i2v" else 1  # the image's tokens are told another than the others
    time = times * d * (TIME_CHANNELS + d + 6 * d)
    ends = n * d * (t.in_channels + t.out_channels)
    forwards = request.num_inference_steps * limits.branches(request)
    return 2.0 * (t.num_layers * (linear + attention) + time + ends) * forwards


def weight_bytes(params: Params) -> int:
    """Bytes of transformer, VAE and text encoder in their published dtype, counted from the sizes alone."""
    counts = {
        "transformer": transformer_weights(params.transformer),
        "vae": vae_weights(params.vae),
        "text_encoder": t5_weights(params.text),
    }
    dtypes = dict(params.dtypes)
    return sum(count * DTYPE_BYTES[dtypes[name]] for name, count in counts.items())


def transformer_weights(t: TransformerParams) -> int:
    """Numbers in the transformer's weights."""
    d = t.width
    attention = 4 * (d * d + d) + 2 * d
    block = 2 * attention + (8 * d * d + 5 * d) + 6 * d
    time = _linear(TIME_CHANNELS, d) + _linear(d, d) + _linear(d, 6 * d)
    text = _linear(t.caption_channels, d) + _linear(d, d)
    return t.num_layers * block + time + text + _linear(t.in_channels, d) + _linear(d, t.out_channels) + 2 * d


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights, its latents' statistics included."""
    stages = v.down_stages()
    total = 2 * v.latent_channels + _conv(v.in_channels * v.patch_size**2, stages[0].inputs)
    for stage in stages:
        total += stage.resnets * _resnet(stage.inputs, stage.inputs)
        if v.factorised:
            total += _factorised(stage.inputs, stage.outputs, stage.downsample)
        else:
            total += _conv(stage.inputs, stage.inputs) if stage.downsample else 0
            total += _resnet(stage.inputs, stage.outputs) if stage.inputs != stage.outputs else 0
    last = stages[-1].outputs
    total += v.layers_per_block[-1] * _resnet(last, last) + _conv(last, v.latent_channels + 1)

    timed, width = v.timestep_conditioning, v.decoder_block_out_channels[-1]
    total += _conv(v.latent_channels, width)
    total += v.decoder_layers_per_block[-1] * _resnet(width, width, v.decoder_inject_noise[-1], timed)
    total += _time(4 * width) if timed else 0
    for up in v.up_stages():
        width = up.outputs
        total += _time(4 * width) if timed else 0
        total += _resnet(up.inputs, width, up.inject_noise, timed) if up.widens else 0
        total += _conv(up.factor * width, 8 * width) if up.upsample else 0
        total += up.resnets * _resnet(width, width, up.inject_noise, timed)
    total += _conv(width, v.out_channels * v.patch_size**2)
    return total + (1 + _time(2 * width) + 2 * width if timed else 0)


def _linear(a: int, b: int) -> int:
    return a * b + b


def _conv(a: int, b: int, kernel: int = 27) -> int:
    return a * b * kernel + b


def _time(width: int) -> int:
    return _linear(TIME_CHANNELS, width) + _linear(width, width)


def _factorised(a: int, b: int, kind: str | None) -> int:
    return _conv(a, b // math.prod(STRIDES[kind])) if kind else 0


def _resnet(a: int, b: int, noise: bool = False, timed: bool = False) -> int:
    shortcut = 2 * a + _conv(a, b, 1) if a != b else 0
    return _conv(a, b) + _conv(b, b) + shortcut + (2 * a if noise else 0) + (4 * a if timed else 0)


def heads(params: Params) -> int:
    """Attention heads of the transformer."""
    return params.transformer.num_attention_heads


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the closing one included."""
    return "tokenizer", params.max_tokens
