"""Where a checkpoint's text points, and which files lie there: a local folder, a hub id at its commit, a URL.

Refuses to know what the files are for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a checkpoint was found: `name` is the canonical name that a manifest records, `commit` that of a hub id
    or ""."""

    name: str
    commit: str


def locate(what: str, text: str, revision: str | None) -> tuple[Resolved, fsspec.AbstractFileSystem, str]:
    """The folder that `text` means, as its name, its filesystem and the path in that.

    `revision` (branch, tag or commit) is for hub ids, which are resolved to their commit here. CheckpointErrors begin
    with `what`.
    """
    if HUB_ID.fullmatch(text) and not os.path.exists(text):
        return _on_the_hub(what, text, revision or "main")
    if revision is not None:
        raise CheckpointError(f"{what}: revision {revision!r} is for ids on the hub, and this is none")
    if "://" in text:
        try:
            fs, root = fsspec.core.url_to_fs(text)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{what} cannot be opened: {error}") from error
        return Resolved(fs.unstrip_protocol(root), ""), fs, root.rstrip("/")
    place = str(Path(text).absolute())
    return Resolved(place, ""), LocalFileSystem(), place


def listed(what: str, fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """Path below `root` and bytes of every file there, sorted, those in hidden folders and hidden ones left out; empty
    where there is no such folder. CheckpointErrors begin with `what`."""
    try:
        fs.invalidate_cache()
        found = fs.find(root, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:  # by file system and version another class; all mean the same here
        raise CheckpointError(f"{what} cannot be listed: {type(error).__name__}: {error}") from error
    above = fs._strip_protocol(root).rstrip("/") + "/"
    sizes = {path.removeprefix(above): int(entry["size"]) for path, entry in sorted(found.items())}
    return {path: size for path, size in sizes.items() if not any(part.startswith(".") for part in path.split("/"))}


def _on_the_hub(what: str, name: str, revision: str) -> tuple[Resolved, fsspec.AbstractFileSystem, str]:
    """Through the client's own filesystem, at the commit that `revision` means now."""
    from huggingface_hub import HfApi, HfFileSystem

    try:
        commit = str(HfApi().model_info(name, revision=revision).sha)
    except Exception as error:  # by version the client raises requests', httpx's or its own; all mean the same here
        raise CheckpointError(
            f"{what} is neither a folder here nor could it be resolved at revision {revision!r} on the hub: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return Resolved(name, commit), HfFileSystem(), f"{name}@{commit}"
