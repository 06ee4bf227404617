"""A pipeline class bound to a checkpoint: its call, its components and the sizes they name. Standard library only.

Refuses to know requests: `spec.py` judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import vidgen.models.diffusers.known as known
import vidgen.models.diffusers.source as source
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.diffusers.options import HOLDERS, Options
from vidgen.models.diffusers.source import Argument
from vidgen.specs.config import DTYPE_BYTES

WHERE = "model.pipeline"
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "image": ("image",),
    "last_image": ("last_image",),
    "video": ("video", "conditioning_frames", "control_video"),
    "height": ("height",),
    "width": ("width",),
    "num_frames": ("num_frames", "video_length"),
    "fps": ("fps", "frame_rate", "target_fps"),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "sigmas": ("sigmas",),
    "timesteps": ("timesteps",),
}
"""Request field -> the names that pipelines have for it; the first that the call takes is it."""
OURS = (
    *("generator", "latents", "output_type", "return_dict", "callback", "callback_steps", "frame_ids"),
    *("num_videos_per_prompt", "num_images_per_prompt"),
)
"""Arguments that the backend gives, or that would make something else than one video of one row."""
DENOISERS = ("transformer", "unet")
DROPPABLE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that a checkpoint may leave out though the class asks for them: it then runs without."""


@dataclass(frozen=True, slots=True)
class Params:
    """What a plan knows of a pipeline. `classes` maps each component that will be there to its class, `weights` to
    (bytes, numbers) of what is stored; `native` are sizes that the configs name; `factor` pixels a latent stands for,
    `multiple` what sizes are multiples of, `frame_step` that frames come as 1 + k x it; `latent_frames` whether the VAE
    compresses time by it."""

    pipeline: str
    call: tuple[Argument, ...]
    classes: tuple[tuple[str, str], ...]
    scheduler: tuple[tuple[str, Any], ...]
    options: Options
    native: tuple[tuple[str, int], ...]
    factor: int
    multiple: int
    frame_step: int | None
    tiles: tuple[int, int, int, int] | None
    dtype: str
    text_tokens: int | None
    weights: tuple[tuple[str, tuple[int, int]], ...] = ()

    def argument(self, field: str) -> Argument | None:
        """The call's argument for a request field, or None."""
        by_name = {a.name: a for a in self.call}
        return next((by_name[name] for name in ARGUMENTS[field] if name in by_name), None)

    @property
    def own(self) -> dict[str, Argument]:
        """Arguments that stand under `sampling.params`: the scalar ones that no request field is for."""
        taken = {name for names in ARGUMENTS.values() for name in names}
        return {a.name: a for a in self.call if a.kind is not None and a.name not in taken and a.name not in OURS}

    def class_of(self, component: str) -> str:
        return dict(self.classes).get(component, "")

    @property
    def denoiser(self) -> str:
        """The component that each step runs."""
        return next((name for name in DENOISERS if self.class_of(name)), "")


def read(
    configs: Mapping[str, Mapping[str, Any]],
    pipeline: str | None,
    options: Options,
    weights: Mapping[str, tuple[int, int]] | None = None,
) -> Params:
    """`configs` are the checkpoint's, those of `options.components` already in place of its own. ConfigError and
    CheckpointError name the class, the component or the option, and what is allowed."""
    name = pipeline or str(configs["model_index"].get("_class_name"))
    where = WHERE if pipeline else "model_index.json: _class_name"
    call = source.call(name, where)
    classes = _classes(name, where, configs["model_index"], options)
    chosen = dict(options.scheduler).get("class")
    if chosen is not None and "scheduler" in classes:
        classes["scheduler"] = _scheduler_class(classes["scheduler"], chosen)
    config = {component: configs.get(component, {}) for component in classes}
    denoiser = next((component for component in DENOISERS if component in classes), "")
    vae = config.get("vae", {})
    factor = known.spatial_factor(vae)
    params = Params(
        pipeline=name,
        call=call,
        classes=tuple(classes.items()),
        scheduler=_scheduler(classes.get("scheduler", ""), config.get("scheduler", {}), options),
        options=options,
        native=tuple(known.native_size(config.get(denoiser, {}), factor).items()),
        factor=factor,
        multiple=known.size_multiple(classes.get(denoiser, ""), config.get(denoiser, {}), factor),
        frame_step=known.frame_step(classes.get("vae", ""), vae),
        tiles=_tiles(classes.get("vae", ""), vae),
        dtype=_published(configs, denoiser),
        text_tokens=_text_tokens(config.get("tokenizer", {}), classes.get("tokenizer", "")),
        weights=tuple((weights or {}).items()),
    )
    _check_returns_frames(params, where, config.get(denoiser, {}))
    _check_options(params)
    return params


def _classes(name: str, where: str, index: Mapping[str, Any], options: Options) -> dict[str, str]:
    """Component -> class of all that the pipeline takes and the checkpoint, or an option, has."""
    takes = source.components(name, where)
    replaced = dict(options.components)
    for component in replaced:
        if component not in takes:
            raise ConfigError(
                f"model.options.components.{component}: {name} has no such component; it has {', '.join(takes)}"
            )
    found, missing = {}, []
    for component, optional in takes.items():
        listed = index.get(component)
        if component in replaced and not replaced[component].path:
            if not optional and component not in DROPPABLE:
                raise ConfigError(f"model.options.components.{component}: null, but {name} cannot do without it")
            continue
        cls = str(listed[1]) if isinstance(listed, (list, tuple)) and len(listed) == 2 and listed[1] else ""
        if cls:
            found[component] = cls
        elif not optional and component not in DROPPABLE:
            missing.append(component)
    if name.startswith("AnimateDiff") and found.get("unet") == "UNet2DConditionModel":
        found["unet"] = "UNetMotionModel"  # made of the image model and the motion adapter
    if missing:
        raise CheckpointError(
            f"model_index.json: {name} needs {', '.join(missing)}, which the checkpoint has not; "
            f"model.options.components.{missing[0]} would name a place that has it"
        )
    return found


def _scheduler(cls: str, config: Mapping[str, Any], options: Options) -> tuple[tuple[str, Any], ...]:
    """The options of the scheduler, those of `model.options` on top."""
    written = {name: value for name, value in options.scheduler if name != "class"}
    merged = {**{name: value for name, value in config.items() if not name.startswith("_")}, **written}
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(merged.items()))


def _scheduler_class(own: str, chosen: Any) -> str:
    allowed = samplers(own)
    if chosen not in allowed:
        raise ConfigError(
            f"model.options.scheduler.class: {chosen!r} cannot stand for {own}; allowed: {', '.join(allowed)}"
        )
    return str(chosen)


def samplers(own: str) -> tuple[str, ...]:
    """Scheduler classes that may stand for the checkpoint's own, which comes first: those that the library lists as
    compatible, or of the same beginning."""
    karras = source.members("KarrasDiffusionSchedulers")
    family = next((name for name in ("FlowMatch", "CogVideoX") if own.startswith(name)), None)
    if family:
        others = [name for name in source.names("Scheduler") if name.startswith(family)]
    else:
        others = list(karras) if own in karras else []
    return tuple(dict.fromkeys(name for name in (own, *others) if name))


def _tiles(cls: str, vae: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """The library's own VAE tiles (height, width, then strides) in pixels; None where the class does not tile, or cuts
    in a way that four numbers do not describe."""
    takes = {a.name for a in source.method(cls, "enable_tiling") or ()}
    fixed = source.constants(cls)
    sides = ("tile_sample_min_height", "tile_sample_min_width")
    strides = ("tile_sample_stride_height", "tile_sample_stride_width")
    if {*sides, *strides} <= takes:
        sizes = [size for name in (*sides, *strides) if isinstance(size := fixed.get(name), int)]
        return (sizes[0], sizes[1], sizes[2], sizes[3]) if len(sizes) == 4 else None
    if {"tile_overlap_factor_height", "tile_overlap_factor_width", *sides} <= takes and vae.get("sample_height"):
        height, width = int(vae["sample_height"]) // 2, int(vae["sample_width"]) // 2
        across = (fixed["tile_overlap_factor_height"] or 1 / 6, fixed["tile_overlap_factor_width"] or 1 / 5)
        return height, width, round(height * (1 - across[0])), round(width * (1 - across[1]))
    if {"use_tiling", "tile_sample_min_size", "tile_overlap_factor"} <= set(fixed):
        sample = vae.get("sample_size") or 32
        size = int(sample[0] if isinstance(sample, (list, tuple)) else sample)
        stride = round(size * (1 - fixed["tile_overlap_factor"]))
        return size, size, stride, stride
    return None


def _published(configs: Mapping[str, Mapping[str, Any]], denoiser: str) -> str:
    """The dtype of the whole pipeline where `model.dtype` is null: what vidgen.json or the denoiser's config says, else
    float32, as the library does. One for all components: most pipelines mix no dtypes."""
    own = configs.get(denoiser, {})
    dtype = configs.get("vidgen", {}).get("dtype") or own.get("dtype") or own.get("torch_dtype") or "float32"
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{denoiser}: dtype is {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
    return str(dtype)


def _text_tokens(tokenizer: Mapping[str, Any], cls: str) -> int | None:
    """Tokens that a CLIP text encoder takes; other encoders are told a length by the call."""
    limit = tokenizer.get("model_max_length")
    return int(limit) if cls.startswith("CLIPTokenizer") and isinstance(limit, int) and limit <= 1024 else None


def _check_returns_frames(params: Params, where: str, denoiser: Mapping[str, Any]) -> None:
    if params.argument("num_frames") is None and params.argument("video") is None:
        raise ConfigError(
            f"{where}: {params.pipeline} makes no video: its call takes neither a number of frames nor a video"
        )
    if params.pipeline.startswith("HunyuanVideo") and denoiser.get("image_condition_type") == "latent_concat":
        raise ConfigError(
            f"{where}: {params.pipeline} returns 4 frames fewer than it is asked for with this checkpoint "
            "(image_condition_type latent_concat); model.family: auto runs it natively"
        )


def _check_options(params: Params) -> None:
    options, cls = params.options, params.class_of("scheduler")
    takes = {a.name for a in source.initial(cls)}
    for name in (name for name, _ in options.scheduler):
        if takes and name not in takes and name != "class":
            raise ConfigError(
                f"model.options.scheduler.{name}: {cls} has no such option; it has {', '.join(sorted(takes))}"
            )
    for component, _ in options.dtypes:
        if component not in dict(params.classes):
            raise ConfigError(
                f"model.options.dtypes.{component}: {params.pipeline} has no such component; it has "
                f"{', '.join(dict(params.classes))}"
            )
    for name, given in options.enable:
        key = f"model.options.enable.{name}"
        _, accepted = switch(params, name)
        by_name = {a.name: a for a in accepted}
        for argument, value in given:
            if argument not in by_name:
                raise ConfigError(f"{key}.{argument}: no such argument; allowed: {', '.join(by_name) or 'none'}")
            kind = by_name[argument].kind
            if kind is not None and value is not None and not is_a(value, kind):
                raise ConfigError(f"{key}.{argument}: {value!r} has the wrong type; allowed: {kind.__name__}")
        if missing := [a.name for a in accepted if a.required and a.name not in dict(given)]:
            raise ConfigError(f"{key}: {missing[0]} is missing; its arguments: {', '.join(by_name)}")


def switch(params: Params, name: str) -> tuple[str, tuple[Argument, ...]]:
    """Whose method `enable_<name>` is (one of HOLDERS), and its arguments; ConfigError if nobody's."""
    for holder in HOLDERS:
        cls = params.pipeline if holder == "pipeline" else params.class_of(holder)
        found = source.method(cls, f"enable_{name}") if cls else None
        if found is not None:
            return holder, found
    raise ConfigError(
        f"model.options.enable.{name}: neither {params.pipeline} nor its denoiser or VAE has enable_{name}"
    )


def is_a(value: Any, kind: type) -> bool:
    """Whether a value may stand where `kind` is wanted: a whole number may stand for a float, a bool for no number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind
