"""Allegro: tasks, limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

Its autoencoder works by tiles of frames, rows and columns alone, and a place that they do not cover stays grey: the
shapes are those that tiles cover exactly. Refuses to know what a tensor is, where a checkpoint lies, and how a plan is
stored.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

from vidgen.errors import ConfigError
from vidgen.models.allegro.params import COMPONENTS as COMPONENTS
from vidgen.models.allegro.params import PUBLISHED, TransformerParams, VAEParams
from vidgen.models.allegro.params import Params as Params
from vidgen.models.allegro.params import read as read
from vidgen.specs.config import DTYPE_BYTES
from vidgen.specs.limits import batch_key as shared_batch_key
from vidgen.specs.limits import branches, check_task, check_tiling_mode, request_problems, schedule_problems
from vidgen.specs.t5 import t5_weights
from vidgen.types import Request

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {"t2v": {}}
CHECKPOINT = True
PIPELINES: Mapping[str, tuple[str, ...]] = {"AllegroPipeline": ("t2v",)}
PARAMS: Mapping[str, type] = {"clean_caption": bool}
SAMPLERS = ("euler_ancestral", "euler")
TIME_CHANNELS = 256
"""Sinusoids of a timestep."""


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The recipe on the model card at the size that the transformer was trained on, or what the checkpoint's
    vidgen.json says; the sampler is its scheduler's."""
    check_task(task, TASKS, "allegro")
    t, v = params.transformer, params.vae
    trained = {
        "height": t.sample_height * v.spatial_factor,
        "width": t.sample_width * v.spatial_factor,
        "num_frames": t.sample_frames * v.temporal_factor,
    }
    own = {"sampler": params.scheduler.sampler, "shift": None, "sigmas": None, "timesteps": None}
    return {**PUBLISHED, **trained, **own, "params": {"clean_caption": True}, **dict(params.recipe)}


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    found = request_problems(request, TASKS, PARAMS) + _size_problems(request, params)
    train = params.scheduler.num_train_timesteps
    found += schedule_problems(request, SAMPLERS, train, explicit=("timesteps",))
    if request.shift is not None:
        found.append(f"shift is {request.shift}; Allegro's schedule has none, allowed: null")
    if request.timesteps and train - 1 < request.timesteps[0] <= train:
        found.append(f"timesteps is {list(request.timesteps)}; allowed: at most {train - 1}")
    if request.tiling not in (None, params.vae.tiling):
        found.append(f"tiling is {request.tiling}; {_why(params.vae)}, allowed: {params.vae.tiling}")
    if request.param("clean_caption") is True and importlib.util.find_spec("bs4") is None:
        found.append(
            "params.clean_caption is True; it needs beautifulsoup4: pip install 'vidgen[allegro]', or allowed: false"
        )
    return found


def _size_problems(request: Request, params: Params) -> list[str]:
    v, patch = params.vae, params.transformer.patch_size
    steps = (v.temporal_factor, v.spatial_factor * patch, v.spatial_factor * patch)
    found = []
    for name, tile, stride, step in zip(("num_frames", "height", "width"), v.tile, v.stride, steps, strict=True):
        size = getattr(request, name)
        if not covered(size, tile, stride) or size % step:
            allowed = [n for n in range(tile, tile + 10 * stride, stride) if n % step == 0][:4]
            shown = ", ".join(map(str, allowed))
            found.append(
                f"{name} is {size}; allowed: {shown}, ... ({tile} + k x {stride}, multiples of {step}), because "
                f"{_why(v)} and what they do not cover stays grey"
            )
    return found


def covered(size: int, tile: int, stride: int) -> bool:
    """Whether whole tiles, one every `stride`, cover so many frames or pixels and end where they end."""
    return size >= tile and (size - tile) % stride == 0


def _why(v: VAEParams) -> str:
    shown = " x ".join(map(str, v.tile))
    return f"the autoencoder works by tiles of {shown} (frames x height x width) every {' x '.join(map(str, v.stride))}"


def frames_out(request: Request) -> int:
    """Frames of the finished video."""
    return request.num_frames


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int]:
    """The autoencoder's own tiles: it has no other way. ConfigError for `off`."""
    check_tiling_mode(mode)
    if mode == "off":
        raise ConfigError(f"engine.vae_tiling: 'off' is not possible, {_why(params.vae)} alone; allowed: auto, on")
    return params.vae.tiling


def batch_key(request: Request, params: Params) -> str:
    """Equal for items that may share a batch. Prompts are masked, so their length is not part of it."""
    return shared_batch_key(request)


def grid(request: Request, params: Params) -> tuple[int, int, int]:
    """Latent frames, rows and columns."""
    v = params.vae
    return (
        request.num_frames // v.temporal_factor,
        request.height // v.spatial_factor,
        request.width // v.spatial_factor,
    )


def tokens(request: Request, params: Params) -> int:
    """Tokens of one forward of the transformer: latents over the patch, which is one latent frame deep."""
    return prod(grid(request, params)) // params.transformer.patch_size**2


def flops(request: Request, params: Params) -> float:
    """Operations of all transformer forwards of the item: 2 per multiply-add of matrix products and attention.

    Keys and values of the text are made once a prompt and not counted. Nor is looking at them: a prompt's length is no
    matter of the shape, and all of its 512 tokens would be half a percent of the published size."""
    t = params.transformer
    n, d = tokens(request, params), t.width
    # Four projections of self-attention, two of cross-attention (query, out), two of the feed-forward, 4 D wide.
    linear = n * d * (4 * d + 2 * d + 8 * d)
    attention = 2 * n * d * n
    time = d * (TIME_CHANNELS + d + 6 * d)
    ends = n * d * t.patch_size**2 * (t.in_channels + t.out_channels)
    return 2.0 * (t.num_layers * (linear + attention) + time + ends) * request.num_inference_steps * branches(request)


def weight_bytes(params: Params) -> int:
    """Bytes of every component with weights in its published dtype, counted from the sizes alone."""
    counts = {
        "transformer": transformer_weights(params.transformer),
        "vae": vae_weights(params.vae),
        "text_encoder": t5_weights(params.text),
    }
    dtypes = dict(params.dtypes)
    return sum(count * DTYPE_BYTES[dtypes[name]] for name, count in counts.items())


def transformer_weights(t: TransformerParams) -> int:
    """Numbers in the transformer's weights."""
    d, patch = t.width, t.patch_size**2
    block = 8 * _map(d, d) + _map(d, 4 * d) + _map(4 * d, d) + 6 * d
    time = _map(TIME_CHANNELS, d) + _map(d, d) + _map(d, 6 * d)
    text = _map(t.caption_channels, d) + _map(d, d)
    ends = _map(t.in_channels * patch, d) + _map(d, patch * t.out_channels) + 2 * d
    return t.num_layers * block + time + text + ends


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights."""
    widths, count = v.block_out_channels, v.layers_per_block
    first, last = widths[0], widths[-1]
    levels = len(widths)
    total = _map(v.in_channels, first, 9) + _map(first, first, 3)
    for level, (a, b) in enumerate(pairwise((first, *widths))):
        total += _resnet(a, b) + (count - 1) * _resnet(b, b) + count * _over_time(b, 3, b, 3)
        total += _over_time(b, 18, b, 27) if v.temporal_downsample_blocks[level] else 0
        total += _map(b, b, 9) if level < levels - 1 else 0
    total += _middle(last) + 2 * last + _map(last, last, 3) + _map(last, 2 * v.latent_channels, 9)

    total += _map(v.latent_channels, last, 9) + _map(last, last, 3) + _middle(last)
    for level, (a, b) in enumerate(pairwise((last, *reversed(widths)))):
        total += _resnet(a, b) + count * _resnet(b, b) + (count + 1) * _over_time(b, 3, b, 3)
        total += _over_time(b, 9, 2 * b, 27) if v.temporal_upsample_blocks[level] else 0
        total += _map(b, b, 9) if level < levels - 1 else 0
    total += 2 * first + _map(first, first, 3) + _map(first, v.out_channels, 9)
    return total + _map(2 * v.latent_channels, 2 * v.latent_channels) + _map(v.latent_channels, v.latent_channels)


def _map(a: int, b: int, kernel: int = 1) -> int:
    """A linear layer or a convolution."""
    return a * b * kernel + b


def _resnet(a: int, b: int) -> int:
    return 2 * a + _map(a, b, 9) + 2 * b + _map(b, b, 9) + (_map(a, b) if a != b else 0)


def _over_time(a: int, kernel: int, b: int, others: int) -> int:
    """A temporal layer: a first convolution to b channels, three more, and a norm before each."""
    return 2 * a + _map(a, b, kernel) + 3 * (2 * a + _map(a, a, others))


def _middle(a: int) -> int:
    return 2 * _resnet(a, a) + 2 * _over_time(a, 3, a, 3) + 2 * a + 4 * _map(a, a)


def heads(params: Params) -> int:
    """Attention heads of the transformer."""
    return params.transformer.num_attention_heads


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the closing one included."""
    return "tokenizer", params.text_tokens
