"""Which values a configuration may have: closed lists, ranges, what this version can do, columns and sweeps.

Knows the keys, not where they were written; refuses to know families, datasets and stores.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, time
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import fsspec

from vidgen.errors import ConfigError
from vidgen.parallel.layout import layout
from vidgen.redaction import carried
from vidgen.specs.gpus import GPUS
from vidgen.types import MEDIA_FIELDS

if TYPE_CHECKING:
    from vidgen.config import JobConfig

COLUMN_FIELDS = (
    "prompt",
    "negative_prompt",
    *MEDIA_FIELDS,
    "seed",
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "priority",
)
"""Request fields that `dataset.columns` may map, beside `params.*`."""


RELATIVE = "relative"
"""Of `dataset.media_schemes`: a path below the dataset's own folder, of whatever scheme that is."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "model.dtype": (None, "float32", "bfloat16", "float16"),
    "dataset.on_long_prompt": ("truncate", "reject"),
    "dataset.resize": ("exact", "cover", "contain"),
    "sweep.mode": ("product", "zip"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.vae_tiling": ("auto", "on", "off"),
    "output.format": ("mp4", "webm", "gif", "png"),
    "parallel.gpu": (None, *GPUS),
    "run.order": ("auto", "stratified", "longest", "input"),
}
"""Keys with a closed list of values."""

AVAILABLE: Mapping[str, tuple[Any, ...]] = {
    "model.pipeline": (None,),
    "model.options": ({},),
    "engine.offload": ("none", "model"),
    "engine.quantization": (None,),
    "engine.compile": ("auto", "off"),
    "engine.attention": ("auto",),
}
"""Keys that are part of the schema while only these of their values work in this version; another is refused."""

DIFFUSERS: Mapping[str, tuple[Any, ...] | None] = {
    "model.pipeline": None,
    "model.options": None,
    "engine.offload": ("none", "model", "sequential"),
    "engine.quantization": None,
    "engine.compile": ("auto", "on", "off"),
    "engine.attention": None,
}
"""What takes the place of AVAILABLE for `model.family: diffusers`; None: whatever the library knows."""

MESH_KEYS = ("context", "ulysses", "ring", "cfg")
SHAPE_KEYS = ("tokens_above", *MESH_KEYS, "replicas")
"""What an entry of `parallel.by_shape` says: how items of more tokens than that, up to the next entry's, are made. An
entry takes nothing from `parallel` itself, which is for the items below all of them."""
ANY_HEADS = 10**9

LEAST: Mapping[str, float] = {
    "dataset.limit": 1,
    "dataset.samples_per_row": 1,
    "dataset.max_rejected": 0,
    "sampling.height": 1,
    "sampling.width": 1,
    "sampling.num_frames": 1,
    "sampling.num_inference_steps": 1,
    "sampling.guidance_scale": 0,
    "parallel.replicas": 1,
    "engine.threads": 1,
    "engine.batch_tokens": 1,
    "output.crf": 0,
    "run.max_attempts": 1,
    "run.breaker_failures": 1,
    "run.max_gpu_hours": 0,
    "run.lease": 45,
    "run.hang_seconds": 1,
    "run.save_after": 0,
    "run.save_every": 0,
    "run.price_per_gpu_hour": 0,
}
"""Smallest allowed value of a number."""


def clock_or_moment(text: str) -> time | datetime:
    """What `run.deadline` says: a time of day (HH:MM), or a moment (ISO 8601); ConfigError for anything else."""
    try:
        return time.fromisoformat(text) if len(text) <= 5 else datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"run.deadline: {text!r} is neither HH:MM nor an ISO 8601 time (2026-05-01T06:00)") from None


def value_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    """(key, sentence) for each value out of its range or list."""
    for key in ("dataset.path", "output.path"):
        if not _value(config, key):
            yield key, f"{key}: required; a path or any fsspec URL"
    for key, allowed in CHOICES.items():
        if (value := _value(config, key)) not in allowed:
            yield key, f"{key}: {show(value)} is not allowed; allowed: {', '.join(map(show, allowed))}"
    with_diffusers = DIFFUSERS if config.model.family == "diffusers" else {}
    for key, usual in AVAILABLE.items():
        possible = with_diffusers.get(key, usual)
        if possible is not None and (value := _value(config, key)) not in possible:
            more = "; model.family: diffusers takes more" if key in DIFFUSERS and not with_diffusers else ""
            yield key, f"{key}: {show(value)} is not available in this version; allowed: {_listed(possible)}{more}"
    for key in ("parallel.replicas", "engine.threads", "engine.batch_tokens"):
        if isinstance(value := _value(config, key), str) and value != "auto":
            yield key, f"{key}: {show(value)} is not allowed; allowed: auto, or a whole number from 1"
    for key, least in LEAST.items():
        value = _value(config, key)
        if isinstance(value, (int, float)) and not value >= least:
            yield key, f"{key}: {show(value)} is too small; allowed: {least:g} or more"
    if config.sampling.fps is not None and not config.sampling.fps > 0:
        yield "sampling.fps", f"sampling.fps: {config.sampling.fps:g} is too small; allowed: more than 0"
    if config.run.deadline is not None:
        try:
            clock_or_moment(config.run.deadline)
        except ConfigError as error:
            yield "run.deadline", str(error)
    yield from _foreign_mistakes(asdict(config), "")
    yield from _credential_mistakes(config)
    yield from _parallel_mistakes(config)
    yield from _lora_mistakes(config)
    yield from _scheme_mistakes(config)
    yield from _column_mistakes(config)
    yield from _sweep_mistakes(config)


def _parallel_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Meshes that no model can have, and entries of `by_shape` that are not such as SHAPE_KEYS, rising."""
    base = {name: _value(config, f"parallel.{name}") for name in (*MESH_KEYS, "degree")}
    if base["degree"] == "auto":
        yield from _auto_mistakes(config)
        base["degree"] = None
    if mistake := _mesh_mistake(base):
        yield mistake.partition(":")[0], mistake
    elif config.model.family == "diffusers" and (wide := [name for name in base if (base[name] or 1) > 1]):
        key = f"parallel.{wide[0]}"
        yield key, f"{key}: {base[wide[0]]} is not available for model.family: diffusers; allowed: null, 1"
    above = -1
    for index, entry in enumerate(config.parallel.by_shape):
        key, allowed = f"parallel.by_shape[{index}]", f"its keys: {', '.join(SHAPE_KEYS)}"
        if not isinstance(entry, Mapping):
            yield "parallel.by_shape", f"{key}: {show(entry)} is not a mapping; {allowed}"
            continue
        if unknown := sorted(map(str, set(entry) - set(SHAPE_KEYS))):
            yield "parallel.by_shape", f"{key}.{unknown[0]}: unknown key; {allowed}"
        tokens, replicas = entry.get("tokens_above"), entry.get("replicas")
        if type(tokens) is not int or tokens <= above:
            least = f"more than {above} of the entry before" if above >= 0 else "0 or more"
            yield "parallel.by_shape", f"{key}.tokens_above: {show(tokens)}; allowed: a whole number, {least}"
        else:
            above = tokens
        if replicas not in (None, "auto") and (type(replicas) is not int or replicas < 1):
            yield "parallel.by_shape", f"{key}.replicas: {show(replicas)}; allowed: auto, or a whole number from 1"
        if not any(entry.get(name) for name in MESH_KEYS):
            yield "parallel.by_shape", f"{key}: says nothing of its replicas; one at least of {', '.join(MESH_KEYS)}"
        elif mistake := _mesh_mistake(entry):
            yield "parallel.by_shape", mistake.replace("parallel.", f"{key}.")
        elif config.model.family == "diffusers":
            yield "parallel.by_shape", f"{key}: model.family: diffusers runs on one GPU; allowed: []"


def _auto_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    """`degree: auto` is chosen from what is known of a GPU, and leaves nothing else of the mesh to say but `cfg`."""
    key, parallel = "parallel.degree", config.parallel
    if config.model.family == "diffusers":
        yield key, f"{key}: auto is not available for model.family: diffusers; allowed: null, 1"
    if parallel.gpu is None:
        yield key, f"{key}: auto needs parallel.gpu, the GPU to choose for; allowed there: {_listed([*GPUS])}"
    said = [name for name in ("context", "ulysses", "ring") if _value(config, f"parallel.{name}") is not None]
    said += ["by_shape"] if parallel.by_shape else []
    said += ["replicas"] if parallel.replicas != "auto" else []
    if said:
        listed = " and ".join(f"parallel.{name}" for name in said)
        yield key, f"{key}: auto chooses {listed} itself; leave them out, or give no degree"


def _mesh_mistake(mesh: Mapping[str, Any]) -> str:
    """What is wrong with a mesh for a model of any number of heads, "" if nothing is."""
    try:
        layout(mesh, ANY_HEADS)
    except ConfigError as error:
        return str(error)
    return ""


def _foreign_mistakes(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """What JSON would not give back as it is, at any depth: a frozen configuration is compared with the written one."""
    room = ".".join(key.partition("[")[0].split(".")[:2])
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(name, str):
                yield from _foreign_mistakes(inner, f"{key}.{name}" if key else name)
            else:
                yield room, f"{key}: the key {show(name)} is not text"
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _foreign_mistakes(inner, f"{key}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield room, f"{key}: {show(value)} is not a finite number"
    elif value is not None and not isinstance(value, (str, int, float)):
        yield room, f"{key}: {show(value)} ({type(value).__name__}) is not text, a number, true, false or null"


def _credential_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Places that carry credentials."""
    places = {f"model.loras[{index}].path": entry.get("path") for index, entry in _mappings(config.model.loras)}
    for key in ("dataset.path", "model.checkpoint", "output.path"):
        places[key] = _value(config, key)
    for key, place in places.items():
        if isinstance(place, str) and (why := carried(place)) is not None:
            yield key.partition("[")[0], f"{key}: {why}"


def _mappings(entries: Sequence[Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return ((index, entry) for index, entry in enumerate(entries) if isinstance(entry, Mapping))


def _lora_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    for index, entry in enumerate(config.model.loras):
        key = f"model.loras[{index}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
            yield "model.loras", f"{key}: {show(entry)} is not a mapping with a path; its keys: path, weight, component"
            continue
        if unknown := sorted(set(entry) - {"path", "weight", "component"}):
            yield "model.loras", f"{key}.{unknown[0]}: unknown key; its keys: path, weight, component"
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            yield "model.loras", f"{key}.weight: {show(weight)} is not a finite number"
        component = entry.get("component")
        if component is not None and not isinstance(component, str):
            yield "model.loras", f"{key}.component: {show(component)} is not the name of a component, nor null"


def _scheme_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    for scheme in config.dataset.media_schemes or []:
        if scheme not in (known := [RELATIVE, *fsspec.available_protocols()]):
            key = "dataset.media_schemes"
            yield key, f"{key}: {show(scheme)} is not a scheme that can be opened{nearest(str(scheme), known)}"


def _column_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    columns = config.dataset.columns
    for name, column in columns.items():
        key = f"dataset.columns.{name}"
        if name not in COLUMN_FIELDS and not (name.startswith("params.") and len(name) > len("params.")):
            yield key, f"{key}: unknown request field{nearest(name, [*COLUMN_FIELDS, 'params.<name>'])}"
        elif not isinstance(column, str) or not column:
            yield key, f"{key}: {show(column)} is not the name of a column"
    if "prompt" not in columns:
        yield "dataset.columns", "dataset.columns: prompt is required"


def _sweep_mistakes(config: JobConfig) -> Iterator[tuple[str, str]]:
    over = config.sweep.over
    allowed = [name for name in field_names(type(config.sampling)) if name not in ("seed", "params")]
    for name, values in over.items():
        key = f"sweep.over.{name}"
        if name not in allowed and not name.startswith("params."):
            yield key, f"{key}: not a sampling field that can be swept{nearest(name, [*allowed, 'params.<name>'])}"
        elif not isinstance(values, list) or not values:
            yield key, f"{key}: {show(values)} is not a list of one value or more"
        elif not name.startswith("params."):
            hint = get_type_hints(type(config.sampling))[name]
            for value in values:
                if not fits(value, hint) or value is None:
                    yield key, f"{key}: {show(value)} has the wrong type; allowed: {type_name(hint)}"
    lengths = {name: len(values) for name, values in over.items() if isinstance(values, list)}
    if config.sweep.mode == "zip" and len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        yield "sweep.over", f"sweep.over: mode zip needs lists of one length; here: {listed}"


def _value(config: JobConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def field_names(cls: Any) -> list[str]:
    return [f.name for f in fields(cls)]


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or the whole list when nothing is near. A dotted key is near by its last name too."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close:
        last = {key.rpartition(".")[2]: key for key in known}
        close = [last[match] for match in difflib.get_close_matches(name, list(last), n=3, cutoff=0.7)]
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; known: {', '.join(sorted(known))}"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty mapping has none."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and "${" in value:  # resolved later, checked by OmegaConf
        return True
    for member in members(hint):
        origin, inner = get_origin(member) or member, get_args(member)
        if member is Any or (member is type(None) and value is None):
            return True
        if origin is list and isinstance(value, list) and all(fits(v, inner[0]) for v in value):
            return True
        if origin is dict and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return True
        if member is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        if isinstance(member, type) and type(value) is member:
            return True
    return False


def members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    names = {type(None): "null", str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    parts = []
    for member in members(hint):
        if (origin := get_origin(member)) is list:
            parts.append(f"a list of {type_name(get_args(member)[0])}")
        elif origin is dict:
            parts.append("a mapping")
        else:
            parts.append(names.get(member, str(member)))
    return ", ".join(parts)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(show, values))


def show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
