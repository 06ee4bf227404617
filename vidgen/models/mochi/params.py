"""What a Mochi 1 checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Refuses to know limits, cost and requests. An option that we do not honour is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.specs.config import check_classes, file_of, one_of, published, recipe, refuse, refuse_unknown, take
from vidgen.specs.config import require as require_components
from vidgen.specs.flow import FlowScheduler, flow_scheduler
from vidgen.specs.t5 import T5Params, t5_params

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES: Mapping[str, tuple[str, ...]] = {"MochiPipeline": ("t2v",)}
TEXT_TOKENS = 256
"""Most text tokens of the published pipeline. Shorter prompts are not padded: their padding is masked everywhere."""

PUBLISHED: Mapping[str, Any] = {
    "height": 480,
    "width": 848,
    "num_frames": 85,
    "fps": 30.0,
    "num_inference_steps": 64,
    "guidance_scale": 4.5,
    "negative_prompt": "",
}
"""The recipe of the published pipeline of genmo/mochi-1-preview, with the clip length and rate of its examples."""

POOL_HEADS = 8
"""Heads of the attention that pools the caption; no config file names them."""
NORM_GROUP = 32
"""The VAE's group norms have this many groups and its attention heads this many channels, in every checkpoint."""


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of MochiTransformer3DModel, named as in transformer/config.json. Width D = heads x head size; the text has
    a stream of its own of `pooled_projection_dim`."""

    patch_size: int
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    pooled_projection_dim: int
    in_channels: int
    out_channels: int
    text_embed_dim: int
    time_embed_dim: int

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        """Inner width of the feed-forward of the video."""
        return 4 * self.width * 2 // 3

    @property
    def text_ffn_dim(self) -> int:
        """Inner width of the feed-forward of the text."""
        return 4 * self.pooled_projection_dim * 2 // 3


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLMochi, named as in vae/config.json. Levels run from the pixels to the latents; of
    `layers_per_block` and `add_attention_block` the first and last are those at the two ends."""

    in_channels: int
    out_channels: int
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: tuple[int, ...]
    temporal_expansions: tuple[int, ...]
    spatial_expansions: tuple[int, ...]
    add_attention_block: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    scaling_factor: float

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for, after the first, which stands for one."""
        return math.prod(self.temporal_expansions)

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent stands for, along height and along width."""
        return math.prod(self.spatial_expansions)


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `zero_empty_prompt`: an empty prompt has no tokens at all. `recipe` is what its vidgen.json
    puts in place of the published defaults; `dtypes` holds the published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: FlowScheduler
    text: T5Params
    text_tokens: int
    zero_empty_prompt: bool
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not supported."""
    require_components(configs, ("transformer", "vae", "text_encoder", "scheduler"), "mochi")
    index, own = configs["model_index"], configs.get("vidgen", {})
    check_classes(
        index,
        {
            "transformer": ("MochiTransformer3DModel",),
            "vae": ("AutoencoderKLMochi",),
            "text_encoder": ("T5EncoderModel",),
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        },
    )
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        text=t5_params(configs["text_encoder"]),
        text_tokens=own.get("max_text_tokens", TEXT_TOKENS),
        zero_empty_prompt=bool(index.get("force_zeros_for_empty_prompt")),
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        dtypes=published(configs, ("transformer", "vae", "text_encoder")),
    )
    where, latents = file_of("transformer"), params.vae.latent_channels
    for name in ("in_channels", "out_channels"):
        channels = getattr(params.transformer, name)
        if channels != latents:
            raise CheckpointError(f"{where}: {name} is {channels}; the VAE's latent_channels are {latents}")
    if params.transformer.text_embed_dim != params.text.d_model:
        raise CheckpointError(
            f"{where}: text_embed_dim is {params.transformer.text_embed_dim}; "
            f"the text encoder's d_model is {params.text.d_model}"
        )
    return params


def transformer_params(config: Mapping[str, Any]) -> TransformerParams:
    """Sizes from transformer/config.json. `max_sequence_length` is passed over: the model has no position of text."""
    where = file_of("transformer")
    one_of(config, "qk_norm", ("rms_norm",), where)
    one_of(config, "activation_fn", ("swiglu",), where)
    refuse_unknown(config, {*TransformerParams.__slots__, "qk_norm", "activation_fn", "max_sequence_length"}, where)
    sizes = {name: take(config, name, where) for name in TransformerParams.__slots__ if name != "out_channels"}
    params = TransformerParams(out_channels=config.get("out_channels") or sizes["in_channels"], **sizes)
    for name, multiple in (("attention_head_dim", 2), ("time_embed_dim", 2), ("text_embed_dim", POOL_HEADS)):
        if getattr(params, name) % multiple:
            raise CheckpointError(f"{where}: {name} is {getattr(params, name)}; it must be a multiple of {multiple}")
    return params


def vae_params(config: Mapping[str, Any]) -> VAEParams:
    """Sizes from vae/config.json."""
    where = file_of("vae")
    one_of(config, "act_fn", ("silu", "swish"), where)
    refuse_unknown(config, {*VAEParams.__slots__, "act_fn"}, where)
    taken = {name: take(config, name, where) for name in VAEParams.__slots__}
    sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in taken.items()}
    params = VAEParams(**sizes)
    # A colour comes as itself and as sine and cosine of two frequencies.
    if params.in_channels != 5 * params.out_channels:
        raise CheckpointError(f"{where}: in_channels is {params.in_channels}; allowed: 5 x {params.out_channels}")
    levels = len(params.encoder_block_out_channels)
    lengths = {
        "decoder_block_out_channels": levels,
        "layers_per_block": levels + 1,
        "add_attention_block": levels + 1,
        "temporal_expansions": levels - 1,
        "spatial_expansions": levels - 1,
        "latents_mean": params.latent_channels,
        "latents_std": params.latent_channels,
    }
    for name, length in lengths.items():
        if len(getattr(params, name)) != length:
            raise CheckpointError(f"{where}: {name} has {len(getattr(params, name))} values; it needs {length}")
    for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
        if any(channels % NORM_GROUP for channels in getattr(params, name)):
            raise CheckpointError(
                f"{where}: {name} is {list(getattr(params, name))}; allowed: multiples of {NORM_GROUP}"
            )
    return params


def scheduler_params(config: Mapping[str, Any]) -> FlowScheduler:
    """The schedule of scheduler_config.json. Mochi's model counts from noise to picture, so its sigmas are inverted."""
    where = file_of("scheduler")
    one_of(config, "_class_name", ("FlowMatchEulerDiscreteScheduler",), where)
    one_of(config, "invert_sigmas", (True,), where)
    refuse(config, ("use_dynamic_shifting",), where, "a schedule")
    return flow_scheduler(config)
