"""A checkpoint's copy on this node's disk: fetched once between the processes of a node, whole, and checked.

Refuses to know what the files are for, and what is done with them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from vidgen.checkpoint import adapter
from vidgen.checkpoint.adapter import PICKLES, Adapter
from vidgen.checkpoint.digest import block_digest
from vidgen.checkpoint.folder import CheckpointFolder, open_checkpoint
from vidgen.errors import CheckpointError, InfrastructureError


def fetch(folder: CheckpointFolder, cache_dir: str | os.PathLike[str]) -> Path:
    """A copy of the folder on this node's disk; a local folder is used where it is.

    Remote files go to `cache_dir`/checkpoints/<name>-<hash>, each written beside its place, checked and renamed,
    so a copy that was killed continues where it was. Processes of one node wait for each other. CheckpointError if a
    copy differs from its source, InfrastructureError if storage fails.
    """
    if folder.local is not None:
        return folder.local
    name = folder.resolved.name
    wanted = list(_wanted(folder))
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-")[-60:]
    place = Path(cache_dir).expanduser().absolute() / "checkpoints" / f"{slug}-{folder.hash()[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent / f"{place.name}.lock"):
        missing = [path for path in wanted if not _has(place / path, folder.sizes[path])]
        needed = sum(folder.sizes[path] for path in missing)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise CheckpointError(
                f"{name}: {needed:,} bytes are to be fetched to {place}, which has {free:,} free; "
                "model.cache_dir names another place"
            )
        for path in missing:
            _download(folder, path, place / path)
    return place


def fetched(folder: CheckpointFolder, cache_dir: str | os.PathLike[str]) -> CheckpointFolder:
    """The checkpoint, under its own name, where `fetch` put it, adapters too. The copy must have the source's hash, so
    that one that went bad on the disk is not used: CheckpointError says which folder to delete."""
    adapters = tuple(_fetched(one, Path(cache_dir).expanduser().absolute()) for one in folder.adapters)
    if folder.local is not None:
        return replace(folder, adapters=adapters)
    place = fetch(folder, cache_dir)
    copy = open_checkpoint(str(place))
    copy = replace(copy, resolved=folder.resolved, adapters=adapters, rename=folder.rename)
    if copy.hash() != folder.hash():
        raise CheckpointError(f"{folder.resolved.name}: the copy in {place} differs from its source; delete it")
    return copy


def _wanted(folder: CheckpointFolder) -> Iterator[str]:
    """Every file of the components but other forms of their weights."""
    yield from (path for path in ("model_index.json", "vidgen.json") if path in folder.sizes)
    for component in folder.components:
        shards = folder.weights(component)
        for path in folder.files(component):
            if path in shards or not path.endswith((".safetensors", *PICKLES)):
                yield path


def _download(folder: CheckpointFolder, path: str, place: Path) -> None:
    name, size = folder.resolved.name, folder.sizes[path]
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    try:
        folder.fs.get_file(f"{folder.root}/{path}", str(part))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name}: {path} disappeared while it was fetched") from error
    except OSError as error:
        raise InfrastructureError(f"{name}: {path} could not be fetched: {error}") from error
    found = part.stat().st_size
    if found != size:
        part.unlink()
        raise CheckpointError(f"{name}: {path} came with {found:,} bytes; its source has {size:,}")
    shard = path.endswith(".safetensors")
    if shard and block_digest(LocalFileSystem(), str(part), path, size) != folder.shard_digest(path):
        part.unlink()
        raise CheckpointError(f"{name}: the copy of {path} differs from its source")
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(place)


def _fetched(found: Adapter, cache_dir: Path) -> Adapter:
    """The adapter on this machine's disk."""
    if isinstance(found.fs, LocalFileSystem):
        return found
    place = cache_dir / "adapters" / f"{adapter.digest(found)[:32]}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_suffix(".lock")):
        if not _has(place, found.size):
            part = place.with_suffix(".part")
            try:
                found.fs.get_file(found.place, str(part))
            except OSError as error:
                raise InfrastructureError(f"model.loras: {found.path} could not be fetched: {error}") from error
            if part.stat().st_size != found.size:
                raise CheckpointError(f"model.loras: {found.path} came with {part.stat().st_size:,} bytes")
            part.replace(place)
    return adapter.at(found, str(place))


def _has(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Holds a file lock; the kernel lets go of it when the process dies, however it dies."""
    with place.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
