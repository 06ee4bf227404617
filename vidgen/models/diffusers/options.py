"""`model.options`: what a diffusers pipeline is made with beside its checkpoint, read and checked at plan time.

    components    component -> a folder, hub id or URL with that component alone (a motion adapter, a ControlNet,
                  another VAE), or {path, revision, subfolder}; null: without it (a safety checker)
    scheduler     the scheduler's class and options where they differ from the checkpoint's
                  ({class: DDIMScheduler, beta_schedule: linear}); `sampling.sampler` may name another of its kind
    dtypes        component -> dtype, where one differs from the others ({vae: float32})
    enable        what `enable_...` of the pipeline, its denoiser or its VAE switches on, with its arguments
                  ({slicing: {}, forward_chunking: {chunk_size: 1, dim: 1}, free_init: {num_iters: 3}})
    quantization  how `engine.quantization` is done: {components: [transformer], and what bitsandbytes or torchao take
                  (bnb_4bit_quant_type: nf4; quant_type: Int8WeightOnlyConfig)}

Standard library only; refuses to know where components lie and what switches do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import ConfigError
from vidgen.specs.config import DTYPE_BYTES

KEYS = ("components", "scheduler", "dtypes", "enable", "quantization")
HAVE_KEYS = {
    "model_cpu_offload": "engine.offload: model",
    "sequential_cpu_offload": "engine.offload: sequential",
    "group_offload": "engine.offload",
    "vae_tiling": "engine.vae_tiling: on",
    "tiling": "engine.vae_tiling: on",
    "parallelism": "parallel.context",
    "gradient_checkpointing": "nothing: it is for training",
}
"""`enable_...` methods that are not reached here, and what stands for them."""
HOLDERS = ("pipeline", "unet", "transformer", "vae")
"""Whose `enable_...` methods are looked at, in this order."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component lies that is not the checkpoint's own; "" for nowhere: the pipeline does without."""

    path: str
    revision: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """`model.options`, checked in form; every mapping as sorted pairs."""

    components: tuple[tuple[str, Place], ...] = ()
    scheduler: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    enable: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    quantization: tuple[tuple[str, Any], ...] = ()

    def canonical(self) -> str:
        """All but the places of components, whose content is hashed instead, as JSON: what pixels depend on."""
        values = {name: getattr(self, name) for name in KEYS if name != "components" and getattr(self, name)}
        if without := [name for name, place in self.components if not place.path]:
            values["without"] = without
        return json.dumps(values, sort_keys=True, separators=(",", ":")) if values else ""


def read(given: Mapping[str, Any]) -> Options:
    """ConfigError names the key, what stands there and what may."""
    if unknown := sorted(set(given) - set(KEYS)):
        raise ConfigError(f"model.options.{unknown[0]}: unknown key; allowed: {', '.join(KEYS)}")
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"model.options.{name}: {value!r} is not a mapping")
    return Options(
        components=_pairs(given, "components", _place),
        scheduler=_pairs(given, "scheduler", lambda key, value: _hashable(value)),
        dtypes=_pairs(given, "dtypes", _dtype),
        enable=_pairs(given, "enable", _switch),
        quantization=_pairs(given, "quantization", lambda key, value: _hashable(value)),
    )


def _pairs(given: Mapping[str, Any], name: str, read_one: Any) -> tuple[tuple[str, Any], ...]:
    entries = given.get(name) or {}
    return tuple((str(key), read_one(f"model.options.{name}.{key}", entries[key])) for key in sorted(entries))


def _place(key: str, value: Any) -> Place:
    if value is None:
        return Place("")
    if isinstance(value, str) and value:
        return Place(value)
    names = ("path", "revision", "subfolder")
    if not isinstance(value, Mapping) or not value.get("path") or set(value) - set(names):
        raise ConfigError(f"{key}: {value!r}; allowed: a path, hub id or URL, or a mapping of {', '.join(names)}")
    for name, text in value.items():
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{key}.{name}: {text!r} is not text")
    return Place(**value)


def _dtype(key: str, value: Any) -> str:
    if value not in DTYPE_BYTES:
        raise ConfigError(f"{key}: {value!r} is not a dtype; allowed: {', '.join(DTYPE_BYTES)}")
    return str(value)


def _switch(key: str, value: Any) -> tuple[tuple[str, Any], ...]:
    name = key.rpartition(".")[2]
    if name in HAVE_KEYS:
        raise ConfigError(f"{key}: not here; use {HAVE_KEYS[name]}")
    if value is None or value is True:
        return ()
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: {value!r}; allowed: true, or a mapping of its arguments")
    return tuple((str(argument), _hashable(value[argument])) for argument in sorted(value))


def _hashable(value: Any) -> Any:
    """Lists as tuples, mappings as they are (a leaf of theirs is never compared)."""
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
