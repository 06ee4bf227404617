"""The schema of a job: every key there is, its type and default, and what can be checked without data.

A YAML file and `key=value` overrides become a `JobConfig`; a mistake is a ConfigError that names the key, where it was
written and what is allowed. Relative paths (`dataset.path`, `output.path`, `model.checkpoint`, `model.cache_dir`) are
relative to the current directory, wherever the YAML lies, so a configuration of the repository is run from its root.
Refuses to know families, datasets and stores: what depends on them is checked by `vidgen.plan`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import fsspec
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vidgen.config_rules import field_names, fits, leaves, members, nearest, show, type_name, value_mistakes
from vidgen.errors import ConfigError
from vidgen.redaction import shown
from vidgen.types import Lora

BAD_YAML = (
    *(yaml.YAMLError, OmegaConfBaseException, RecursionError, OverflowError),
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError),
)
"""What reading YAML raises: PyYAML lets through what `int`, `float` and dates make of a value that is none."""
MOST_NODES = 10_000
"""Values of one file: a few lines of aliases of aliases can mean billions."""


@dataclass
class ModelConfig:
    family: str = "auto"
    task: str = "t2v"
    checkpoint: str = "demo"
    revision: str | None = None
    dtype: str | None = None
    loras: list[Any] = field(default_factory=list)
    pipeline: str | None = None
    """A class of the diffusers library, for family diffusers; null: the one that model_index.json names."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else a diffusers pipeline is made with: components, scheduler, dtypes, enable, quantization."""
    cache_dir: str | None = None


@dataclass
class DatasetConfig:
    path: str = ""
    columns: dict[str, Any] = field(default_factory=lambda: {"prompt": "prompt"})
    id_column: str | None = None
    where: str | None = None
    limit: int | None = None
    samples_per_row: int = 1
    carry: list[str] | None = None
    on_long_prompt: str = "truncate"
    resize: str = "exact"
    media_schemes: list[str] | None = None
    max_rejected: int | None = None


@dataclass
class SamplingConfig:
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    sampler: str | None = None
    shift: float | None = None
    sigmas: list[float] | None = None
    timesteps: list[float] | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepConfig:
    over: dict[str, Any] = field(default_factory=dict)
    mode: str = "product"


@dataclass
class ParallelConfig:
    replicas: int | str = "auto"
    degree: int | str | None = None
    context: int | None = None
    ulysses: int | None = None
    ring: int | None = None
    cfg: int = 1
    by_shape: list[Any] = field(default_factory=list)
    gpu: str | None = None


@dataclass
class EngineConfig:
    device: str = "auto"
    threads: int | str = "auto"
    offload: str = "none"
    quantization: str | None = None
    vae_tiling: bool | str = "auto"
    compile: bool | str = "auto"
    attention: str = "auto"
    batch_tokens: int | str = "auto"


@dataclass
class OutputConfig:
    path: str = ""
    format: str = "mp4"
    codec: str | None = None
    """null: the format's own (libx264 for mp4)."""
    crf: int = 18


@dataclass
class RunConfig:
    max_attempts: int = 3
    breaker_failures: int = 50
    max_gpu_hours: float | None = None
    deadline: str | None = None
    order: str = "auto"
    """Within a priority: stratified, longest or input; auto: stratified where a budget or a deadline is set, else
    longest."""
    lease: float = 60
    hang_seconds: float | None = None
    save_after: float = 300
    """Seconds: an item predicted to denoise for longer is saved when its replica must leave it."""
    save_every: float | None = None
    """Seconds between saves of such an item while nothing asks for it; null: none."""
    single_writer: bool = False
    allow_constant: bool = False
    price_per_gpu_hour: float | None = None


@dataclass
class JobConfig:
    """One job as written: null where the family's default is wanted. `vidgen.plan` resolves the nulls."""

    name: str = "vidgen"
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load(path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads a YAML file (any fsspec URL), applies `key=value` overrides in order, checks what needs no data.

    Raises ConfigError naming the key, the file or override it stands in, and what is allowed.
    """
    layers = [(_read_yaml(path), path)]
    for override in overrides:
        layers.append((_parse_override(override), f"override {shown(override)!r}"))
    return _build(layers)


def from_dict(values: Mapping[str, Any], source: str = "frozen config", overrides: Sequence[str] = ()) -> JobConfig:
    """The inverse of `to_dict`, `key=value` overrides on top; raises ConfigError on an unknown key or a wrong type."""
    layers = [(dict(values), source)]
    return _build([*layers, *((_parse_override(override), f"override {shown(override)!r}") for override in overrides)])


def to_dict(config: JobConfig) -> dict[str, Any]:
    """Plain, JSON-ready dictionaries of every key, nulls included."""
    return asdict(config)


def loras(config: JobConfig) -> tuple[Lora, ...]:
    """The adapters of `model.loras`, in their order; what is here is named absolutely, for replicas elsewhere."""
    return tuple(
        Lora(
            str(Path(entry["path"]).absolute()) if os.path.exists(entry["path"]) else entry["path"],
            float(entry.get("weight", 1.0)),
            entry.get("component"),
        )
        for entry in config.model.loras
    )


def model_options(config: JobConfig) -> tuple[tuple[str, Any], ...]:
    """`model.options` sorted by name; folders that are here are named absolutely, for replicas elsewhere."""
    found = dict(config.model.options)
    if isinstance(components := found.get("components"), Mapping):
        found["components"] = {name: _absolute(place) for name, place in components.items()}
    return tuple(sorted(found.items()))


def _absolute(place: Any) -> Any:
    if isinstance(place, Mapping):
        return {**place, "path": _absolute(place.get("path"))}
    return str(Path(place).absolute()) if isinstance(place, str) and place and os.path.exists(place) else place


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"params": {"strength": x}}` and `{"params.strength": x}` both as the latter."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key == "params" and isinstance(value, Mapping):
            result.update({f"params.{name}": inner for name, inner in value.items()})
        else:
            result[key] = value
    return result


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            text = file.read()
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: a folder; a configuration is a YAML file") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is nothing of that name; a configuration is a YAML file") from error
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{path}: the configuration cannot be read: {error}") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if _nodes(root, {}) > MOST_NODES:
            raise ConfigError(f"{path}: its aliases make more than {MOST_NODES:,} values of it")
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: a configuration is a mapping of keys ({', '.join(field_names(JobConfig))})")
        loaded = OmegaConf.create(text if root is not None else {})
    except ConfigError:
        raise
    except BAD_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {_said(error)}") from error
    return cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))


def _nodes(node: Any, known: dict[int, int]) -> int:
    """Values that a YAML node stands for once its aliases are written out; RecursionError if it holds itself."""
    if id(node) not in known:
        inside = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
        below = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in below)
    return known[id(node)]


def _said(error: Exception) -> str:
    return "it is nested too deep, or holds itself" if isinstance(error, RecursionError) else str(error)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {shown(override)!r}: write it as key=value, for example sampling.height=480")
    value: Any
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except BAD_YAML:
        value = text
    if not isinstance(value, str) and value is not None and _takes_only_text(path):
        value = text
    for name in reversed(path):
        value = {name: value}
    return cast(dict[str, Any], value)


def _takes_only_text(path: Sequence[str]) -> bool:
    """True where the schema has a str (or str | None): `name=2024` is then text, not a number."""
    cls: Any = JobConfig
    for name in path:
        if not is_dataclass(cls) or name not in field_names(cls):
            return False
        cls = get_type_hints(cls)[name]
    return set(members(cls)) <= {str, type(None)}


@cache
def _schema() -> DictConfig:
    """The schema as OmegaConf has it, made once: a merge leaves it as it is."""
    return OmegaConf.structured(JobConfig)


def _build(layers: Sequence[tuple[dict[str, Any], str]]) -> JobConfig:
    sources: dict[str, str] = {}
    mistakes: list[str] = []
    merged: Any = _schema()
    for values, source in layers:
        mistakes += _shape_mistakes(JobConfig, values, "", source)
        sources.update({key: source for key, _ in leaves(values)})
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    try:
        for values, source in layers:
            last = source
            merged = OmegaConf.merge(merged, OmegaConf.create(values))
        last = layers[-1][1]
        config = cast(JobConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{last}: {(_said(error).splitlines() or [type(error).__name__])[0]}") from error
    config.dataset.columns = flat(config.dataset.columns)
    config.sweep.over = flat(config.sweep.over)
    for key in ("vae_tiling", "compile"):  # YAML reads a bare on/off as a boolean
        value = getattr(config.engine, key)
        setattr(config.engine, key, {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value)
    mistakes = [f"{text}{_where(key, sources)}" for key, text in value_mistakes(config)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def _where(key: str, sources: Mapping[str, str]) -> str:
    for name in (key, *(k for k in sources if k.startswith(f"{key}."))):
        if name in sources:
            return f" (in {sources[name]})"
    return ""


def _shape_mistakes(cls: Any, values: Mapping[str, Any], prefix: str, source: str) -> list[str]:
    """Unknown keys and wrong types of one layer."""
    hints = get_type_hints(cls)
    found = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            near = nearest(str(name), list(hints))
            if not prefix and "known:" in near:  # perhaps a key of a room, written without it
                inner = nearest(key, [k for k, _ in leaves(asdict(JobConfig()))])
                near = near if "known:" in inner else inner
            found.append(f"{key}: unknown key in {source}{near}")
        elif is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                found += _shape_mistakes(hints[name], value, f"{key}.", source)
            else:
                allowed = ", ".join(field_names(hints[name]))
                found.append(f"{key}: {show(value)} in {source} is not a mapping; its keys: {allowed}")
        elif not fits(value, hints[name]):
            quoted = "; text that looks like a number or a time goes in quotes" if fits(str(value), hints[name]) else ""
            found.append(
                f"{key}: {show(value)} ({type(value).__name__}) in {source} has the wrong type; "
                f"allowed: {type_name(hints[name])}{quoted}"
            )
    return found
