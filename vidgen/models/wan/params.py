"""What a Wan checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Wan 2.1 text-to-video, image-to-video and first-and-last-frame; Wan 2.2 A14B, two experts of which one denoises above a
noise level and the other below it; Wan 2.2 TI2V-5B, which is told a timestep for each frame.

Refuses to know limits, cost and requests. What an older file leaves out means what it meant when it was published; an
option that we do not honour is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.models.wan.recipes import PUBLISHED
from vidgen.specs.clip import ClipVisionParams
from vidgen.specs.config import (
    check_classes,
    file_of,
    has_component,
    one_of,
    published,
    recipe,
    refuse,
    refuse_unknown,
    take,
)
from vidgen.specs.config import require as require_components
from vidgen.specs.flow import FlowScheduler, flow_scheduler
from vidgen.specs.t5 import T5Params, t5_params

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""What every Wan checkpoint has; some have `transformer_2`, some `image_encoder` and `image_processor`."""
TEXT_TOKENS = 512
"""Text tokens of every published Wan checkpoint; shorter prompts are padded with zeros up to it."""


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of WanTransformer3DModel, named as in transformer/config.json. Width D = heads x head size. `image_dim` and
    `added_kv_proj_dim` belong to cross-attention to image tokens, `pos_embed_seq_len` counts those of first and last
    frame together; None where there is none."""

    patch_size: tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool
    eps: float
    rope_max_seq_len: int
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLWan, named as in vae/config.json. `patch_size` 1 is no pixel unshuffle; `is_residual` is
    the autoencoder of Wan 2.2 5B, with shortcuts around its levels."""

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    attn_scales: tuple[float, ...]
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    in_channels: int
    out_channels: int
    patch_size: int
    is_residual: bool = False

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for, after the first, which stands for one."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent stands for, along height and along width."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `boundary_ratio`, where there are two experts, is the noise level (timestep over training
    timesteps) below which `transformer_2` takes over; both have the sizes of `transformer`. `expand_timesteps`: an
    image is a clean first latent frame. `recipe` is what its vidgen.json puts in place of the published defaults;
    `dtypes` holds the published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: FlowScheduler
    text: T5Params
    image: ClipVisionParams | None
    boundary_ratio: float | None
    expand_timesteps: bool
    text_tokens: int
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """Components that are transformers, the one for high noise first."""
        return ("transformer",) if self.boundary_ratio is None else ("transformer", "transformer_2")

    @property
    def concatenates(self) -> bool:
        """Whether mask and encoded images are further input channels of the transformer."""
        return self.transformer.in_channels != self.vae.z_dim

    @property
    def images(self) -> int:
        """Images that cross-attention looks at: none, the first frame, or the first and the last."""
        if self.image is None:
            return 0
        return 1 if self.transformer.pos_embed_seq_len is None else 2


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, what model_index lists of transformer_2 and image_encoder, and optionally vidgen. CheckpointError names
    what is missing, contradictory or not supported."""
    require_components(configs, ("transformer", "vae", "text_encoder", "scheduler"), "wan")
    index, own = configs["model_index"], configs.get("vidgen", {})
    classes = ("WanTransformer3DModel",)
    check_classes(index, {"transformer": classes, "transformer_2": classes, "vae": ("AutoencoderKLWan",)})
    extra = [name for name in ("transformer_2", "image_encoder") if has_component(index, name)]
    require_components(configs, extra, "this checkpoint of wan")
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        text=t5_params(configs["text_encoder"]),
        image=image_encoder_params(configs["image_encoder"]) if "image_encoder" in extra else None,
        boundary_ratio=index.get("boundary_ratio"),
        expand_timesteps=bool(index.get("expand_timesteps")),
        text_tokens=own.get("max_text_tokens", TEXT_TOKENS),
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        dtypes=published(configs, ("transformer", "vae", "text_encoder", *extra)),
    )
    _check_experts(params, configs.get("transformer_2") if "transformer_2" in extra else None)
    _check_channels(params)
    _check_image_tokens(params, has_component(index, "image_processor"))
    return params


def _check_experts(params: Params, second: Mapping[str, Any] | None) -> None:
    """Two transformers of equal sizes and the boundary between them, or neither; not with frames of their own times."""
    where, boundary = file_of("model_index"), params.boundary_ratio
    if (second is None) != (boundary is None):
        has = "none" if second is None else "one"
        raise CheckpointError(
            f"{where}: boundary_ratio is {boundary} and transformer_2 is {has}; allowed: both or none"
        )
    if second is None or boundary is None:
        return
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise CheckpointError(f"{where}: boundary_ratio is {boundary!r}; allowed: between 0 and 1")
    if params.expand_timesteps:
        raise CheckpointError(f"{where}: expand_timesteps with boundary_ratio {boundary} is not supported")
    other = transformer_params(second, file_of("transformer_2"))
    for name in TransformerParams.__slots__:
        ours, theirs = getattr(params.transformer, name), getattr(other, name)
        if ours != theirs:
            raise CheckpointError(f"{file_of('transformer_2')}: {name} is {theirs}; that of transformer is {ours}")


def _check_channels(params: Params) -> None:
    """What goes into and comes out of the transformer fits the VAE and the text encoder."""
    t, latents, where = params.transformer, params.vae.z_dim, file_of("transformer")
    # A mask for each frame that a latent frame stands for, and the encoded images.
    conditioned = 2 * latents + params.vae.temporal_factor
    allowed = {latents: "the VAE's z_dim"} | ({} if params.expand_timesteps else {conditioned: "with mask and images"})
    if t.in_channels not in allowed:
        shown = ", ".join(f"{channels} ({what})" for channels, what in allowed.items())
        raise CheckpointError(f"{where}: in_channels is {t.in_channels}; allowed: {shown}")
    if t.out_channels != latents:
        raise CheckpointError(f"{where}: out_channels is {t.out_channels}; the VAE's z_dim is {latents}")
    if params.expand_timesteps and t.patch_size[0] != 1:
        raise CheckpointError(
            f"{where}: patch_size is {list(t.patch_size)}; expand_timesteps needs 1 in time, for each latent frame has "
            "its own timestep"
        )
    if t.text_dim != params.text.d_model:
        raise CheckpointError(f"{where}: text_dim is {t.text_dim}; the text encoder's d_model is {params.text.d_model}")


def _check_image_tokens(params: Params, processor: bool) -> None:
    """An image encoder where cross-attention looks at its tokens, and only there."""
    t, image, where = params.transformer, params.image, file_of("transformer")
    if t.image_dim is None:
        if image is not None or processor:
            raise CheckpointError(
                f"{file_of('model_index')}: component {'image_encoder' if image else 'image_processor'} is listed, and "
                f"{where} has no image_dim; it would not be looked at"
            )
        return
    if not params.concatenates or params.boundary_ratio is not None:
        raise CheckpointError(f"{where}: image_dim is {t.image_dim}; only Wan 2.1 image-to-video has it")
    if image is None or not processor:
        raise CheckpointError(
            f"{file_of('model_index')}: component {'image_processor' if image else 'image_encoder'} is missing; "
            f"image_dim in {where} is {t.image_dim}"
        )
    if image.hidden_size != t.image_dim:
        raise CheckpointError(
            f"{where}: image_dim is {t.image_dim}; hidden_size of image_encoder is {image.hidden_size}"
        )
    if t.pos_embed_seq_len not in (None, 2 * image.tokens):
        raise CheckpointError(
            f"{where}: pos_embed_seq_len is {t.pos_embed_seq_len}; two images have {2 * image.tokens} tokens"
        )


def transformer_params(config: Mapping[str, Any], where: str = file_of("transformer")) -> TransformerParams:
    """Sizes from the config.json of transformer or transformer_2."""
    one_of(config, "qk_norm", ("rms_norm_across_heads",), where)
    refuse_unknown(config, {*TransformerParams.__slots__, "qk_norm"}, where)
    optional = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
    own = ("patch_size", "out_channels", *optional)
    patch = tuple(take(config, "patch_size", where))
    sizes: dict[str, Any] = {name: take(config, name, where) for name in TransformerParams.__slots__ if name not in own}
    params = TransformerParams(
        patch_size=(patch[0], patch[1], patch[2]),
        out_channels=config.get("out_channels") or sizes["in_channels"],
        **sizes | {name: config.get(name) for name in optional},
    )
    for name in ("attention_head_dim", "freq_dim"):
        if getattr(params, name) % 2:
            raise CheckpointError(f"{where}: {name} is {getattr(params, name)}; it must be even")
    needed = None if params.image_dim is None else params.width
    if params.added_kv_proj_dim != needed:
        raise CheckpointError(
            f"{where}: added_kv_proj_dim is {params.added_kv_proj_dim}; with image_dim {params.image_dim} it must be "
            f"{needed}"
        )
    if params.pos_embed_seq_len is not None and params.image_dim is None:
        raise CheckpointError(
            f"{where}: pos_embed_seq_len is {params.pos_embed_seq_len}; without image_dim it has no use"
        )
    return params


def image_encoder_params(config: Mapping[str, Any]) -> ClipVisionParams:
    """Sizes from image_encoder/config.json."""
    where = file_of("image_encoder")
    one_of(config, "model_type", ("clip_vision_model",), where)
    sizes = {name: take(config, name, where) for name in ClipVisionParams.__slots__ if name != "num_channels"}
    return ClipVisionParams(**sizes, num_channels=config.get("num_channels", 3))


def vae_params(config: Mapping[str, Any]) -> VAEParams:
    """Sizes from vae/config.json. `clip_output` changes nothing: frames are clamped to [-1, 1], as diffusers does."""
    where = file_of("vae")
    factors = ("scale_factor_spatial", "scale_factor_temporal")
    refuse_unknown(config, {*VAEParams.__slots__, *factors, "clip_output", "dropout"}, where)
    params = VAEParams(
        base_dim=take(config, "base_dim", where),
        decoder_base_dim=config.get("decoder_base_dim") or take(config, "base_dim", where),
        z_dim=take(config, "z_dim", where),
        dim_mult=tuple(take(config, "dim_mult", where)),
        num_res_blocks=take(config, "num_res_blocks", where),
        attn_scales=tuple(take(config, "attn_scales", where)),
        temperal_downsample=tuple(take(config, "temperal_downsample", where)),
        latents_mean=tuple(take(config, "latents_mean", where)),
        latents_std=tuple(take(config, "latents_std", where)),
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        patch_size=config.get("patch_size") or 1,
        is_residual=bool(config.get("is_residual")),
    )
    resamples = len(params.dim_mult) - 1
    if len(params.temperal_downsample) != resamples:
        raise CheckpointError(
            f"{where}: temperal_downsample is {list(params.temperal_downsample)}; "
            f"dim_mult {list(params.dim_mult)} needs {resamples} entries"
        )
    for name in ("latents_mean", "latents_std"):
        if len(getattr(params, name)) != params.z_dim:
            raise CheckpointError(f"{where}: {name} has {len(getattr(params, name))} values; z_dim is {params.z_dim}")
    if params.is_residual:
        _check_shortcuts(params, where)
    for name, factor in zip(factors, (params.spatial_factor, params.temporal_factor), strict=True):
        if config.get(name) not in (factor, None):
            raise CheckpointError(f"{where}: {name} is {config[name]}; the layers make it {factor}")
    return params


def _check_shortcuts(params: VAEParams, where: str) -> None:
    """A shortcut around a level groups or repeats channels: their numbers must divide."""
    if params.attn_scales:
        raise CheckpointError(f"{where}: attn_scales is {list(params.attn_scales)}; is_residual has none")
    down = [params.base_dim * mult for mult in (1, *params.dim_mult)]
    up = [params.decoder_base_dim * mult for mult in (params.dim_mult[-1], *reversed(params.dim_mult))]
    times = [2 if temporal else 1 for temporal in params.temperal_downsample]
    fits = [a * 4 * time % b == 0 for a, b, time in zip(down, down[1:], times, strict=False)]
    fits += [down[-2] % down[-1] == 0]
    fits += [b * 4 * time % a == 0 for a, b, time in zip(up, up[1:], reversed(times), strict=False)]
    if not all(fits):
        raise CheckpointError(
            f"{where}: dim_mult is {list(params.dim_mult)}; is_residual needs each level's channels to divide those of "
            "the level before times the pixels they stand for"
        )


def scheduler_params(config: Mapping[str, Any]) -> FlowScheduler:
    """The schedule and solver of scheduler_config.json; Wan does not shift by the size of the clip."""
    refuse(config, ("use_dynamic_shifting", "invert_sigmas"), file_of("scheduler"), "a schedule")
    return flow_scheduler(config)
