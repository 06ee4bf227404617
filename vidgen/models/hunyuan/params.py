"""What a HunyuanVideo checkpoint says about itself: sizes and switches from its config.json files. No torch.

Text-to-video; image-to-video that puts the image beside the latents as further channels (`latent_concat`); and
image-to-video that holds the first latent frame at it (`token_replace`). The latter two show the image to Llava too.

Refuses to know limits, cost and requests. An option that we do not honour is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
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
    require,
    take,
)
from vidgen.specs.flow import FlowScheduler, flow_scheduler

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""What every HunyuanVideo checkpoint has; image-to-video has `image_processor` too."""
WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
T2V, I2V = "HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"
PIPELINES: Mapping[str, tuple[str, ...]] = {T2V: ("t2v",), I2V: ("i2v",)}
RELATIVES: Mapping[str, str] = {
    "HunyuanSkyreelsImageToVideoPipeline": "SkyReels V1",
    "HunyuanVideoFramepackPipeline": "FramePack",
    "HunyuanVideo15Pipeline": "HunyuanVideo 1.5",
    "HunyuanVideo15ImageToVideoPipeline": "HunyuanVideo 1.5",
}
"""Pipelines of other models made from this one."""
CONCAT, REPLACE = "latent_concat", "token_replace"
TEXT_TOKENS = 256
"""Tokens that follow the beginning of the prompt's template, its end included."""
IMAGE_TOKENS = 576
"""Tokens of a picture in Llava's prompt, as the template of every published checkpoint counts them."""
PUBLISHED: Mapping[str, Any] = {
    "height": 720,
    "width": 1280,
    "num_frames": 129,
    "fps": 24.0,
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "negative_prompt": "",
}
"""The recipe on the model cards of HunyuanVideo and HunyuanVideo-I2V, at the frame rate it was trained on."""


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of HunyuanVideoTransformer3DModel, named as in transformer/config.json. Width D = heads x head size."""

    in_channels: int
    out_channels: int
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    num_single_layers: int
    num_refiner_layers: int
    mlp_ratio: float
    patch_size: int
    guidance_embeds: bool
    text_embed_dim: int
    pooled_projection_dim: int
    rope_theta: float
    rope_axes_dim: tuple[int, int, int]
    image_condition_type: str | None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLHunyuanVideo, named as in vae/config.json."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    spatial_compression_ratio: int
    temporal_compression_ratio: int

    @property
    def spatial_levels(self) -> tuple[bool, ...]:
        """Which levels, the finest first, halve height and width on their way to the next."""
        halvings = int(math.log2(self.spatial_compression_ratio))
        return tuple(level < halvings for level in range(len(self.block_out_channels)))

    @property
    def temporal_levels(self) -> tuple[bool, ...]:
        """Which levels halve the frames after the first: the last ones but one."""
        levels, halvings = len(self.block_out_channels), int(math.log2(self.temporal_compression_ratio))
        return tuple(levels - 1 - halvings <= level < levels - 1 for level in range(levels))


@dataclass(frozen=True, slots=True)
class LlamaParams:
    """Sizes of the Llama, named as in text_encoder/config.json (or its text_config)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class ClipParams:
    """Sizes of a CLIP text model, named as in its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `vision` is the tower of a Llava, None where the text encoder is a Llama alone. `recipe` is
    what its vidgen.json puts in place of the published defaults; `dtypes` the published dtype of each component with
    weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: FlowScheduler
    llama: LlamaParams
    vision: ClipVisionParams | None
    clip: ClipParams
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]

    @property
    def task(self) -> str:
        """The one task that the checkpoint can do."""
        return "t2v" if self.transformer.image_condition_type is None else "i2v"


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    text_encoder_2, scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not
    supported."""
    require(configs, (*WITH_WEIGHTS, "scheduler"), "hunyuan")
    index, text, own = configs["model_index"], configs["text_encoder"], configs.get("vidgen", {})
    pipeline, where = str(index.get("_class_name")), file_of("model_index")
    if pipeline in RELATIVES:
        raise CheckpointError(
            f"{where}: _class_name is {pipeline}: {RELATIVES[pipeline]} is another model, which hunyuan does not run; "
            f"allowed: {', '.join(PIPELINES)}"
        )
    one_of(index, "_class_name", tuple(PIPELINES), where)
    with_image = pipeline == I2V
    check_classes(
        index,
        {
            "transformer": ("HunyuanVideoTransformer3DModel",),
            "vae": ("AutoencoderKLHunyuanVideo",),
            "text_encoder": ("LlavaForConditionalGeneration",) if with_image else ("LlamaModel",),
            "text_encoder_2": ("CLIPTextModel",),
        },
    )
    if with_image and not has_component(index, "image_processor"):
        raise CheckpointError(f"{where}: component image_processor is missing; {I2V} needs it")
    llama, vision = llava_params(text) if with_image else (llama_params(text), None)
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        llama=llama,
        vision=vision,
        clip=clip_params(configs["text_encoder_2"]),
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        # diffusers components name no dtype; such a checkpoint is saved in halves throughout or not at all.
        dtypes=published(configs, WITH_WEIGHTS, text.get("dtype") or text.get("torch_dtype") or "float32"),
    )
    _check_together(params, with_image)
    return params


def _check_together(params: Params, with_image: bool) -> None:
    """What one component makes is what the next takes."""
    t, latents, where = params.transformer, params.vae.latent_channels, file_of("transformer")
    kind = t.image_condition_type
    if with_image != (kind is not None):
        allowed = f"{CONCAT}, {REPLACE}" if with_image else "null"
        raise CheckpointError(
            f"{where}: image_condition_type is {kind!r}; {I2V if with_image else T2V} allows: {allowed}"
        )
    if kind is None and t.in_channels == 2 * latents:
        raise CheckpointError(
            f"{where}: in_channels is {t.in_channels}, as SkyReels V1 image-to-video has it, which is not supported"
        )
    expected = 2 * latents + 1 if kind == CONCAT else latents
    if t.in_channels != expected:
        raise CheckpointError(
            f"{where}: in_channels is {t.in_channels}; latent_channels {latents} of the VAE and image_condition_type "
            f"{kind!r} make it {expected}"
        )
    sizes = {
        "out_channels": (latents, "latent_channels of the VAE"),
        "text_embed_dim": (params.llama.hidden_size, "hidden_size of text_encoder"),
        "pooled_projection_dim": (params.clip.hidden_size, "hidden_size of text_encoder_2"),
    }
    for name, (size, what) in sizes.items():
        if getattr(t, name) != size:
            raise CheckpointError(f"{where}: {name} is {getattr(t, name)}; {what} is {size}")


def transformer_params(config: Mapping[str, Any], where: str = file_of("transformer")) -> TransformerParams:
    """Sizes from transformer/config.json."""
    one_of(config, "qk_norm", ("rms_norm",), where)
    one_of(config, "patch_size_t", (1,), where)
    kind = one_of(config, "image_condition_type", (None, CONCAT, REPLACE), where)
    refuse_unknown(config, {*TransformerParams.__slots__, "qk_norm", "patch_size_t"}, where)
    own = ("out_channels", "rope_axes_dim", "image_condition_type")
    axes = tuple(take(config, "rope_axes_dim", where))
    params = TransformerParams(
        out_channels=config.get("out_channels") or take(config, "in_channels", where),
        rope_axes_dim=axes,
        image_condition_type=kind,
        **{name: take(config, name, where) for name in TransformerParams.__slots__ if name not in own},
    )
    if len(axes) != 3 or any(size % 2 for size in axes) or sum(axes) != params.attention_head_dim:
        raise CheckpointError(
            f"{where}: rope_axes_dim is {list(axes)}; allowed: three even numbers with the sum attention_head_dim, "
            f"{params.attention_head_dim}"
        )
    return params


def vae_params(config: Mapping[str, Any], where: str = file_of("vae")) -> VAEParams:
    """Sizes from vae/config.json."""
    one_of(config, "act_fn", ("silu",), where)
    one_of(config, "mid_block_add_attention", (True,), where, default=True)
    one_of(config, "temporal_compression_ratio", (4,), where)
    channels = tuple(take(config, "block_out_channels", where))
    for name, block in (("down_block_types", "HunyuanVideoDownBlock3D"), ("up_block_types", "HunyuanVideoUpBlock3D")):
        expected = [block] * len(channels)
        if list(take(config, name, where)) != expected:
            raise CheckpointError(f"{where}: {name} is {list(config[name])}; allowed: {expected}")
    options = ("act_fn", "mid_block_add_attention", "down_block_types", "up_block_types")
    refuse_unknown(config, {*VAEParams.__slots__, *options}, where)
    names = [name for name in VAEParams.__slots__ if name != "block_out_channels"]
    params = VAEParams(block_out_channels=channels, **{name: take(config, name, where) for name in names})
    space = params.spatial_compression_ratio
    if sum(params.temporal_levels) != 2 or 2 ** sum(params.spatial_levels) != space:
        raise CheckpointError(
            f"{where}: spatial_compression_ratio {space} and temporal_compression_ratio 4 do not fit "
            f"block_out_channels {list(channels)}"
        )
    for width in channels:
        if width % params.norm_num_groups:
            raise CheckpointError(
                f"{where}: block_out_channels has {width}; norm_num_groups {params.norm_num_groups} must divide it"
            )
    return params


def llama_params(config: Mapping[str, Any], where: str = file_of("text_encoder")) -> LlamaParams:
    """Sizes of a Llama; what an older file leaves out is Llama's own default (transformers, LlamaConfig)."""
    one_of(config, "model_type", ("llama",), where)
    refuse(config, ("attention_bias", "mlp_bias"), where, "biases in Llama")
    default = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    default |= {"num_hidden_layers": 32, "num_attention_heads": 32}
    sizes = {name: config.get(name) or value for name, value in default.items()}
    heads = sizes["num_attention_heads"]
    params = LlamaParams(
        **sizes,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or sizes["hidden_size"] // heads,
    )
    if params.num_hidden_layers < 3:
        raise CheckpointError(f"{where}: num_hidden_layers is {params.num_hidden_layers}; the last 2 are not run")
    return params


def llava_params(
    config: Mapping[str, Any], where: str = file_of("text_encoder")
) -> tuple[LlamaParams, ClipVisionParams]:
    """Sizes of a Llava; what an older file leaves out is Llava's own default (transformers, LlavaConfig)."""
    one_of(config, "model_type", ("llava",), where)
    one_of(config, "vision_feature_layer", (-2,), where, default=-2)
    one_of(config, "vision_feature_select_strategy", ("default",), where, default="default")
    one_of(config, "multimodal_projector_bias", (True,), where, default=True)
    take(config, "image_token_index", where)
    tower = take(config, "vision_config", where)
    one_of(tower, "model_type", ("clip_vision_model",), f"{where}, vision_config")
    default = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    default |= {"image_size": 336, "patch_size": 14, "num_channels": 3}
    vision = ClipVisionParams(**{name: tower.get(name) or value for name, value in default.items()})
    patches = vision.tokens - 1
    if patches != IMAGE_TOKENS:
        raise CheckpointError(
            f"{where}, vision_config: image_size {vision.image_size} and patch_size {vision.patch_size} make {patches} "
            f"tokens; the prompt has room for {IMAGE_TOKENS}"
        )
    return llama_params(take(config, "text_config", where), f"{where}, text_config"), vision


def clip_params(config: Mapping[str, Any], where: str = file_of("text_encoder_2")) -> ClipParams:
    """Sizes from text_encoder_2/config.json."""
    one_of(config, "model_type", ("clip_text_model",), where)
    return ClipParams(**{name: take(config, name, where) for name in ClipParams.__slots__})


def scheduler_params(config: Mapping[str, Any]) -> FlowScheduler:
    """The schedule of scheduler_config.json; HunyuanVideo does not shift by the size of the clip."""
    where = file_of("scheduler")
    one_of(config, "_class_name", ("FlowMatchEulerDiscreteScheduler",), where)
    refuse(config, ("use_dynamic_shifting", "invert_sigmas"), where, "a schedule")
    return flow_scheduler(config, where)
