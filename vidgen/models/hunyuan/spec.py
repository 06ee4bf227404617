"""HunyuanVideo: tasks, limits, defaults and cost (the contract in `vidgen.family.Spec`). Standard library only.

Refuses to know what a tensor is, where a checkpoint lies, and how a plan is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vidgen.models.hunyuan.params import COMPONENTS as COMPONENTS
from vidgen.models.hunyuan.params import (
    CONCAT,
    IMAGE_TOKENS,
    PUBLISHED,
    REPLACE,
    TEXT_TOKENS,
    ClipParams,
    LlamaParams,
    TransformerParams,
    VAEParams,
)
from vidgen.models.hunyuan.params import PIPELINES as PIPELINES
from vidgen.models.hunyuan.params import Params as Params
from vidgen.models.hunyuan.params import read as read
from vidgen.specs import limits
from vidgen.specs.clip import ClipVisionParams, clip_layer_weights, clip_vision_weights
from vidgen.specs.config import DTYPE_BYTES
from vidgen.types import Request

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {"t2v": {}, "i2v": {"image": True}}
CHECKPOINT = True
PARAMS: Mapping[str, type] = {"true_cfg_scale": float, "image_embed_interleave": int}
SAMPLERS = ("euler",)

INTERLEAVE: Mapping[str, int] = {CONCAT: 2, REPLACE: 4}
"""Of so many image tokens of Llava the transformer sees one."""
DROPPED_FRAMES = 4
"""Frames that a checkpoint with `latent_concat` makes at the beginning and does not return."""
DEFAULT_TILES = (256, 256, 192, 192)
TIME_CHANNELS = 256
AFTER_PROMPT = {"t2v": 1, "i2v": 5}
"""Tokens of the template that follow the prompt."""


def defaults(task: str, params: Params) -> dict[str, Any]:
    """The recipe on the model card, or what the checkpoint's vidgen.json says; the shift as its scheduler has it. A
    checkpoint without embedded guidance has a scale of 1, which is none."""
    limits.check_task(task, TASKS, "hunyuan")
    limits.check_task(task, {params.task: TASKS[params.task]}, "this checkpoint of hunyuan")
    own: dict[str, Any] = {"sampler": "euler", "shift": params.scheduler.shift, "sigmas": None, "timesteps": None}
    if not params.transformer.guidance_embeds:
        own["guidance_scale"] = 1.0
    given = {"true_cfg_scale": 1.0, "image_embed_interleave": _interleave(params)}
    return {**PUBLISHED, **own, "params": given, **dict(params.recipe)}


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    tasks = {params.task: TASKS[params.task]}
    multiple = params.vae.spatial_compression_ratio * params.transformer.patch_size
    dropped = DROPPED_FRAMES if params.transformer.image_condition_type == CONCAT else 0
    frames = (1 + dropped, params.vae.temporal_compression_ratio)
    found = limits.request_problems(request, tasks, PARAMS)
    found += limits.size_problems(request, (multiple, multiple), frames)
    found += limits.schedule_problems(request, SAMPLERS, params.scheduler.num_train_timesteps)
    return (
        found + _param_problems(request, params) + limits.tile_problems(request, params.vae.spatial_compression_ratio)
    )


def _param_problems(request: Request, params: Params) -> list[str]:
    found = []
    scale, shown, expected = request.guidance_scale, request.param("image_embed_interleave"), _interleave(params)
    if scale > 1 and not params.transformer.guidance_embeds:
        found.append(
            f"guidance_scale is {scale}; this checkpoint has no embedded guidance, allowed: 1 (params.true_cfg_scale "
            "guides by a second forward)"
        )
    true_scale = request.param("true_cfg_scale")
    if isinstance(true_scale, (int, float)) and true_scale < 1:
        found.append(f"params.true_cfg_scale is {true_scale}; allowed: 1 (one forward a step) or more")
    if shown != expected:
        found.append(f"params.image_embed_interleave is {shown}; allowed: {expected}, as this checkpoint was trained")
    return found


def frames_out(request: Request) -> int:
    """Frames of the finished video: of a checkpoint with `latent_concat`, which is asked for by its interleave of
    image tokens, 4 fewer."""
    concat = request.param("image_embed_interleave") == INTERLEAVE[CONCAT]
    return request.num_frames - (DROPPED_FRAMES if concat else 0)


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
    """Tiles for this shape: `on` and `auto` those of diffusers wherever a picture is larger than one, as the published
    code has it (a whole level of 720 x 1280 has more numbers than 32 bits count); `off` none. In time the decoder
    always works in tiles, as diffusers has it."""
    limits.check_tiling_mode(mode)
    fits = request.height <= DEFAULT_TILES[0] and request.width <= DEFAULT_TILES[1]
    return None if mode == "off" or fits else DEFAULT_TILES


def branches(request: Request) -> int:
    """Forwards a step: guidance is embedded, and a second forward is made only at a `true_cfg_scale` above 1."""
    scale = request.param("true_cfg_scale")
    return 2 if isinstance(scale, (int, float)) and scale > 1 else 1


def batch_key(request: Request, params: Params) -> str:
    """Equal for items that may share a batch. Prompts of different lengths may: they attend one by one."""
    return limits.batch_key(request)


def tokens(request: Request, params: Params) -> int:
    """Video tokens of one forward of the transformer: latent frames x height x width over the patch."""
    edge = params.vae.spatial_compression_ratio * params.transformer.patch_size
    frames = 1 + (request.num_frames - 1) // params.vae.temporal_compression_ratio
    return frames * (request.height // edge) * (request.width // edge)


def text_tokens(prompt: str, task: str, interleave: int) -> int:
    """Text tokens of one forward, a word of the prompt counted as one: as near as it gets without a tokenizer, and of
    the 119 thousand tokens of the published size they are less than two in a thousand."""
    after = AFTER_PROMPT[task]
    own = min(len(prompt.split()), TEXT_TOKENS - after) + 1
    return own + (-(-IMAGE_TOKENS // interleave) if task == "i2v" else 0)


def flops(request: Request, params: Params) -> float:
    """Operations of all transformer forwards of the item: 2 per multiply-add of matrix products, convolutions and
    attention. What is made once a prompt (the projections of its tokens and of its pooled vectors) is not counted."""
    shown = text_tokens(request.prompt, request.task, _interleave(params) or 1)
    total = _forward(params.transformer, tokens(request, params), shown)
    if branches(request) > 1:
        # The unconditional branch sees a black image, always at the interleave of `latent_concat`.
        shown = text_tokens(request.negative_prompt, request.task, INTERLEAVE[CONCAT])
        total += _forward(params.transformer, tokens(request, params), shown)
    return 2.0 * total * request.num_inference_steps


def _forward(t: TransformerParams, n: int, text: int) -> float:
    """Multiply-adds of one forward over n video tokens and `text` text tokens."""
    d, both = t.width, n + text
    times = 2 if t.image_condition_type == REPLACE else 1
    attention = 2 * d * both**2
    dual = both * (4 * d * d + 2 * d * t.ffn_dim) + attention + (1 + times) * 6 * d * d
    single = both * (4 * d * d + 2 * d * t.ffn_dim) + attention + times * 3 * d * d
    refiner = text * (4 * d * d + 8 * d * d) + 2 * d * text**2 + 2 * d * d
    # Of the refiner, of the blocks, of embedded guidance.
    embeddings = (1 + times + int(t.guidance_embeds)) * (TIME_CHANNELS * d + d * d)
    ends = n * d * t.patch_size**2 * (t.in_channels + t.out_channels) + 2 * d * d
    layers = t.num_layers * dual + t.num_single_layers * single + t.num_refiner_layers * refiner
    return float(layers + embeddings + ends)


def weight_bytes(params: Params) -> int:
    """Bytes of every component with weights in its published dtype, counted from the sizes alone."""
    counts = {
        "transformer": transformer_weights(params.transformer),
        "vae": vae_weights(params.vae),
        "text_encoder": llama_weights(params.llama) + llava_weights(params.llama, params.vision),
        "text_encoder_2": clip_weights(params.clip),
    }
    dtypes = dict(params.dtypes)
    return sum(count * DTYPE_BYTES[dtypes[name]] for name, count in counts.items())


def transformer_weights(t: TransformerParams) -> int:
    """Numbers in the transformer's weights."""
    d, patch, inner = t.width, t.patch_size**2, t.ffn_dim

    def linear(a: int, b: int) -> int:
        return a * b + b

    def embed(inputs: int) -> int:
        return linear(inputs, d) + linear(d, d)

    norms = 2 * t.attention_head_dim
    stream = linear(d, 6 * d) + 4 * linear(d, d) + norms + linear(d, inner) + linear(inner, d)
    single = linear(d, 3 * d) + 3 * linear(d, d) + norms + linear(d, inner) + linear(d + inner, d)
    refiner = 2 * 2 * d + 4 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + linear(d, 2 * d)
    text = embed(TIME_CHANNELS) + embed(t.text_embed_dim) + linear(t.text_embed_dim, d)
    time = embed(TIME_CHANNELS) * (1 + int(t.guidance_embeds)) + embed(t.pooled_projection_dim)
    ends = linear(t.in_channels * patch, d) + linear(d, 2 * d) + linear(d, t.out_channels * patch)
    layers = t.num_layers * 2 * stream + t.num_single_layers * single + t.num_refiner_layers * refiner
    return layers + text + time + ends


def vae_weights(v: VAEParams) -> int:
    """Numbers in the autoencoder's weights."""

    def conv(a: int, b: int, kernel: int = 27) -> int:
        return a * b * kernel + b

    def residual(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    widths, latents, layers = v.block_out_channels, v.latent_channels, v.layers_per_block
    widest = widths[-1]
    middle = 2 * residual(widest, widest) + 2 * widest + 4 * conv(widest, widest, 1)
    resamples = [space or time for space, time in zip(v.spatial_levels, v.temporal_levels, strict=True)]
    encoder = conv(v.in_channels, widths[0]) + middle + 2 * widest + conv(widest, 2 * latents)
    for (a, b), resample in zip(pairwise((widths[0], *widths)), resamples, strict=True):
        encoder += residual(a, b) + (layers - 1) * residual(b, b) + (conv(b, b) if resample else 0)
    narrowing = widths[::-1]
    decoder = conv(latents, widest) + middle + 2 * widths[0] + conv(widths[0], v.out_channels)
    for (a, b), resample in zip(pairwise((widest, *narrowing)), resamples, strict=True):
        decoder += residual(a, b) + layers * residual(b, b) + (conv(b, b) if resample else 0)
    return encoder + decoder + conv(2 * latents, 2 * latents, 1) + conv(latents, latents, 1)


def llama_weights(t: LlamaParams) -> int:
    """Numbers in the weights of a Llama without its language head."""
    d, keys = t.hidden_size, t.num_key_value_heads * t.head_dim
    attention = 2 * d * t.num_attention_heads * t.head_dim + 2 * d * keys
    layer = attention + 3 * d * t.intermediate_size + 2 * d
    return t.vocab_size * d + t.num_hidden_layers * layer + d


def llava_weights(t: LlamaParams, vision: ClipVisionParams | None) -> int:
    """Numbers that a Llava has beside its Llama: language head, vision tower, projector."""
    if vision is None:
        return 0
    projector = vision.hidden_size * t.hidden_size + t.hidden_size + t.hidden_size**2 + t.hidden_size
    return t.vocab_size * t.hidden_size + clip_vision_weights(vision) + projector


def clip_weights(c: ClipParams) -> int:
    """Numbers in the weights of a CLIP text model."""
    d, layer = c.hidden_size, clip_layer_weights(c.hidden_size, c.intermediate_size)
    return (c.vocab_size + c.max_position_embeddings) * d + c.num_hidden_layers * layer + 2 * d


def heads(params: Params) -> int:
    """Attention heads of the transformer."""
    return params.transformer.num_attention_heads


def text_limit(params: Params) -> tuple[str, int]:
    """The tokenizer's component and the most tokens a prompt may have, the opening one that tokenizers put before it
    included: it stands for one of the template's that follow the prompt."""
    return "tokenizer", TEXT_TOKENS - AFTER_PROMPT[params.task] + 1


def _interleave(params: Params) -> int | None:
    return INTERLEAVE.get(params.transformer.image_condition_type or "")
