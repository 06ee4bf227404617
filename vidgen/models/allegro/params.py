"""What an Allegro checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Refuses to know limits, cost and requests. An option that we do not honour is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.specs.config import (
    check_classes,
    file_of,
    one_of,
    published,
    recipe,
    refuse,
    refuse_unknown,
    require,
    take,
)
from vidgen.specs.t5 import T5Params, t5_params

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_TOKENS = 512
"""Text tokens of every published Allegro checkpoint; attention is masked beyond a prompt's own."""
SAMPLERS = {"EulerAncestralDiscreteScheduler": "euler_ancestral", "EulerDiscreteScheduler": "euler"}
TILE_FRAMES, FRAME_OVERLAP, ROW_OVERLAP, COLUMN_OVERLAP = 24, 8, 120, 80
"""The tiles on which the autoencoder was trained, in frames and pixels; their height and width is its sample_size.
AutoencoderKLAllegro has these numbers in its code, the files of the first release had them in vae/config.json."""

PUBLISHED: Mapping[str, Any] = {
    "height": 720,
    "width": 1280,
    "num_frames": 88,
    "fps": 15.0,
    "num_inference_steps": 100,
    "guidance_scale": 7.5,
    "negative_prompt": "",
}
"""The recipe on the model card of rhymes-ai/Allegro. The sizes are each checkpoint's own."""


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of AllegroTransformer3DModel, named as in transformer/config.json. Width D = heads x head size, of which a
    third each encodes frame, row and column; positions are divided by the interpolation scales. `sample_*` are the
    latent sizes it was trained on."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    num_layers: int
    caption_channels: int
    patch_size: int
    sample_frames: int
    sample_height: int
    sample_width: int
    norm_eps: float
    interpolation_scale_t: float
    interpolation_scale_h: float
    interpolation_scale_w: float

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLAllegro, named as in vae/config.json."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    temporal_downsample_blocks: tuple[bool, ...]
    temporal_upsample_blocks: tuple[bool, ...]
    layers_per_block: int
    norm_num_groups: int
    sample_size: int
    scaling_factor: float
    force_upcast: bool

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for."""
        return 2 ** sum(self.temporal_downsample_blocks)

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent stands for, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def tile(self) -> tuple[int, int, int]:
        """Frames, height and width of what is decoded at a time."""
        return TILE_FRAMES, self.sample_size, self.sample_size

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames and pixels from one tile to the next."""
        return TILE_FRAMES - FRAME_OVERLAP, self.sample_size - ROW_OVERLAP, self.sample_size - COLUMN_OVERLAP

    @property
    def tiling(self) -> tuple[int, int, int, int]:
        """The only tiles there are, as a request names them."""
        return *self.tile[1:], *self.stride[1:]


@dataclass(frozen=True, slots=True)
class SchedulerParams:
    """A diffusion schedule and its sampler, named as in scheduler_config.json."""

    sampler: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    rescale_betas_zero_snr: bool


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `recipe` is what its vidgen.json puts in place of the published defaults; `dtypes` holds the
    published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: SchedulerParams
    text: T5Params
    text_tokens: int
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not supported."""
    require(configs, [name for name in COMPONENTS if name != "tokenizer"], "allegro")
    own = configs.get("vidgen", {})
    check_classes(
        configs["model_index"],
        {
            "transformer": ("AllegroTransformer3DModel",),
            "vae": ("AutoencoderKLAllegro",),
            "text_encoder": ("T5EncoderModel",),
            "scheduler": tuple(SAMPLERS),
        },
    )
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        text=t5_params(configs["text_encoder"]),
        text_tokens=own.get("max_text_tokens", TEXT_TOKENS),
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        # The transformer is published in bf16, which its config.json does not say; the autoencoder in fp32.
        dtypes=published(configs, ("transformer",), "bfloat16") + published(configs, ("vae", "text_encoder")),
    )
    wanted = {
        "in_channels": (params.transformer.in_channels, params.vae.latent_channels, "the VAE's latent_channels"),
        "out_channels": (params.transformer.out_channels, params.vae.latent_channels, "the VAE's latent_channels"),
        "caption_channels": (params.transformer.caption_channels, params.text.d_model, "the text encoder's d_model"),
    }
    for key, (found, expected, whose) in wanted.items():
        if found != expected:
            raise CheckpointError(f"{file_of('transformer')}: {key} is {found}; {whose} is {expected}")
    return params


def transformer_params(config: Mapping[str, Any]) -> TransformerParams:
    """Sizes from transformer/config.json. `sample_size` and `sample_size_t`, which some files have too, say the same as
    `sample_height`, `sample_width` and `sample_frames`, and nothing reads them."""
    where = file_of("transformer")
    fixed: dict[str, Any] = {
        "patch_size_t": 1,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_type": "ada_norm_single",
    }
    for name, value in fixed.items():
        one_of(config, name, (value,), where, default=value)
    unread = ("dropout", "cross_attention_dim", "sample_size", "sample_size_t")
    refuse_unknown(config, {*TransformerParams.__slots__, *fixed, *unread}, where)
    params = TransformerParams(**{name: take(config, name, where) for name in TransformerParams.__slots__})
    if params.attention_head_dim % 6:
        raise CheckpointError(
            f"{where}: attention_head_dim is {params.attention_head_dim}; allowed: multiples of 6, for a third of a "
            "head each encodes frame, row and column, in pairs"
        )
    one_of(config, "cross_attention_dim", (params.width,), where)
    return params


def vae_params(config: Mapping[str, Any]) -> VAEParams:
    """Sizes from vae/config.json."""
    where = file_of("vae")
    fixed: dict[str, Any] = {
        "act_fn": "silu",
        "chunk_len": TILE_FRAMES,
        "t_over": FRAME_OVERLAP,
        "tile_overlap": [ROW_OVERLAP, COLUMN_OVERLAP],
    }
    for name, value in fixed.items():
        one_of(config, name, (value,), where, default=value)
    blocks = {"down_block_types": "AllegroDownBlock3D", "up_block_types": "AllegroUpBlock3D"}
    refuse_unknown(config, {*VAEParams.__slots__, *fixed, *blocks, "temporal_compression_ratio"}, where)
    listed = ("block_out_channels", "temporal_downsample_blocks", "temporal_upsample_blocks")
    read = {name: take(config, name, where) for name in VAEParams.__slots__ if name != "force_upcast"}
    read |= {name: tuple(read[name]) for name in listed}
    params = VAEParams(**read, force_upcast=bool(config.get("force_upcast", True)))
    levels = len(params.block_out_channels)
    for name, kind in blocks.items():
        if list(config.get(name, [kind] * levels)) != [kind] * levels:
            raise CheckpointError(f"{where}: {name} is {config[name]}; allowed: {levels} times {kind}")
    for name in listed[1:]:
        if len(getattr(params, name)) != levels:
            raise CheckpointError(f"{where}: {name} is {list(getattr(params, name))}; allowed: {levels} entries")
    if sum(params.temporal_upsample_blocks) != sum(params.temporal_downsample_blocks):
        raise CheckpointError(
            f"{where}: temporal_upsample_blocks is {list(params.temporal_upsample_blocks)}; allowed: as many true ones "
            f"as in temporal_downsample_blocks, {list(params.temporal_downsample_blocks)}"
        )
    one_of(config, "temporal_compression_ratio", (params.temporal_factor,), where, default=params.temporal_factor)
    for channels in params.block_out_channels:
        if channels % params.norm_num_groups:
            raise CheckpointError(
                f"{where}: block_out_channels is {list(params.block_out_channels)}; allowed: multiples of "
                f"norm_num_groups, {params.norm_num_groups}"
            )
    _check_tiles(params, where)
    return params


def _check_tiles(params: VAEParams, where: str) -> None:
    """Tiles begin and end between latents."""
    time, space = params.temporal_factor, params.spatial_factor
    if any(size % time for size in (TILE_FRAMES, FRAME_OVERLAP)):
        raise CheckpointError(
            f"{where}: temporal_downsample_blocks is {list(params.temporal_downsample_blocks)}, {time} frames a latent "
            f"frame; tiles are {TILE_FRAMES} frames that overlap by {FRAME_OVERLAP}, which it must divide"
        )
    if params.sample_size <= ROW_OVERLAP or any(size % space for size in (*params.tile[1:], *params.stride[1:])):
        raise CheckpointError(
            f"{where}: sample_size is {params.sample_size}; tiles of that size overlap by {ROW_OVERLAP} rows and "
            f"{COLUMN_OVERLAP} columns, allowed: more than {ROW_OVERLAP}, and all of them multiples of {space}"
        )


def scheduler_params(config: Mapping[str, Any]) -> SchedulerParams:
    """The schedule of scheduler_config.json. What other schedulers have left in the file is passed over, as diffusers
    does; an option of its own that we do not sample with is refused."""
    where = file_of("scheduler")
    name = one_of(config, "_class_name", tuple(SAMPLERS), where)
    refuse(config, ("trained_betas",), where, "a schedule")
    if SAMPLERS[name] == "euler":
        refuse(config, ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), where, "a schedule")
        for key, value in {"interpolation_type": "linear", "timestep_type": "discrete"}.items():
            one_of(config, key, (value,), where, default=value)
        one_of(config, "final_sigmas_type", ("zero",), where, default="zero")
    return SchedulerParams(
        sampler=SAMPLERS[name],
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        beta_schedule=one_of(
            config, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"), where, default="linear"
        ),
        prediction_type=one_of(config, "prediction_type", ("epsilon", "v_prediction"), where, default="epsilon"),
        timestep_spacing=one_of(
            config, "timestep_spacing", ("linspace", "leading", "trailing"), where, default="linspace"
        ),
        steps_offset=config.get("steps_offset", 0),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
