"""What an LTX-Video checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Refuses to know limits, cost and requests. What an older file leaves out means what it meant when it was published; an
option that we do not honour is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.specs.config import (
    check_classes,
    file_of,
    has_component,
    one_of,
    published,
    recipe,
    refuse_unknown,
    require,
    take,
)
from vidgen.specs.flow import FlowScheduler, flow_scheduler
from vidgen.specs.t5 import T5Params, t5_params

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
CONDITION = "LTXConditionPipeline"
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "LTXPipeline": ("t2v",),
    "LTXImageToVideoPipeline": ("i2v",),
    CONDITION: ("t2v", "i2v"),
}
"""What each pipeline of diffusers does. Checkpoints of the first two do both tasks."""
TEXT_TOKENS = {"LTXPipeline": 128, "LTXImageToVideoPipeline": 128, CONDITION: 256}
"""Text tokens of a prompt: `max_sequence_length` of each pipeline's call."""

PUBLISHED: Mapping[str, Any] = {
    "height": 512,
    "width": 704,
    "num_frames": 161,
    "fps": 24.0,
    "num_inference_steps": 50,
    "guidance_scale": 3.0,
    "negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
}
"""The defaults of the pipelines' calls, and the negative prompt of the model card of Lightricks/LTX-Video."""

TIME_CHANNELS = 256
"""Sinusoids of a timestep, in the transformer and in the autoencoder."""
STRIDES = {"conv": (2, 2, 2), "spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}
"""Frames, rows and columns that each kind of downsampling makes one."""
PLAIN_BLOCK, FACTORISED_BLOCK = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of LTXVideoTransformer3DModel, named as in transformer/config.json. Width D = heads x head size."""

    in_channels: int
    out_channels: int
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    norm_eps: float
    caption_channels: int

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class DownStage:
    """One encoder block: `resnets` at `inputs` channels, then `downsample` (a key of STRIDES) or none, to `outputs`."""

    inputs: int
    outputs: int
    resnets: int
    downsample: str | None


@dataclass(frozen=True, slots=True)
class UpStage:
    """One decoder block: to `outputs` channels (by a residual block where `inputs` differ), twice the frames, rows and
    columns if `upsample`, then `resnets`. The upsampler takes `factor` times the channels that it hands on."""

    inputs: int
    outputs: int
    resnets: int
    upsample: bool
    inject_noise: bool
    residual: bool
    factor: int

    @property
    def widens(self) -> bool:
        return self.inputs // self.factor != self.outputs


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLLTXVideo, named as in vae/config.json; tuples of the decoder are in the order of the file,
    which is the encoder's. `downsample_type` is null where a block does not downsample."""

    in_channels: int
    out_channels: int
    latent_channels: int
    patch_size: int
    resnet_norm_eps: float
    encoder_causal: bool
    decoder_causal: bool
    timestep_conditioning: bool
    factorised: bool
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    downsample_type: tuple[str | None, ...]
    decoder_block_out_channels: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    decoder_spatio_temporal_scaling: tuple[bool, ...]
    decoder_inject_noise: tuple[bool, ...]
    upsample_residual: tuple[bool, ...]
    upsample_factor: tuple[int, ...]

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent stands for, along height and along width."""
        factor = self.patch_size
        for kind in self.downsample_type:
            factor *= STRIDES[kind][1] if kind else 1
        return factor

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for, after the first, which stands for one."""
        factor = 1
        for kind in self.downsample_type:
            factor *= STRIDES[kind][0] if kind else 1
        return factor

    def down_stages(self) -> list[DownStage]:
        """The encoder's blocks, from pixels to latents."""
        widths = self.block_out_channels
        outputs = widths[1:] if self.factorised else (*widths[1:], widths[-1])
        stages = zip(widths, outputs, self.layers_per_block[:-1], self.downsample_type, strict=False)
        return [DownStage(*stage) for stage in stages]

    def up_stages(self) -> list[UpStage]:
        """The decoder's blocks, from latents to pixels."""
        stages, width = [], self.decoder_block_out_channels[-1]
        for i in reversed(range(len(self.decoder_block_out_channels))):
            factor = self.upsample_factor[i]
            stage = UpStage(
                inputs=width,
                outputs=self.decoder_block_out_channels[i] // factor,
                resnets=self.decoder_layers_per_block[i],
                upsample=self.decoder_spatio_temporal_scaling[i],
                inject_noise=self.decoder_inject_noise[i],
                residual=self.upsample_residual[i],
                factor=factor,
            )
            stages.append(stage)
            width = stage.outputs
        return stages


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `condition` is true for LTXConditionPipeline, whose schedule, positions, prompt encoding and
    pinned image differ from the other two's. `recipe` is what its vidgen.json puts in place of the published defaults;
    `dtypes` holds the published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: FlowScheduler
    text: T5Params
    max_tokens: int
    condition: bool
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]

    @property
    def plain_levels(self) -> bool:
        """Whether the scheduler neither shifts nor stretches: a timestep is its noise level times 1000."""
        s = self.scheduler
        return not s.use_dynamic_shifting and s.shift == 1.0 and not s.shift_terminal


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not supported."""
    require(configs, [name for name in COMPONENTS if name != "tokenizer"], "LTX-Video")
    index, own = configs["model_index"], configs.get("vidgen", {})
    name = one_of(index, "_class_name", tuple(PIPELINES), file_of("model_index"))
    check_classes(
        index,
        {
            "transformer": ("LTXVideoTransformer3DModel",),
            "vae": ("AutoencoderKLLTXVideo",),
            "text_encoder": ("T5EncoderModel",),
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        },
    )
    if has_component(index, "latent_upsampler"):
        raise CheckpointError(f"{file_of('model_index')}: component latent_upsampler is not supported")
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"], name == CONDITION),
        text=t5_params(configs["text_encoder"]),
        max_tokens=TEXT_TOKENS[name],
        condition=name == CONDITION,
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        dtypes=published(configs, WITH_WEIGHTS),
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
    """Sizes from transformer/config.json."""
    where = file_of("transformer")
    fixed: dict[str, Any] = {
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm_across_heads",
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
        "attention_bias": True,
        "attention_out_bias": True,
    }
    for name, value in fixed.items():
        one_of(config, name, (value,), where, default=value)
    refuse_unknown(config, {*TransformerParams.__slots__, *fixed, "cross_attention_dim"}, where)
    sizes = {name: take(config, name, where) for name in TransformerParams.__slots__ if name != "out_channels"}
    params = TransformerParams(out_channels=config.get("out_channels") or sizes["in_channels"], **sizes)
    one_of(config, "cross_attention_dim", (params.width,), where, default=2048)
    if params.attention_head_dim % 2:
        raise CheckpointError(f"{where}: attention_head_dim is {params.attention_head_dim}; it must be even")
    return params


def scheduler_params(config: Mapping[str, Any], condition: bool) -> FlowScheduler:
    """The schedule of a FlowMatchEulerDiscreteScheduler. LTXConditionPipeline tells the model unshifted timesteps, so
    its scheduler may neither shift nor stretch the noise levels."""
    where = file_of("scheduler")
    one_of(config, "_class_name", ("FlowMatchEulerDiscreteScheduler",), where)
    one_of(config, "invert_sigmas", (False,), where, default=False)
    params = flow_scheduler(config, where)
    if condition:
        one_of(config, "use_dynamic_shifting", (False,), where, default=False)
        one_of(config, "shift", (1.0,), where, default=1.0)
        one_of(config, "shift_terminal", (None,), where)
    return params


def vae_params(config: Mapping[str, Any]) -> VAEParams:
    """Sizes from vae/config.json; what a file of an early release leaves out is what that release had."""
    where = file_of("vae")
    for name in ("patch_size_t", "scaling_factor"):
        one_of(config, name, (1,), where, default=1)
    channels = tuple(take(config, "block_out_channels", where))
    blocks = _tuple(config, "down_block_types", (PLAIN_BLOCK,) * len(channels))
    if len(set(blocks)) != 1 or blocks[0] not in (PLAIN_BLOCK, FACTORISED_BLOCK):
        raise CheckpointError(
            f"{where}: down_block_types is {list(blocks)}; allowed: all {PLAIN_BLOCK} or all {FACTORISED_BLOCK}"
        )
    factorised = blocks[0] == FACTORISED_BLOCK
    levels = len(channels) - 1 if factorised else len(channels)
    kinds = _tuple(config, "downsample_type", ("conv",) * levels)[:levels]
    scaled = tuple(take(config, "spatio_temporal_scaling", where))[:levels]
    decoder = _tuple(config, "decoder_block_out_channels", (128, 256, 512, 512))
    params = VAEParams(
        in_channels=take(config, "in_channels", where),
        out_channels=take(config, "out_channels", where),
        latent_channels=take(config, "latent_channels", where),
        patch_size=take(config, "patch_size", where),
        resnet_norm_eps=take(config, "resnet_norm_eps", where),
        encoder_causal=one_of(config, "encoder_causal", (True,), where, default=True),
        decoder_causal=bool(config.get("decoder_causal", False)),
        timestep_conditioning=bool(config.get("timestep_conditioning", False)),
        factorised=factorised,
        block_out_channels=channels,
        layers_per_block=tuple(take(config, "layers_per_block", where)),
        downsample_type=tuple(kind if on else None for kind, on in zip(kinds, scaled, strict=False)),
        decoder_block_out_channels=decoder,
        decoder_layers_per_block=_tuple(config, "decoder_layers_per_block", (4, 3, 3, 3, 4)),
        decoder_spatio_temporal_scaling=_tuple(config, "decoder_spatio_temporal_scaling", (True, True, True, False)),
        decoder_inject_noise=_tuple(config, "decoder_inject_noise", (False,) * (len(decoder) + 1)),
        upsample_residual=_tuple(config, "upsample_residual", (False,) * len(decoder)),
        upsample_factor=_tuple(config, "upsample_factor", (1,) * len(decoder)),
    )
    others = {"patch_size_t", "scaling_factor", "down_block_types", "spatio_temporal_scaling"}
    factors = {"spatial_compression_ratio", "temporal_compression_ratio"}
    refuse_unknown(config, {*VAEParams.__slots__, *others, *factors} - {"factorised"}, where)
    _check_lengths(params, levels, where)
    _check_widths(params, where)
    _check_factors(params, config, where)
    return params


def _check_lengths(params: VAEParams, levels: int, where: str) -> None:
    decoder = len(params.decoder_block_out_channels)
    lengths = {
        "layers_per_block": levels + 1,
        "downsample_type": levels,
        "decoder_layers_per_block": decoder + 1,
        "decoder_spatio_temporal_scaling": decoder,
        "decoder_inject_noise": decoder + 1,
        "upsample_residual": decoder,
        "upsample_factor": decoder,
    }
    for name, length in lengths.items():
        if len(getattr(params, name)) != length:
            raise CheckpointError(f"{where}: {name} has {len(getattr(params, name))} entries; it needs {length}")


def _check_widths(params: VAEParams, where: str) -> None:
    kinds = ("spatial", "temporal", "spatiotemporal") if params.factorised else ("conv",)
    for stage in params.down_stages():
        if stage.downsample is not None and stage.downsample not in kinds:
            raise CheckpointError(f"{where}: downsample_type is {stage.downsample!r}; allowed: {', '.join(kinds)}")
        if params.factorised and stage.downsample is None and stage.inputs != stage.outputs:
            raise CheckpointError(f"{where}: block_out_channels change where spatio_temporal_scaling is false")
    for up in params.up_stages():
        if up.widens and (up.inject_noise or params.timestep_conditioning):
            what = "timestep_conditioning" if params.timestep_conditioning else "decoder_inject_noise"
            raise CheckpointError(f"{where}: {what} with a decoder block of {up.inputs} to {up.outputs} channels")
        found = up.outputs if up.widens else up.inputs
        needed = up.outputs * (up.factor if up.upsample else 1)
        if found != needed or (up.widens and up.factor != 1):
            raise CheckpointError(
                f"{where}: upsample_factor {up.factor} does not fit {up.inputs} to {up.outputs} channels"
            )


def _check_factors(params: VAEParams, config: Mapping[str, Any], where: str) -> None:
    ups = 2 ** sum(params.decoder_spatio_temporal_scaling)
    made = {"spatial": (params.spatial_factor, ups * params.patch_size), "temporal": (params.temporal_factor, ups)}
    for axis, (encoder, decoder) in made.items():
        if encoder != decoder:
            raise CheckpointError(f"{where}: the encoder's {axis} factor is {encoder}, the decoder's {decoder}")
        if config.get(f"{axis}_compression_ratio") not in (encoder, None):
            given = config[f"{axis}_compression_ratio"]
            raise CheckpointError(f"{where}: {axis}_compression_ratio is {given}; the layers make it {encoder}")


def _tuple(config: Mapping[str, Any], name: str, default: tuple[Any, ...]) -> tuple[Any, ...]:
    value = config.get(name)
    return default if value is None else tuple(value)
