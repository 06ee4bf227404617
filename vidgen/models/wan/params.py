"""What a Wan 2.1 checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Refuses to know limits, cost and requests. What an older file leaves out means what it meant when it was published; an
option that we do not honour is an error that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_TOKENS = 512
"""Text tokens of every published Wan checkpoint; shorter prompts are padded with zeros up to it."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

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
class SchedulerParams:
    """The checkpoint's scheduler: `sampler` is one of SAMPLERS; the rest is named as in scheduler_config.json, with
    `shift` for UniPC's flow_shift. Solver fields of an Euler checkpoint are UniPC's own defaults."""

    sampler: str
    num_train_timesteps: int
    shift: float
    shift_terminal: float | None
    final_sigmas_type: str
    solver_order: int
    solver_type: str
    lower_order_final: bool
    disable_corrector: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextParams:
    """Sizes of the T5-class text encoder, named as in text_encoder/config.json. `relative_attention_layers` counts the
    layers with a position bias of their own: all in UMT5, the first in T5."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    vocab_size: int
    relative_attention_num_buckets: int
    relative_attention_layers: int
    gated: bool
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `recipe` is what its vidgen.json puts in place of the published defaults; `dtypes` holds the
    published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: SchedulerParams
    text: TextParams
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not supported."""
    for name in ("model_index", "transformer", "vae", "text_encoder", "scheduler"):
        if name not in configs:
            raise CheckpointError(f"{_file(name)} is missing; a Wan checkpoint needs {', '.join(COMPONENTS)}")
    _check_index(configs["model_index"])
    own = configs.get("vidgen", {})
    params = Params(
        transformer=transformer_params(configs["transformer"]),
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        text=text_params(configs["text_encoder"], own.get("max_text_tokens", TEXT_TOKENS)),
        recipe=_recipe(own.get("defaults", {})),
        dtypes=_dtypes(configs["text_encoder"], own.get("dtype")),
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
    where = _file("model_index")
    for name in ("expand_timesteps", "boundary_ratio"):
        if index.get(name):
            raise CheckpointError(f"{where}: {name} is {index[name]} (Wan 2.2), which is not supported")
    for name in ("transformer_2", "image_encoder", "image_processor"):
        if any(index.get(name) or ()):
            raise CheckpointError(f"{where}: component {name} is not supported; Wan 2.1 text-to-video has none")
    classes = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
    for name, expected in classes.items():
        found = list(index.get(name) or ())[-1:]
        if found and found != [expected]:
            raise CheckpointError(f"{where}: component {name} is {found[0]}; allowed: {expected}")


def transformer_params(config: Mapping[str, Any]) -> TransformerParams:
    """Sizes from transformer/config.json."""
    where = _file("transformer")
    _refuse(config, ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"), where, "image conditioning")
    if config.get("qk_norm") != "rms_norm_across_heads":
        raise CheckpointError(f"{where}: qk_norm is {config.get('qk_norm')!r}; allowed: 'rms_norm_across_heads'")
    _refuse_unknown(config, {*TransformerParams.__slots__, "qk_norm"}, where)
    sizes = {name: _take(config, name, where) for name in TransformerParams.__slots__ if name != "out_channels"}
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
    where = _file("vae")
    _refuse(config, ("is_residual",), where, "the Wan 2.2 5B autoencoder")
    factors = ("scale_factor_spatial", "scale_factor_temporal")
    _refuse_unknown(config, {*VAEParams.__slots__, *factors, "clip_output", "dropout"}, where)
    params = VAEParams(
        base_dim=_take(config, "base_dim", where),
        decoder_base_dim=config.get("decoder_base_dim") or _take(config, "base_dim", where),
        z_dim=_take(config, "z_dim", where),
        dim_mult=tuple(_take(config, "dim_mult", where)),
        num_res_blocks=_take(config, "num_res_blocks", where),
        attn_scales=tuple(_take(config, "attn_scales", where)),
        temperal_downsample=tuple(_take(config, "temperal_downsample", where)),
        latents_mean=tuple(_take(config, "latents_mean", where)),
        latents_std=tuple(_take(config, "latents_std", where)),
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


def scheduler_params(config: Mapping[str, Any]) -> SchedulerParams:
    """The schedule and solver of scheduler/scheduler_config.json, refusing by name what we do not sample with.

    Betas, timestep spacing and sigma bounds are passed over: flow sigmas do not depend on them.
    """
    where = _file("scheduler")
    samplers = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}
    name = config.get("_class_name")
    if name not in samplers:
        raise CheckpointError(f"{where}: _class_name is {name!r}; allowed: {', '.join(samplers)}")
    unipc = samplers[name] == "unipc"
    if unipc:
        for key, wanted in (("use_flow_sigmas", True), ("prediction_type", "flow_prediction"), ("predict_x0", True)):
            if config.get(key, key == "predict_x0") != wanted:
                raise CheckpointError(f"{where}: {key} is {config.get(key)!r}; allowed: {wanted!r}")
    spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting")
    _refuse(
        config, (*spacings, "invert_sigmas", "stochastic_sampling", "thresholding", "solver_p"), where, "a schedule"
    )
    params = SchedulerParams(
        sampler=samplers[name],
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        shift=config.get("flow_shift" if unipc else "shift", 1.0),
        shift_terminal=config.get("shift_terminal"),
        final_sigmas_type=config.get("final_sigmas_type", "zero"),
        solver_order=config.get("solver_order", 2),
        solver_type=config.get("solver_type", "bh2"),
        lower_order_final=config.get("lower_order_final", True),
        disable_corrector=tuple(config.get("disable_corrector") or ()),
    )
    allowed = {"final_sigmas_type": ("zero", "sigma_min"), "solver_order": (1, 2, 3), "solver_type": ("bh1", "bh2")}
    for key, values in allowed.items():
        if getattr(params, key) not in values:
            raise CheckpointError(f"{where}: {key} is {getattr(params, key)!r}; allowed: {', '.join(map(str, values))}")
    if params.solver_order > 1 and params.final_sigmas_type == "zero" and not params.lower_order_final:
        raise CheckpointError(
            f"{where}: lower_order_final is false; solver_order {params.solver_order} down to a final sigma of zero "
            "needs it, because the log-SNR is infinite there"
        )
    return params


def text_params(config: Mapping[str, Any], max_tokens: int) -> TextParams:
    """Sizes from text_encoder/config.json, and the tokens a prompt is padded to."""
    where = _file("text_encoder")
    kind = config.get("model_type")
    if kind not in ("umt5", "t5"):
        raise CheckpointError(f"{where}: model_type is {kind!r}; allowed: umt5, t5")
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size", "relative_attention_num_buckets")
    sizes = {name: _take(config, name, where) for name in names}
    return TextParams(
        **sizes,
        relative_attention_layers=sizes["num_layers"] if kind == "umt5" else 1,
        gated=str(config.get("feed_forward_proj", "relu")).startswith("gated-"),
        max_tokens=max_tokens,
    )


def _recipe(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    allowed = {**{name: type(value) for name, value in PUBLISHED.items()}, "sampler": str, "shift": float}
    for name, value in given.items():
        if name not in allowed:
            raise CheckpointError(f"vidgen.json: defaults.{name} is unknown; allowed: {', '.join(sorted(allowed))}")
        kinds = (int, float) if allowed[name] is float else allowed[name]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise CheckpointError(f"vidgen.json: defaults.{name} is {value!r}; it must be {allowed[name].__name__}")
    return tuple(sorted(given.items()))


def _dtypes(text_encoder: Mapping[str, Any], own: str | None) -> tuple[tuple[str, str], ...]:
    """Published dtypes: vidgen.json's `dtype` for all components; else what text_encoder/config.json names, and fp32
    for the other two, whose config files name none."""
    text = own or text_encoder.get("dtype") or text_encoder.get("torch_dtype") or "float32"
    named = {"transformer": own or "float32", "vae": own or "float32", "text_encoder": text}
    for component, dtype in named.items():
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{component}: dtype is {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
    return tuple(named.items())


def _take(config: Mapping[str, Any], name: str, where: str) -> Any:
    if config.get(name) is None:
        raise CheckpointError(f"{where}: {name} is missing")
    return config[name]


def _refuse(config: Mapping[str, Any], names: Collection[str], where: str, what: str) -> None:
    for name in names:
        if config.get(name):
            raise CheckpointError(f"{where}: {name} is {config[name]!r} ({what}), which is not supported")


def _refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """An option that is switched on and that we have never heard of may change pixels."""
    for name, value in config.items():
        if value and not name.startswith("_") and name not in known:
            raise CheckpointError(f"{where}: option {name} = {value!r} is unknown, so it cannot be honoured")


def _file(component: str) -> str:
    names = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    return names.get(component, f"{component}/config.json")
