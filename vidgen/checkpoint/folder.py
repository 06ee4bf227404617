"""A checkpoint in the Diffusers layout, wherever it lies: its files, configs, headers and hash.

The planner on a machine without GPU reads configs and hash by small range reads; a replica fetches the whole
(`vidgen.checkpoint.fetch`). Refuses to know torch, transformers, and what the components are for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.checkpoint import adapter
from vidgen.checkpoint.adapter import HEADER_BYTES, PICKLES, Adapter, Delta, Rename, parse_header
from vidgen.checkpoint.digest import block_digest
from vidgen.checkpoint.places import Resolved, listed, locate
from vidgen.errors import CheckpointError

CONFIGS = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""A component's own JSON: the first of these that its folder holds."""
STEMS = ("diffusion_pytorch_model", "model")
TOKENIZER = "tokenizer_config.json"
DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of dtypes in safetensors headers."""


@dataclass
class CheckpointFolder:
    """A folder of components. Paths in and out are relative to it, with forward slashes."""

    resolved: Resolved
    fs: fsspec.AbstractFileSystem
    root: str
    sizes: dict[str, int] = field(repr=False)
    """Bytes of every file."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters that are fused into the weights as they are loaded."""
    rename: Rename | None = None
    """What the family makes of the module names of adapters."""

    @property
    def local(self) -> Path | None:
        """The folder itself if it lies on this machine's disk."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def read(self, path: str) -> bytes:
        """All bytes of one file; CheckpointError names it if it is not there."""
        if path not in self.sizes:
            raise CheckpointError(f"{self.resolved.name}: {path} is missing")
        return self.fs.cat_file(f"{self.root}/{path}")

    def files(self, component: str) -> dict[str, int]:
        """Path and bytes of each file below a component's folder, sorted."""
        return {path: size for path, size in self.sizes.items() if path.startswith(f"{component}/")}

    @cached_property
    def components(self) -> tuple[str, ...]:
        """What model_index.json lists with a class, sorted."""
        return tuple(sorted(name for name, value in self._json("model_index.json").items() if _is_component(value)))

    def configs(self) -> dict[str, dict[str, Any]]:
        """Parsed JSON of `model_index`, of each component, of `vidgen` if the folder has a vidgen.json; and `stored`,
        the dtype that most numbers of each component with weights are stored in."""
        return {**self._configs, "stored": self._stored}

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        found = {"model_index": self._json("model_index.json")}
        for component in self.components:
            found[component] = self._json(self._config(component))
        if "vidgen.json" in self.sizes:
            found["vidgen"] = self._json("vidgen.json")
        return found

    @cached_property
    def _stored(self) -> dict[str, str]:
        found = {}
        for component in self.components:
            counts: Counter[str] = Counter()
            for dtype, shape in self._headers(component).values():
                counts[dtype] += math.prod(shape)
            if counts:
                most = counts.most_common(1)[0][0]
                found[component] = STORED.get(most, most)
        return found

    def weights(self, component: str) -> dict[str, int]:
        """Path and bytes of the component's safetensors files: one, or the shards that its index names.

        Empty for a component without weights (scheduler, tokenizer). CheckpointError names a shard that is missing,
        an index that cannot be read, and pickled weights, which we do not open.
        """
        index = self.index(component)
        if index is not None:
            paths = sorted({f"{component}/{shard}" for shard in index.values()})
            for path in paths:
                if path not in self.sizes:
                    raise CheckpointError(f"{self.resolved.name}: {path} is missing, and the index of it names it")
            return {path: self.sizes[path] for path in paths}
        files = self.files(component)
        for stem in STEMS:
            if (path := f"{component}/{stem}.safetensors") in files:
                return {path: files[path]}
        pickled = [path for path in files if path.endswith(PICKLES)]
        if pickled:
            raise CheckpointError(
                f"{self.resolved.name}: {pickled[0]} is pickled, and opening it could run its author's code; "
                "convert it to safetensors"
            )
        others = [path for path in files if path.endswith(".safetensors")]
        if others:
            raise CheckpointError(
                f"{self.resolved.name}: {component} has {others[0]} but none of "
                f"{', '.join(f'{stem}.safetensors' for stem in STEMS)}, nor an index of one"
            )
        return {}

    def index(self, component: str) -> dict[str, str] | None:
        """Tensor name -> shard, of a sharded component; None where there is no index."""
        for stem in STEMS:
            path = f"{component}/{stem}.safetensors.index.json"
            if path not in self.sizes:
                continue
            entries = self._json(path).get("weight_map")
            if not isinstance(entries, dict) or not entries:
                raise CheckpointError(f"{self.resolved.name}: {path} has no weight_map")
            for tensor, shard in entries.items():
                if not isinstance(shard, str) or PurePosixPath(shard).name != shard:
                    raise CheckpointError(f"{self.resolved.name}: {path} puts {tensor} into {shard!r}, not a file name")
                if not shard.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{self.resolved.name}: {path} puts {tensor} into {shard!r}; allowed: safetensors files alone"
                    )
            return entries
        return None

    def tensors(self, component: str) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor of a component, from the headers of its safetensors files."""
        return {key: shape for key, (_, shape) in self._headers(component).items()}

    def _headers(self, component: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, size in self.weights(component).items():
            length = self._header_bytes(path, size)
            try:
                found |= parse_header(self.fs.cat_file(f"{self.root}/{path}", start=8, end=8 + length))[0]
            except ValueError as error:
                raise CheckpointError(f"{self.resolved.name}: {path} is damaged: {error}") from error
        return found

    def with_adapters(self, adapters: Sequence[Adapter], rename: Rename | None) -> CheckpointFolder:
        """This checkpoint with LoRA adapters; CheckpointError names the keys of one that does not fit."""
        changed = replace(self, adapters=tuple(adapters), rename=rename)
        assert changed.deltas is not None, "looked at for its errors"
        return changed

    @cached_property
    def deltas(self) -> dict[str, dict[str, list[Delta]]]:
        """Component -> tensor -> what the adapters add to it."""
        if not self.adapters:
            return {}
        tensors = {component: self.tensors(component) for component in self.components}
        return adapter.assign(self.adapters, tensors, self.rename)

    def adapter_digests(self) -> tuple[tuple[str, float, str], ...]:
        """(component or "", weight, digest) of each adapter: what pixels depend on, wherever the files lie."""
        return tuple((a.component or "", a.weight, adapter.digest(a)) for a in self.adapters)

    def hash(self) -> str:
        """Identity of the weights, 64 hexadecimal digits: configs and tokenizer bytes, and of each shard its size, its
        header and 64 blocks of 4 KiB at places that its size and name decide. The same wherever the folder lies."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        total = hashlib.sha256()
        for path in ("model_index.json", "vidgen.json"):
            if path in self.sizes:
                _add(total, path, self.read(path))
        for component in self.components:
            for path in self._small_files(component):
                _add(total, path, self.read(path))
            for path in self.weights(component):
                _add(total, path, self.shard_digest(path))
        return total.hexdigest()

    def _small_files(self, component: str) -> list[str]:
        """The component's config, and all of a tokenizer."""
        config = self._config(component)
        return sorted(self.files(component)) if config.endswith(TOKENIZER) else [config]

    def shard_digest(self, path: str, name: str = "") -> bytes:
        """Digest of the safetensors file `path` under `name` (its path by default), on which the places depend that it
        is read at; CheckpointError if it is damaged."""
        size = self.sizes[path]
        self._header_bytes(path, size)
        return block_digest(self.fs, f"{self.root}/{path}", name or path, size)

    def _header_bytes(self, path: str, size: int) -> int:
        """Length of a safetensors file's header."""
        if size < 8:
            raise CheckpointError(f"{self.resolved.name}: {path} is not a safetensors file: it has {size} bytes")
        length = int.from_bytes(self.fs.cat_file(f"{self.root}/{path}", start=0, end=8), "little")
        if 8 + length > size:
            raise CheckpointError(f"{self.resolved.name}: {path} is damaged: its header is longer than the file")
        if length > HEADER_BYTES:
            raise CheckpointError(
                f"{self.resolved.name}: {path} is damaged: its header would have {length:,} bytes; allowed: at most "
                f"{HEADER_BYTES:,}"
            )
        return length

    def _config(self, component: str) -> str:
        files = self.files(component)
        for name in CONFIGS:
            if f"{component}/{name}" in files:
                return f"{component}/{name}"
        raise CheckpointError(
            f"{self.resolved.name}: component {component} is listed in model_index.json, but "
            + (f"{component}/ has none of {', '.join(CONFIGS)}" if files else f"the folder {component}/ is missing")
        )

    def _json(self, path: str) -> dict[str, Any]:
        try:
            value = json.loads(self.read(path))
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.resolved.name}: {path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.resolved.name}: {path} holds {type(value).__name__}, not an object")
        return value


def open_checkpoint(checkpoint: str, revision: str | None = None) -> CheckpointFolder:
    """Opens `demo` (the one in this package), a local folder, a hub id `org/name`, or any fsspec URL of a folder.

    `revision` (branch, tag or commit) is for hub ids, which are resolved to their commit here. CheckpointError says
    what was looked for and where.
    """
    if checkpoint == "demo" and revision is None:
        resolved, fs, root = Resolved("demo", ""), LocalFileSystem(), str(DEMO)
    else:
        resolved, fs, root = locate(f"checkpoint {checkpoint!r}", checkpoint, revision)
    what = f"checkpoint {resolved.name!r}"
    sizes = listed(what, fs, root)
    if not sizes:
        raise CheckpointError(f"{what}: there is no such folder, or it is empty")
    if "model_index.json" not in sizes:
        raise CheckpointError(f"{what}: model_index.json is missing; this is not a Diffusers folder")
    return CheckpointFolder(resolved, fs, root, sizes)


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _add(total: Any, path: str, content: bytes) -> None:
    total.update(f"{path}:{len(content)}\n".encode())
    total.update(content)
