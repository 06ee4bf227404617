"""A pipeline from its parts: the library's class, the checkpoint's components, those from elsewhere, and how they run.

Refuses to know requests.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from torch import nn

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import dtype_named
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.diffusers import source
from vidgen.models.diffusers.binding import Binding
from vidgen.models.diffusers.known import ALWAYS_TILED
from vidgen.models.diffusers.lora import fuse
from vidgen.models.diffusers.params import Params, switch
from vidgen.text.configs import no_questions
from vidgen.types import ModelSettings

OFFLOAD = ("none", "model", "sequential")
DENOISERS = ("transformer", "transformer_2", "unet")
QUANTIZERS = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "torchao": "torchao"}
"""`engine.quantization` -> the package that does it."""


def assemble(folder: CheckpointFolder, bound: Binding, settings: ModelSettings, device: torch.device) -> Any:
    """The pipeline, ready to be called on `device`. `folder` is local. ConfigError and CheckpointError name the key."""
    check(settings, device)
    assert folder.local is not None and settings.cache_dir is not None
    params = bound.params
    dtypes = _dtypes(params, settings.dtype)
    made: dict[str, Any] = {}
    for part in bound.parts:
        cls = getattr(diffusers, str(part.config["_class_name"]), None)
        if cls is None:
            raise CheckpointError(
                f"model.options.components.{part.name}: {part.config['_class_name']} is not in diffusers"
            )
        dtype = dtypes.get(part.name, dtypes["default"])
        place = part.place(settings.cache_dir)
        with no_questions():
            made[part.name] = cls.from_pretrained(place, torch_dtype=dtype, use_safetensors=True)
    takes = source.components(params.pipeline, "model.pipeline")
    absent = {name: None for name, optional in takes.items() if not optional and not params.class_of(name)}
    if quantizer := _quantizer(params, settings.quantization, dtypes["default"]):
        made["quantization_config"] = quantizer
    try:
        with no_questions():
            pipe = pipeline_class(params.pipeline).from_pretrained(
                str(folder.local), torch_dtype=dtypes, use_safetensors=True, local_files_only=True, **made, **absent
            )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"{folder.resolved.name}: {params.pipeline} cannot be made of it: {error}") from error
    fuse(pipe, folder.adapters)
    _mend_text_encoders(pipe)
    _switch_on(pipe, params)
    _accelerate(pipe, settings)
    _place(pipe, settings.offload, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_class(name: str) -> Any:
    """One of ours (`recipes/`), else the library's."""
    path = source.own_file(name)
    if path is not None:
        return getattr(importlib.import_module(f"vidgen.models.diffusers.recipes.{path.stem}"), name)
    found = getattr(diffusers, name, None)
    if found is None:
        raise ConfigError(f"model.pipeline: diffusers {diffusers.__version__} does not offer {name}")
    return found


def check(settings: ModelSettings, device: torch.device) -> None:
    """ConfigError for an engine option that cannot be honoured here."""
    if settings.offload not in OFFLOAD:
        raise ConfigError(f"engine.offload: {settings.offload!r} is not supported; allowed: {', '.join(OFFLOAD)}")
    if settings.offload != "none" and device.type != "cuda":
        raise ConfigError(f"engine.offload: {settings.offload!r} needs a GPU; on {device.type} allowed: none")
    if settings.compile not in ("auto", "on", "off"):
        raise ConfigError(f"engine.compile: {settings.compile!r} is not supported; allowed: auto, on, off")


def tile(vae: Any, tiling: tuple[int, int, int, int] | None) -> None:
    """Sets a VAE's tiles (height, width, then strides, in pixels), or lets it work whole."""
    if type(vae).__name__ in ALWAYS_TILED:
        vae.enable_tiling()
        return
    if tiling is None:
        if getattr(vae, "use_tiling", False):
            vae.disable_tiling()
        return
    height, width, down, across = tiling
    takes = {a.name for a in source.method(type(vae).__name__, "enable_tiling") or ()}
    sizes: dict[str, Any] = {"tile_sample_min_height": height, "tile_sample_min_width": width}
    if "tile_sample_stride_height" in takes:
        vae.enable_tiling(**sizes, tile_sample_stride_height=down, tile_sample_stride_width=across)
    elif "tile_overlap_factor_height" in takes:
        overlaps = {"tile_overlap_factor_height": 1 - down / height, "tile_overlap_factor_width": 1 - across / width}
        vae.enable_tiling(**sizes, **overlaps)
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size = height
        vae.tile_latent_min_size = height // 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_overlap_factor = 1 - down / height


def _dtypes(params: Params, dtype: str | None) -> dict[str, torch.dtype]:
    named = {"default": dtype or params.dtype, **dict(params.options.dtypes)}
    return {component: dtype_named(name) for component, name in named.items()}


def _quantizer(params: Params, backend: str | None, dtype: torch.dtype) -> Any:
    """The library's own configuration for `engine.quantization`; None where nothing is quantized."""
    given = dict(params.options.quantization)
    key = "model.options.quantization"
    if backend is None:
        if given:
            raise ConfigError(f"{key}: engine.quantization is null; allowed there: {', '.join(QUANTIZERS)}")
        return None
    package = QUANTIZERS.get(backend)
    if package is None:
        raise ConfigError(f"engine.quantization: {backend!r} is not supported; allowed: null, {', '.join(QUANTIZERS)}")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"engine.quantization: {backend} needs the package {package}, which is not installed")
    wanted = given.pop("components", (params.denoiser,))
    components = [wanted] if isinstance(wanted, str) else list(wanted)
    if unknown := [name for name in components if not params.class_of(name)]:
        raise ConfigError(f"{key}.components: {params.pipeline} has no {unknown[0]}")
    try:
        mapping = {name: _quantized(params.class_of(name), backend, given, dtype) for name in components}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{key}: {error}") from error
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _quantized(cls: str, backend: str, given: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """How one component is quantized, in the words of the library its class is of."""
    library: Any = diffusers if source.exists(cls) else importlib.import_module("transformers")
    values = {k: dtype_named(v) if k.endswith("_dtype") and isinstance(v, str) else v for k, v in given.items()}
    if backend == "torchao":
        kinds = importlib.import_module("torchao.quantization")
        return library.TorchAoConfig(getattr(kinds, str(values.pop("quant_type", "Int8WeightOnlyConfig")))(**values))
    if backend == "bitsandbytes_8bit":
        return library.BitsAndBytesConfig(load_in_8bit=True, **values)
    return library.BitsAndBytesConfig(**{"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, **values})


def _mend_text_encoders(pipe: Any) -> None:
    """Pipelines reach for `text_encoder.text_model` when they skip layers; transformers 5 made the two one. As an
    attribute outside of torch's registry, so that no weight is seen twice."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        bare = isinstance(encoder, nn.Module) and not hasattr(encoder, "text_model")
        if bare and hasattr(encoder, "final_layer_norm"):
            object.__setattr__(encoder, "text_model", encoder)


def _switch_on(pipe: Any, params: Params) -> None:
    for name, given in params.options.enable:
        holder, _ = switch(params, name)
        owner = pipe if holder == "pipeline" else getattr(pipe, holder)
        arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in given}
        try:
            getattr(owner, f"enable_{name}")(**arguments)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise ConfigError(f"model.options.enable.{name}: {error}") from error


def _accelerate(pipe: Any, settings: ModelSettings) -> None:
    networks: list[Any] = [n for name in DENOISERS if isinstance(n := getattr(pipe, name, None), nn.Module)]
    if settings.attention != "auto":
        backend = "native" if settings.attention == "sdpa" else settings.attention
        for network in networks:
            try:
                network.set_attention_backend(backend)
            except (ValueError, RuntimeError, ImportError, AttributeError, NotImplementedError) as error:
                raise ConfigError(f"engine.attention: {settings.attention!r} cannot be used: {error}") from error
    if settings.compile == "on":
        for network in networks:
            if getattr(network, "_repeated_blocks", None):
                network.compile_repeated_blocks()
            else:
                network.compile()


def _place(pipe: Any, offload: str, device: torch.device) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def scheduler(config: Mapping[str, Any], cls: str, shift_name: str | None, shift: float | None) -> Any:
    """A fresh scheduler of class `cls` from another's config; `shift` under its own name where it has one."""
    changed = {shift_name: shift} if shift_name is not None and shift is not None else {}
    return getattr(diffusers, cls).from_config({k: v for k, v in config.items() if k != "_class_name"}, **changed)
