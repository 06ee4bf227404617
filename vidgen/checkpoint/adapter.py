"""LoRA adapters: where one lies, what its keys mean, and which tensors of a checkpoint it changes. No torch.

Understands the keys of PEFT and diffusers (`lora_A`, `lora_B`), of kohya (`lora_unet_..`, `lora_down`, `lora_up`,
`alpha`), and full differences (`diff`, `diff_b`); a family's `adapters.py` translates other people's module names. An
adapter fits wholly or not at all: a key that no tensor of the checkpoint answers to is an error that names it. Refuses
to know how numbers are added: `vidgen.checkpoint.load` fuses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.checkpoint.digest import block_digest
from vidgen.errors import CheckpointError

Rename = Callable[[str], "str | tuple[str, ...] | None"]
"""An adapter's module path -> the module's name in the checkpoint, several that its rows are divided among, or None."""

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
SUFFIXES: Mapping[str, str] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
PREFIXES: Mapping[str, str] = {
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "transformer",
    "model.diffusion_model.": "transformer",
    "base_model.model.": "transformer",
    "lora_unet_": "transformer",
    "lora_transformer_": "transformer",
}
"""What an adapter's key begins with, and the component that means."""
SHOWN = 5
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_REPETITIONS = 1
"""Of one pattern of `alpha_pattern`."""
HEADER_BYTES = 100_000_000
"""Most of a safetensors file's header, as the library itself has it."""
HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+))?")


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter adds to one tensor. A low-rank one is scale x up @ down, a full one scale x full; `alpha` names
    the tensor that replaces the rank in the scale; `rows` are those of the product that belong to this tensor."""

    adapter: int
    scale: float
    down: str = ""
    up: str = ""
    full: str = ""
    alpha: str = ""
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Adapter:
    """One safetensors file of low-rank or full differences. `shapes` are those of its tensors, `component` the one it
    is for where its keys do not say, `scaling` alpha and rank of the file's own metadata by key pattern."""

    path: str
    weight: float
    component: str | None
    fs: Any = field(repr=False)
    place: str = field(repr=False)
    size: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    scaling: Mapping[str, Mapping[str, Any]] = field(repr=False)


def open_adapter(path: str, weight: float = 1.0, component: str | None = None) -> Adapter:
    """A file, a folder with one, `org/name` or `org/name/file.safetensors` on the hub, or any fsspec URL of these.

    CheckpointError says what was looked for and where.
    """
    fs, place = _find(path)
    try:
        size = int(fs.size(place))
        length = int.from_bytes(fs.cat_file(place, start=0, end=8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("its header is longer than the file")
        if length > HEADER_BYTES:
            raise ValueError(f"its header would have {length:,} bytes; allowed: at most {HEADER_BYTES:,}")
        tensors, metadata = parse_header(fs.cat_file(place, start=8, end=8 + length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.loras: {path} is not a safetensors file: {error}{_pickled(path)}") from error
    shapes = {key: shape for key, (_, shape) in tensors.items()}
    if not shapes:
        raise CheckpointError(f"model.loras: {path} holds no tensors")
    try:
        scaling = _scaling(fs, place, metadata)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"model.loras: {path}: its lora_alpha cannot be read: {error}") from error
    return Adapter(path, weight, component, fs, place, size, shapes, scaling)


def parse_header(data: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """(name -> dtype and shape, metadata) of a safetensors header; ValueError if it is none."""
    try:
        header = json.loads(data)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        tensors = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its header is not that of tensors") from error
    for key, (dtype, shape) in tensors.items():
        if not isinstance(dtype, str) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"its header gives {key} the shape {list(shape)}")
    return tensors, metadata


def _pickled(path: str) -> str:
    return "; pickled weights are not opened, since that could run their author's code" if _is_pickle(path) else ""


def _is_pickle(path: str) -> bool:
    return path.lower().endswith(PICKLES)


def assign(
    adapters: Sequence[Adapter], tensors: Mapping[str, Mapping[str, tuple[int, ...]]], rename: Rename | None
) -> dict[str, dict[str, list[Delta]]]:
    """Component -> tensor -> what the adapters add to it. `tensors` maps each component with weights to the shapes of
    its tensors. CheckpointError names the adapter's keys that fit none of them, or fit one in another shape."""
    found: dict[str, dict[str, list[Delta]]] = {}
    modules = {component: {key.rpartition(".")[0] for key in known} for component, known in tensors.items()}
    joined = {component: {name.replace(".", "_"): name for name in names} for component, names in modules.items()}
    for index, adapter in enumerate(adapters):
        unmatched: list[str] = []
        for module, parts in _modules(adapter).items():
            component, names = _target(adapter, module, joined, rename)
            known = tensors.get(component, {})
            weights = [key for name in names if (key := _weight_key(name, known))]
            if not weights or len(weights) != len(names):
                unmatched += parts.values()
                continue
            for key, delta in _deltas(adapter, index, component, parts, weights, known):
                found.setdefault(component, {}).setdefault(key, []).append(delta)
        if unmatched:
            more = f", and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
            raise CheckpointError(
                f"model.loras: {adapter.path}: {len(unmatched)} of {len(adapter.shapes)} keys match no tensor of the "
                f"checkpoint: {', '.join(unmatched[:SHOWN])}{more}"
            )
    return found


def at(adapter: Adapter, place: str) -> Adapter:
    """The same adapter, copied to a local path."""
    return replace(adapter, fs=LocalFileSystem(), place=place)


def digest(adapter: Adapter) -> str:
    """64 hexadecimal digits, the same wherever the file lies and whatever it is called."""
    return block_digest(adapter.fs, adapter.place, "adapter", adapter.size).hex()


def _find(path: str) -> tuple[Any, str]:
    """The file system and the one file that `path` means."""
    try:
        fs, place = fsspec.core.url_to_fs(path)
        if not fs.exists(place) and "://" not in path and (hub := HUB_FILE.fullmatch(path)):
            from huggingface_hub import HfFileSystem

            fs, place = HfFileSystem(), path
            if not fs.exists(place):
                raise CheckpointError(f"model.loras: {path!r} is neither a file here nor on the hub ({hub.group(1)})")
        if fs.isfile(place):
            return fs, place
        files = sorted(name for name in fs.ls(place, detail=False) if str(name).endswith(".safetensors"))
    except CheckpointError:
        raise
    except Exception as error:  # by file system and version another class; all mean the same here
        raise CheckpointError(f"model.loras: {path!r} cannot be opened: {type(error).__name__}: {error}") from error
    usual = [name for name in files if PurePosixPath(name).name in FILES]
    chosen = usual or files
    if len(chosen) != 1:
        names = ", ".join(PurePosixPath(name).name for name in files) or "none"
        raise CheckpointError(f"model.loras: {path!r} must name one safetensors file; the folder has {names}")
    return fs, chosen[0]


def _scaling(fs: Any, place: str, metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Rank and alpha as PEFT writes them: in the file's metadata, by component, or in adapter_config.json beside it."""
    found: dict[str, Mapping[str, Any]] = {}
    if "lora_adapter_metadata" in metadata:
        flat = json.loads(metadata["lora_adapter_metadata"])
        for key, value in flat.items():
            component, dot, name = key.partition(".")
            if dot:
                found.setdefault(component, {})
                found[component] = {**found[component], name: value}
    beside = f"{place.rpartition('/')[0]}/adapter_config.json"
    if place.endswith("adapter_model.safetensors") and fs.exists(beside):
        config = json.loads(fs.cat_file(beside))
        if config.get("use_dora"):
            raise CheckpointError(f"model.loras: {place}: use_dora is true, which is not supported")
        found["transformer"] = config
    return found


def _modules(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Module path -> kind of tensor -> key. CheckpointError names keys of a kind that is not known."""
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for key in adapter.shapes:
        for suffix, kind in SUFFIXES.items():
            if key.endswith(suffix):
                modules.setdefault(key.removesuffix(suffix), {})[kind] = key
                break
        else:
            unknown.append(key)
    if unknown:
        known = ", ".join(sorted(SUFFIXES))
        raise CheckpointError(
            f"model.loras: {adapter.path}: {len(unknown)} keys are of no known kind: {', '.join(unknown[:SHOWN])}; "
            f"known endings: {known}"
        )
    for module, parts in modules.items():
        if ("down" in parts) != ("up" in parts) or not {"up", "diff", "diff_b"} & set(parts):
            listed = ", ".join(parts.values())
            raise CheckpointError(f"model.loras: {adapter.path}: {module} is incomplete: it has only {listed}")
    return modules


def _target(
    adapter: Adapter, module: str, joined: Mapping[str, Mapping[str, str]], rename: Rename | None
) -> tuple[str, tuple[str, ...]]:
    """The component, and the names of its modules, that a module path of the adapter means."""
    prefix = next((prefix for prefix in PREFIXES if module.startswith(prefix)), "")
    component = PREFIXES.get(prefix, "transformer")
    if adapter.component is not None and component == "transformer":
        component = adapter.component
    if component.startswith("transformer") and rename is not None and (names := rename(module)):
        return component, (names,) if isinstance(names, str) else names
    plain = module.removeprefix(prefix)
    if prefix.endswith("_"):  # kohya joins the parts of a path with underscores
        plain = joined.get(component, {}).get(plain, plain)
    return component, (plain,)


def _weight_key(name: str, known: Mapping[str, Any]) -> str:
    """The tensor of a module: its weight, or the parameter of that very name."""
    return next((key for key in (f"{name}.weight", name) if key in known), "")


def _deltas(
    adapter: Adapter,
    index: int,
    component: str,
    parts: Mapping[str, str],
    weights: Sequence[str],
    known: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, Delta]]:
    """(tensor, what is added to it) for one module of the adapter, whose rows `weights` share in their order."""
    rows, start = [], 0
    scalars = [key for key in weights if not known[key]]
    flat = [parts[kind] for kind in ("down", "up") if kind in parts and len(adapter.shapes[parts[kind]]) < 2]
    if scalars or flat:
        raise CheckpointError(
            f"model.loras: {adapter.path}: {', '.join(parts.values())} do not fit {' + '.join(weights)}: "
            f"{(scalars + flat)[0]} is no matrix"
        )
    if "alpha" in parts and math.prod(adapter.shapes[parts["alpha"]]) != 1:
        raise CheckpointError(
            f"model.loras: {adapter.path}: {parts['alpha']} is {list(adapter.shapes[parts['alpha']])}, not one number"
        )
    for key in weights:
        rows.append((start, start + known[key][0]))
        start += known[key][0]
    spread = list(zip(weights, rows if len(weights) > 1 else [None], strict=True))
    made: list[tuple[str, Delta]] = []
    if "up" in parts:
        down, up = adapter.shapes[parts["down"]], adapter.shapes[parts["up"]]
        whole = (start, *known[weights[0]][1:])
        product = (up[0], *down[1:])
        if up[1] != down[0] or math.prod(product) != math.prod(whole) or product[0] != whole[0]:
            raise CheckpointError(
                f"model.loras: {adapter.path}: {parts['up']} {list(up)} x {parts['down']} {list(down)} does not fit "
                f"{' + '.join(weights)}, which is {list(whole)}"
            )
        scale = adapter.weight * (1.0 if "alpha" in parts else _own_scale(adapter, component, parts["down"], down[0]))
        low = Delta(index, scale, parts["down"], parts["up"], alpha=parts.get("alpha", ""))
        made += [(key, replace(low, rows=part)) for key, part in spread]
        if "up_bias" in parts:
            made += _full(
                adapter, index, parts["up_bias"], [key.removesuffix("weight") + "bias" for key in weights], known, scale
            )
    if "diff" in parts:
        made += _full(adapter, index, parts["diff"], weights, known, adapter.weight)
    if "diff_b" in parts:
        biases = [key.removesuffix("weight") + "bias" for key in weights]
        made += _full(adapter, index, parts["diff_b"], biases, known, adapter.weight)
    return made


def _full(
    adapter: Adapter,
    index: int,
    source: str,
    targets: Sequence[str],
    known: Mapping[str, tuple[int, ...]],
    scale: float,
) -> list[tuple[str, Delta]]:
    missing = [key for key in targets if not known.get(key)]
    if missing:
        raise CheckpointError(f"model.loras: {adapter.path}: {source} is for {missing[0]}, which the checkpoint lacks")
    if sum(math.prod(known[key]) for key in targets) != math.prod(adapter.shapes[source]):
        shapes = " + ".join(str(list(known[key])) for key in targets)
        raise CheckpointError(
            f"model.loras: {adapter.path}: {source} is {list(adapter.shapes[source])}; "
            f"{' + '.join(targets)} is {shapes}"
        )
    made, start = [], 0
    for key in targets:
        rows = (start, start + known[key][0]) if len(targets) > 1 else None
        start += known[key][0]
        made.append((key, Delta(index, scale, full=source, rows=rows)))
    return made


def _own_scale(adapter: Adapter, component: str, key: str, rank: int) -> float:
    """alpha / rank (or alpha / sqrt(rank), rank-stabilised) as the file's metadata has it; 1 where it says nothing."""
    config = adapter.scaling.get(component) or adapter.scaling.get("transformer") or {}
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"model.loras: {adapter.path}: alpha_pattern is {patterns!r}, not an object")
    for pattern, value in patterns.items():
        if _matches(adapter, pattern, key):
            alpha = value
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or rank < 1:
        raise CheckpointError(f"model.loras: {adapter.path}: lora_alpha is {alpha!r} for {key} of rank {rank}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(adapter: Adapter, pattern: str, key: str) -> bool:
    """Whether a regular expression of the adapter's author means this key. One with several repetitions could be made
    to take for ever, and names of modules need none."""
    if sum(pattern.count(mark) for mark in "*+{") > MOST_REPETITIONS:
        raise CheckpointError(f"model.loras: {adapter.path}: alpha_pattern {pattern!r} repeats more than once")
    try:
        return re.search(rf"(^|\.){pattern}\.lora", key) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"model.loras: {adapter.path}: alpha_pattern {pattern!r}: {error}") from error
