"""What a Wan 2.1 checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Refuses to know limits, cost and requests. What an older file leaves out means what it meant when it was published; an
option that we do not honour is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.specs.config import check_classes, file_of, has_component, published, recipe, refuse, refuse_unknown, take
from vidgen.specs.config import require as require_components
from vidgen.specs.flow import FlowScheduler, flow_scheduler
from vidgen.specs.t5 import T5Params, t5_params

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_TOKENS = 512
"""Text tokens of every published Wan checkpoint; shorter prompts are padded with zeros up to it."""

NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
PUBLISHED: Mapping[str, Any] = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "fps": 16.0,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "negative_prompt": NEGATIVE_PROMPT,
}
"""The recipe on the model card of Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers."""


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of WanTransformer3DModel, named as in transformer/config.json. Width D = heads x head size."""

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

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLWan, named as in vae/config.json. `patch_size` 1 is no pixel unshuffle."""

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
    """A whole checkpoint. `recipe` is what its vidgen.json puts in place of the published defaults; `dtypes` holds the
    published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: FlowScheduler
    text: T5Params
    text_tokens: int
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not supported."""
    require_components(configs, ("transformer", "vae", "text_encoder", "scheduler"), "wan")
    _check_index(configs["model_index"])
    own = configs.get("vidgen", {})
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        text=t5_params(configs["text_encoder"]),
        text_tokens=own.get("max_text_tokens", TEXT_TOKENS),
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        dtypes=published(configs, ("transformer", "vae", "text_encoder")),
    )
    latents = params.vae.z_dim
    for name, channels in (
        ("in_channels", params.transformer.in_channels),
        ("out_channels", params.transformer.out_channels),
    ):
        if channels != latents:
            raise CheckpointError(
                f"transformer/config.json: {name} is {channels}; text-to-video needs the VAE's z_dim, {latents}"
            )
    if params.transformer.text_dim != params.text.d_model:
        raise CheckpointError(
            f"transformer/config.json: text_dim is {params.transformer.text_dim}; "
            f"the text encoder's d_model is {params.text.d_model}"
        )
    return params


def _check_index(index: Mapping[str, Any]) -> None:
    where = file_of("model_index")
    for name in ("expand_timesteps", "boundary_ratio"):
        if index.get(name):
            raise CheckpointError(f"{where}: {name} is {index[name]} (Wan 2.2), which is not supported")
    for name in ("transformer_2", "image_encoder", "image_processor"):
        if has_component(index, name):
            raise CheckpointError(f"{where}: component {name} is not supported; Wan 2.1 text-to-video has none")
    check_classes(index, {"transformer": ("WanTransformer3DModel",), "vae": ("AutoencoderKLWan",)})


def transformer_params(config: Mapping[str, Any]) -> TransformerParams:
    """Sizes from transformer/config.json."""
    where = file_of("transformer")
    refuse(config, ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"), where, "image conditioning")
    if config.get("qk_norm") != "rms_norm_across_heads":
        raise CheckpointError(f"{where}: qk_norm is {config.get('qk_norm')!r}; allowed: 'rms_norm_across_heads'")
    refuse_unknown(config, {*TransformerParams.__slots__, "qk_norm"}, where)
    sizes = {name: take(config, name, where) for name in TransformerParams.__slots__ if name != "out_channels"}
    patch = tuple(sizes.pop("patch_size"))
    params = TransformerParams(
        patch_size=(patch[0], patch[1], patch[2]),
        out_channels=config.get("out_channels") or sizes["in_channels"],
        **sizes,
    )
    for name in ("attention_head_dim", "freq_dim"):
        if getattr(params, name) % 2:
            raise CheckpointError(f"{where}: {name} is {getattr(params, name)}; it must be even")
    return params


def vae_params(config: Mapping[str, Any]) -> VAEParams:
    """Sizes from vae/config.json. `clip_output` changes nothing: frames are clamped to [-1, 1], as diffusers does."""
    where = file_of("vae")
    refuse(config, ("is_residual",), where, "the Wan 2.2 5B autoencoder")
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
    for name, factor in zip(factors, (params.spatial_factor, params.temporal_factor), strict=True):
        if config.get(name) not in (factor, None):
            raise CheckpointError(f"{where}: {name} is {config[name]}; the layers make it {factor}")
    return params


def scheduler_params(config: Mapping[str, Any]) -> FlowScheduler:
    """The schedule and solver of scheduler_config.json; Wan does not shift by the size of the clip."""
    refuse(config, ("use_dynamic_shifting", "invert_sigmas"), file_of("scheduler"), "a schedule")
    return flow_scheduler(config)
