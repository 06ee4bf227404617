"""Components that are not the checkpoint's own (`model.options.components`): found, hashed and brought to this node.

A motion adapter or a ControlNet is a folder with a config.json and safetensors files, wherever it lies. No torch.
Refuses to know what a component is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidgen.checkpoint.fetch import fetch
from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.places import listed, locate
from vidgen.errors import CheckpointError
from vidgen.models.diffusers.options import Options, Place

KEY = "model.options.components"


@dataclass
class Part(CheckpointFolder):
    """One component's folder, seen as the only component of the folder above it. `name` is the component it stands
    for in the pipeline."""

    name: str = ""

    @property
    def base(self) -> str:
        """The folder's own name, with which every path of `sizes` begins."""
        return self.components[0]

    @cached_property
    def components(self) -> tuple[str, ...]:
        return (next(iter(self.sizes)).partition("/")[0],)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; CheckpointError if it names no class of the library."""
        found = self._json(f"{self.base}/config.json")
        if not found.get("_class_name"):
            raise CheckpointError(f"{KEY}.{self.name}: {self.resolved.name}: config.json names no _class_name")
        return found

    @cached_property
    def _hash(self) -> str:
        """Of the config and of each shard, under names that do not depend on where the folder lies."""
        total = sha256(self.read(f"{self.base}/config.json"))
        for path in self.weights(self.base):
            own = path.partition("/")[2]
            total.update(own.encode())
            total.update(self.shard_digest(path, own))
        return total.hexdigest()

    def place(self, cache_dir: str) -> Path:
        """The folder on this machine's disk."""
        return fetch(self, cache_dir) / self.base


def open_parts(options: Options) -> list[Part]:
    """The components that options name; CheckpointError says what was looked for and where."""
    return [_open(name, place) for name, place in options.components if place.path]


def with_parts(configs: Mapping[str, Mapping[str, Any]], parts: Sequence[Part]) -> dict[str, Mapping[str, Any]]:
    """The checkpoint's configs with those of the parts in place of its own, in model_index too."""
    found: dict[str, Mapping[str, Any]] = dict(configs)
    index = dict(configs["model_index"])
    for part in parts:
        found[part.name] = part.config
        index[part.name] = ["diffusers", str(part.config["_class_name"])]
    return {**found, "model_index": index}


def whole_hash(folder: CheckpointFolder, parts: Sequence[Part]) -> str:
    """The checkpoint's hash, that of every part in it."""
    if not parts:
        return folder.hash()
    total = sha256(folder.hash().encode())
    for part in sorted(parts, key=lambda part: part.name):
        total.update(f"{part.name}:{part.hash()}".encode())
    return total.hexdigest()


def _open(name: str, place: Place) -> Part:
    key = f"{KEY}.{name}"
    what = f"{key}: {place.path!r}"
    resolved, fs, root = locate(what, place.path, place.revision)
    root = f"{root}/{place.subfolder}" if place.subfolder else root
    above, _, base = root.rpartition("/")
    sizes = {f"{base}/{path}": size for path, size in listed(what, fs, root).items()}
    if f"{base}/config.json" not in sizes:
        raise CheckpointError(f"{what} has no config.json; a folder with one component is wanted")
    part = Part(resolved, fs, above, sizes, name=name)
    if not part.weights(base):
        raise CheckpointError(f"{what} has no safetensors file")
    return part
