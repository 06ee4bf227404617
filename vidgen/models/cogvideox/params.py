"""What a CogVideoX checkpoint says about itself: sizes and switches from its config.json files. Standard library only.

Refuses to know limits, cost and requests. What an older file leaves out means what it meant when it was published; an
option that we do not honour is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.specs.config import check_classes, file_of, one_of, published, recipe, refuse, refuse_unknown, take
from vidgen.specs.config import require as require_components
from vidgen.specs.t5 import T5Params, t5_params

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
SAMPLERS = {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}

PUBLISHED: Mapping[str, Any] = {
    "height": 480,
    "width": 720,
    "num_frames": 49,
    "fps": 8.0,
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "negative_prompt": "",
}
"""The recipe on the model cards of THUDM/CogVideoX-2b, -5b and -5b-I2V."""
PUBLISHED_1_5: Mapping[str, Any] = {**PUBLISHED, "height": 768, "width": 1360, "num_frames": 81, "fps": 16.0}
"""The recipe on the model cards of THUDM/CogVideoX1.5-5B and -5B-I2V."""


@dataclass(frozen=True, slots=True)
class TransformerParams:
    """Sizes of CogVideoXTransformer3DModel, named as in transformer/config.json. Width D = heads x head size.

    `patch_size_t` is None in CogVideoX 1.0 (a patch is one latent frame deep) and 2 in 1.5. `sample_*` are the size it
    was trained on: latent height and width, and frames.
    """

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    time_embed_dim: int
    ofs_embed_dim: int | None
    text_embed_dim: int
    num_layers: int
    attention_bias: bool
    sample_width: int
    sample_height: int
    sample_frames: int
    patch_size: int
    patch_size_t: int | None
    temporal_compression_ratio: int
    max_text_seq_length: int
    norm_eps: float
    spatial_interpolation_scale: float
    temporal_interpolation_scale: float
    use_rotary_positional_embeddings: bool
    use_learned_positional_embeddings: bool
    patch_bias: bool

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def depth(self) -> int:
        """Latent frames of a patch."""
        return self.patch_size_t or 1

    @property
    def patch_volume(self) -> int:
        """Latents of a patch."""
        return self.depth * self.patch_size**2

    @property
    def trained_grid(self) -> tuple[int, int, int]:
        """Patches along frames, height and width of the size it was trained on."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size


@dataclass(frozen=True, slots=True)
class VAEParams:
    """Sizes of AutoencoderKLCogVideoX, named as in vae/config.json. `invert_scale_latents`: an image's latents are
    divided by the scaling factor instead of multiplied, as the model was trained."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    norm_eps: float
    norm_num_groups: int
    temporal_compression_ratio: int
    sample_height: int
    sample_width: int
    scaling_factor: float
    invert_scale_latents: bool

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for, after the first, which stands for one."""
        return self.temporal_compression_ratio

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent stands for, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Blocks that halve, or double, the frames: the first ones."""
        return self.temporal_compression_ratio.bit_length() - 1


@dataclass(frozen=True, slots=True)
class SchedulerParams:
    """The noise schedule, named as in scheduler_config.json, and `sampler`, ddim or dpm, for the scheduler's class."""

    sampler: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction_type: str
    timestep_spacing: str
    rescale_betas_zero_snr: bool
    snr_shift_scale: float


@dataclass(frozen=True, slots=True)
class Params:
    """A whole checkpoint. `recipe` is what its vidgen.json puts in place of the published defaults; `dtypes` holds the
    published dtype of each component with weights."""

    transformer: TransformerParams
    vae: VAEParams
    scheduler: SchedulerParams
    text: T5Params
    recipe: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[str, str], ...]

    @property
    def text_tokens(self) -> int:
        """Tokens to which every prompt is padded; the padding is attended to."""
        return self.transformer.max_text_seq_length

    @property
    def from_image(self) -> bool:
        """Whether the transformer reads an image's latents beside the noisy ones."""
        return self.transformer.in_channels == 2 * self.vae.latent_channels


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """Sizes of the checkpoint whose parsed JSON files are `configs`: model_index, transformer, vae, text_encoder,
    scheduler, and optionally vidgen. CheckpointError names what is missing, contradictory or not supported."""
    require_components(configs, ("transformer", "vae", "text_encoder", "scheduler"), "cogvideox")
    expected = {"transformer": ("CogVideoXTransformer3DModel",), "vae": ("AutoencoderKLCogVideoX",)}
    check_classes(configs["model_index"], {**expected, "text_encoder": ("T5EncoderModel",)})
    transformer, own = transformer_params(configs["transformer"]), configs.get("vidgen", {})
    text = configs["text_encoder"]
    params = Params(
        transformer=transformer,
        vae=vae_params(configs["vae"]),
        scheduler=scheduler_params(configs["scheduler"]),
        text=t5_params(text),
        recipe=recipe(own.get("defaults", {}), PUBLISHED),
        # Only the text encoder's file names a dtype; the components of a checkpoint are published in one.
        dtypes=published(configs, WITH_WEIGHTS, text.get("dtype") or text.get("torch_dtype") or "float32"),
    )
    _check_fit(params)
    return params


def _check_fit(params: Params) -> None:
    t, v, where = params.transformer, params.vae, file_of("transformer")
    if t.in_channels not in (v.latent_channels, 2 * v.latent_channels):
        raise CheckpointError(
            f"{where}: in_channels is {t.in_channels}; allowed: the VAE's latent_channels, {v.latent_channels}, "
            f"or twice as many with an image"
        )
    pairs = (
        ("out_channels", v.latent_channels, "the VAE's latent_channels"),
        ("temporal_compression_ratio", v.temporal_compression_ratio, "the VAE's"),
        ("text_embed_dim", params.text.d_model, "the text encoder's d_model"),
    )
    for name, needed, whose in pairs:
        if getattr(t, name) != needed:
            raise CheckpointError(f"{where}: {name} is {getattr(t, name)}; allowed: {whose}, {needed}")
    if t.ofs_embed_dim is not None and not params.from_image:
        raise CheckpointError(f"{where}: ofs_embed_dim is {t.ofs_embed_dim}; it belongs to image-to-video checkpoints")


def transformer_params(config: Mapping[str, Any]) -> TransformerParams:
    """Sizes from transformer/config.json."""
    where = file_of("transformer")
    one_of(config, "activation_fn", ("gelu-approximate",), where, default="gelu-approximate")
    one_of(config, "timestep_activation_fn", ("silu",), where, default="silu")
    one_of(config, "norm_elementwise_affine", (True,), where, default=True)
    one_of(config, "flip_sin_to_cos", (True,), where, default=True)
    one_of(config, "freq_shift", (0,), where, default=0)
    checked = {"activation_fn", "timestep_activation_fn", "norm_elementwise_affine", "flip_sin_to_cos", "freq_shift"}
    refuse_unknown(config, {*TransformerParams.__slots__, *checked, "dropout"}, where)
    # Switches that came with later checkpoints: a file without them is of an earlier one.
    later = {"ofs_embed_dim": None, "patch_size_t": None, "use_learned_positional_embeddings": False}
    later |= {"patch_bias": True, "use_rotary_positional_embeddings": False}
    read = {name: take(config, name, where) for name in TransformerParams.__slots__ if name not in later}
    params = TransformerParams(**read, **{name: config.get(name, value) for name, value in later.items()})
    one_of(config, "patch_size_t", (None, 2), where)
    if params.ofs_embed_dim not in (None, params.time_embed_dim):
        raise CheckpointError(
            f"{where}: ofs_embed_dim is {params.ofs_embed_dim}; allowed: null, or time_embed_dim, "
            f"{params.time_embed_dim}, because the two are added"
        )
    if params.use_learned_positional_embeddings and not params.use_rotary_positional_embeddings:
        raise CheckpointError(f"{where}: use_learned_positional_embeddings needs use_rotary_positional_embeddings")
    if params.patch_size_t and (
        not params.use_rotary_positional_embeddings or params.use_learned_positional_embeddings
    ):
        raise CheckpointError(f"{where}: patch_size_t is 2; such a checkpoint has rotary positions and no others")
    rotary = params.use_rotary_positional_embeddings
    name, size = ("attention_head_dim", params.attention_head_dim) if rotary else ("the width", params.width)
    if size % 16:
        raise CheckpointError(f"{where}: {name} is {size}; allowed: multiples of 16, divided among three axes in pairs")
    return params


def vae_params(config: Mapping[str, Any]) -> VAEParams:
    """Sizes from vae/config.json. `force_upcast` and `sample_size` change nothing in diffusers either."""
    where = file_of("vae")
    refuse(config, ("use_quant_conv", "use_post_quant_conv"), where, "a convolution of the moments")
    refuse(config, ("shift_factor", "latents_mean", "latents_std"), where, "another scaling of the latents")
    one_of(config, "act_fn", ("silu",), where, default="silu")
    one_of(config, "temporal_compression_ratio", (4,), where)
    widths = tuple(take(config, "block_out_channels", where))
    for name, block in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
        if tuple(config.get(name) or (block,) * len(widths)) != (block,) * len(widths):
            raise CheckpointError(f"{where}: {name} is {config[name]}; allowed: {len(widths)} times {block}")
    known = {"act_fn", "down_block_types", "up_block_types", "force_upcast", "sample_size"}
    refuse_unknown(config, {*VAEParams.__slots__, *known}, where)
    own = ("block_out_channels", "invert_scale_latents")
    read = {name: take(config, name, where) for name in VAEParams.__slots__ if name not in own}
    if len(widths) < 3:
        raise CheckpointError(
            f"{where}: block_out_channels is {list(widths)}; two blocks halve the frames, so 3 or more"
        )
    return VAEParams(
        **read, block_out_channels=widths, invert_scale_latents=bool(config.get("invert_scale_latents", False))
    )


def scheduler_params(config: Mapping[str, Any]) -> SchedulerParams:
    """The schedule of scheduler_config.json. Clipping options are passed over: these schedulers clip nothing."""
    where = file_of("scheduler")
    name = one_of(config, "_class_name", tuple(SAMPLERS), where)
    refuse(config, ("trained_betas", "steps_offset"), where, "a schedule")
    one_of(config, "set_alpha_to_one", (True,), where, default=True)
    params = SchedulerParams(
        sampler=SAMPLERS[name],
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.00085),
        beta_end=config.get("beta_end", 0.012),
        beta_schedule=one_of(
            config, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"), where, default="scaled_linear"
        ),
        prediction_type=one_of(config, "prediction_type", ("epsilon", "sample", "v_prediction"), where, "epsilon"),
        timestep_spacing=one_of(config, "timestep_spacing", ("trailing", "leading", "linspace"), where, "leading"),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        snr_shift_scale=config.get("snr_shift_scale", 3.0),
    )
    if params.rescale_betas_zero_snr and params.prediction_type == "epsilon":
        raise CheckpointError(
            f"{where}: rescale_betas_zero_snr is true with prediction_type 'epsilon', which says nothing of the clean "
            f"sample where there is only noise; allowed with it: 'sample', 'v_prediction'"
        )
    return params
