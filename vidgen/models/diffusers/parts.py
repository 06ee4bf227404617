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

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.checkpoint import folder as folders
from vidgen.checkpoint.folder import CheckpointFolder, Resolved
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
        for path, size in self.weights(self.base).items():
            self._header_bytes(path, size)
            own = path.partition("/")[2]
            total.update(own.encode())
            total.update(folders.block_digest(self.fs, f"{self.root}/{path}", own, size))
        return total.hexdigest()

    def place(self, cache_dir: str) -> Path:
        """The folder on this machine's disk."""
        return self.fetch(cache_dir) / self.base


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
    shown, commit, fs, root = _locate(key, place)
    root = f"{root.rstrip('/')}/{place.subfolder}" if place.subfolder else root.rstrip("/")
    try:
        listing = fs.find(root, detail=True)
    except OSError as error:
        raise CheckpointError(f"{key}: {shown} cannot be listed: {error}") from error
    above, _, base = root.rpartition("/")
    inside = fs._strip_protocol(root).rstrip("/") + "/"
    sizes = {f"{base}/{path.removeprefix(inside)}": int(entry["size"]) for path, entry in sorted(listing.items())}
    if f"{base}/config.json" not in sizes:
        raise CheckpointError(f"{key}: {shown} has no config.json; a folder with one component is wanted")
    part = Part(Resolved(shown, commit), fs, above, sizes, name=name)
    if not part.weights(base):
        raise CheckpointError(f"{key}: {shown} has no safetensors file")
    return part


def _locate(key: str, place: Place) -> tuple[str, str, Any, str]:
    """(name to show, commit, file system, path in it): a local folder, a hub id at its commit, or any fsspec URL."""
    if folders.is_hub_id(place.path):
        from huggingface_hub import HfApi, HfFileSystem

        revision = place.revision or "main"
        try:
            commit = str(HfApi().model_info(place.path, revision=revision).sha)
        except Exception as error:  # by version the client raises requests', httpx's or its own; all mean the same here
            raise CheckpointError(
                f"{key}: {place.path!r} is neither a folder here nor could it be resolved at revision {revision!r} on "
                f"the hub: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        return place.path, commit, HfFileSystem(), f"{place.path}@{commit}"
    if place.revision is not None:
        raise CheckpointError(f"{key}.revision: {place.revision!r} is for the hub; {place.path!r} is not there")
    if "://" in place.path:
        try:
            fs, root = fsspec.core.url_to_fs(place.path)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{key}: {place.path!r} cannot be opened: {error}") from error
        return place.path, "", fs, root
    return place.path, "", LocalFileSystem(), str(Path(place.path).absolute())
