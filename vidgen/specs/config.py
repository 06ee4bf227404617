"""Reading the config.json files of a checkpoint: what is missing, unknown or not supported is named. No torch.

Refuses to know any family: the families' `params.py` say what they take.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vidgen.errors import CheckpointError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def file_of(component: str) -> str:
    """The file that holds a component's configuration, as messages name it."""
    own = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json", "vidgen": "vidgen.json"}
    return own.get(component, f"{component}/config.json")


def require(configs: Mapping[str, Any], components: Collection[str], family: str) -> None:
    """CheckpointError if model_index.json or a component's file is not there."""
    for name in ("model_index", *components):
        if name not in configs:
            raise CheckpointError(f"{file_of(name)} is missing; {family} needs {', '.join(components)}")


def take(config: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of an option that has no default; CheckpointError if it is missing or null."""
    if config.get(name) is None:
        raise CheckpointError(f"{where}: {name} is missing")
    return config[name]


def one_of(config: Mapping[str, Any], name: str, allowed: Sequence[Any], where: str, default: Any = None) -> Any:
    """The value of an option (`default` where it is missing); CheckpointError if it is none of `allowed`."""
    value = config.get(name, default)
    if value not in allowed:
        raise CheckpointError(f"{where}: {name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return value


def refuse(config: Mapping[str, Any], names: Collection[str], where: str, what: str) -> None:
    """CheckpointError if one of these options is switched on; `what` says what it is for."""
    for name in names:
        if config.get(name):
            raise CheckpointError(f"{where}: {name} is {config[name]!r} ({what}), which is not supported")


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """An option that is switched on and that we have never heard of may change pixels: CheckpointError."""
    for name, value in config.items():
        if value and not name.startswith("_") and name not in known:
            raise CheckpointError(f"{where}: {name} is {value!r}, which is not known; it may change pixels")


def check_classes(index: Mapping[str, Any], expected: Mapping[str, tuple[str, ...]]) -> None:
    """CheckpointError if model_index.json names another class for a component than one of these."""
    for name, classes in expected.items():
        found = [part for part in list(index.get(name) or ())[-1:] if part]
        if found and found[0] not in classes:
            raise CheckpointError(
                f"{file_of('model_index')}: component {name} is {found[0]}; allowed: {', '.join(classes)}"
            )


def has_component(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json lists the component (an absent one may stand there as [null, null])."""
    return any(index.get(name) or ())


def published(
    configs: Mapping[str, Mapping[str, Any]], components: Collection[str], default: str = "float32"
) -> tuple[tuple[str, str], ...]:
    """The published dtype of each component with weights: what vidgen.json says for all, else what the component's own
    config names, else the one it is stored in, else `default`."""
    own, stored = configs.get("vidgen", {}).get("dtype"), configs.get("stored", {})
    named = []
    for component in components:
        config = configs.get(component, {})
        dtype = own or config.get("dtype") or config.get("torch_dtype") or stored.get(component) or default
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{component}: dtype is {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
        named.append((component, str(dtype)))
    return tuple(named)


def recipe(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a checkpoint's vidgen.json puts in place of the family's `defaults`, checked by name and type."""
    allowed = {**{name: type(value) for name, value in defaults.items()}, "sampler": str, "shift": float}
    for name, value in given.items():
        if name not in allowed:
            raise CheckpointError(f"vidgen.json: defaults.{name} is unknown; allowed: {', '.join(sorted(allowed))}")
        kinds = (int, float) if allowed[name] is float else allowed[name]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise CheckpointError(f"vidgen.json: defaults.{name} is {value!r}; it must be {allowed[name].__name__}")
    return tuple(sorted(given.items()))
