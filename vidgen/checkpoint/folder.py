"""A checkpoint in the Diffusers layout, wherever it lies: its files, configs and hash, and a node-local copy of it.

The planner on a machine without GPU reads configs and hash by small range reads; a replica fetches the whole. Refuses
to know torch, transformers, and what the components are for.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vidgen.checkpoint import adapter
from vidgen.checkpoint.adapter import HEADER_BYTES, PICKLES, Adapter, Delta, Rename, parse_header
from vidgen.errors import CheckpointError, InfrastructureError

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
STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of dtypes in safetensors headers."""
BLOCKS, BLOCK_BYTES = 64, 4096
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a checkpoint was found: `name` is the canonical name that a manifest records, `commit` that of a hub id
    or ""."""

    name: str
    commit: str


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
        return tuple((a.component or "", a.weight, _adapter_digest(a)) for a in self.adapters)

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
            for path, size in self.weights(component).items():
                _add(total, path, self._shard_digest(path, size))
        return total.hexdigest()

    def _small_files(self, component: str) -> list[str]:
        """The component's config, and all of a tokenizer."""
        config = self._config(component)
        return sorted(self.files(component)) if config.endswith(TOKENIZER) else [config]

    def _shard_digest(self, path: str, size: int) -> bytes:
        self._header_bytes(path, size)
        return block_digest(self.fs, f"{self.root}/{path}", path, size)

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

    def fetch(self, cache_dir: str | os.PathLike[str], components: Collection[str] | None = None) -> Path:
        """A copy of the folder on this node's disk; a local folder is used where it is.

        Remote files go to `cache_dir`/checkpoints/<name>-<hash>, each written beside its place, checked and renamed,
        so a copy that was killed continues where it was. Processes of one node wait for each other. `components`
        leaves the others out. CheckpointError if a copy differs from its source, InfrastructureError if storage fails.
        """
        if self.local is not None:
            return self.local
        wanted = [*self._wanted(self.components if components is None else components)]
        slug = re.sub(r"[^\w.-]+", "-", self.resolved.name).strip("-")[-60:]
        place = Path(cache_dir).expanduser().absolute() / "checkpoints" / f"{slug}-{self.hash()[:16]}"
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place.parent / f"{place.name}.lock"):
            missing = [path for path in wanted if not _has(place / path, self.sizes[path])]
            needed = sum(self.sizes[path] for path in missing)
            free = shutil.disk_usage(place).free
            if needed > free:
                raise CheckpointError(
                    f"{self.resolved.name}: {needed:,} bytes are to be fetched to {place}, which has {free:,} free; "
                    "model.cache_dir names another place"
                )
            for path in missing:
                self._download(path, place / path)
        return place

    def fetched(self, cache_dir: str | os.PathLike[str], components: Collection[str] | None = None) -> CheckpointFolder:
        """This checkpoint, under its own name, where `fetch` put it. A whole copy must have the source's hash, so that
        one that went bad on the disk is not used: CheckpointError says which folder to delete."""
        adapters = tuple(_fetched(a, Path(cache_dir).expanduser().absolute()) for a in self.adapters)
        if self.local is not None:
            return replace(self, adapters=adapters)
        place = self.fetch(cache_dir, components)
        copy = _open_folder(self.resolved.name, LocalFileSystem(), str(place), "")
        copy = replace(copy, resolved=self.resolved, adapters=adapters, rename=self.rename)
        if components is None and copy.hash() != self.hash():
            raise CheckpointError(f"{self.resolved.name}: the copy in {place} differs from its source; delete it")
        return copy

    def _wanted(self, components: Collection[str]) -> Iterator[str]:
        yield from (path for path in ("model_index.json", "vidgen.json") if path in self.sizes)
        for component in components:
            shards = self.weights(component)
            for path in self.files(component):
                if path in shards or not path.endswith((".safetensors", *PICKLES)):
                    yield path

    def _download(self, path: str, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.part")
        try:
            self.fs.get_file(f"{self.root}/{path}", str(part))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.resolved.name}: {path} disappeared while it was fetched") from error
        except OSError as error:
            raise InfrastructureError(f"{self.resolved.name}: {path} could not be fetched: {error}") from error
        found, size = part.stat().st_size, self.sizes[path]
        if found != size:
            part.unlink()
            raise CheckpointError(f"{self.resolved.name}: {path} came with {found:,} bytes; its source has {size:,}")
        shard = path.endswith(".safetensors")
        if shard and block_digest(LocalFileSystem(), str(part), path, size) != self._shard_digest(path, size):
            part.unlink()
            raise CheckpointError(f"{self.resolved.name}: the copy of {path} differs from its source")
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(place)

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
    if is_hub_id(checkpoint):
        return _open_hub(checkpoint, revision or "main")
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} is for checkpoints on the hub; {checkpoint!r} is not one")
    if checkpoint == "demo":
        place = Path(__file__).parents[1] / "demo" / "checkpoint"
        return _open_folder("demo", LocalFileSystem(), str(place), "")
    if "://" in checkpoint:
        try:
            fs, root = fsspec.core.url_to_fs(checkpoint)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"checkpoint {checkpoint!r} cannot be opened: {error}") from error
        return _open_folder(fs.unstrip_protocol(root), fs, root, "")
    return _open_folder(str(Path(checkpoint).absolute()), LocalFileSystem(), str(Path(checkpoint).absolute()), "")


def is_hub_id(checkpoint: str) -> bool:
    return HUB_ID.fullmatch(checkpoint) is not None and not os.path.exists(checkpoint)


def _open_folder(name: str, fs: fsspec.AbstractFileSystem, root: str, commit: str) -> CheckpointFolder:
    root = root.rstrip("/")
    try:
        fs.invalidate_cache()
        listing = fs.find(root, detail=True)
    except FileNotFoundError:
        listing = {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {name!r} cannot be listed: {error}") from error
    prefix = fs._strip_protocol(root).rstrip("/") + "/"
    sizes = {path.removeprefix(prefix): int(info["size"]) for path, info in sorted(listing.items())}
    sizes = {path: size for path, size in sizes.items() if not any(p.startswith(".") for p in path.split("/"))}
    if not sizes:
        raise CheckpointError(f"checkpoint {name!r}: there is no such folder, or it is empty")
    if "model_index.json" not in sizes:
        raise CheckpointError(f"checkpoint {name!r}: model_index.json is missing; this is not a Diffusers folder")
    return CheckpointFolder(Resolved(name, commit), fs, root, sizes)


def _open_hub(name: str, revision: str) -> CheckpointFolder:
    """A hub id, through the client's own file system at the commit that `revision` means now."""
    from huggingface_hub import HfApi, HfFileSystem

    try:
        commit = HfApi().model_info(name, revision=revision).sha
        return _open_folder(name, HfFileSystem(), f"{name}@{commit}", str(commit))
    except CheckpointError:
        raise
    except Exception as error:  # by version the client raises requests', httpx's or its own; all mean the same here
        raise CheckpointError(
            f"checkpoint {name!r} is neither a folder here nor could it be resolved at revision {revision!r} on the "
            f"hub: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _fetched(found: Adapter, cache_dir: Path) -> Adapter:
    """The adapter on this machine's disk."""
    if isinstance(found.fs, LocalFileSystem):
        return found
    place = cache_dir / "adapters" / f"{_adapter_digest(found)[:32]}.safetensors"
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


def _adapter_digest(found: Adapter) -> str:
    """The same wherever the file lies and whatever it is called."""
    return block_digest(found.fs, found.place, "adapter", found.size).hex()


def _add(total: Any, path: str, content: bytes) -> None:
    total.update(f"{path}:{len(content)}\n".encode())
    total.update(content)


def block_digest(fs: fsspec.AbstractFileSystem, where: str, path: str, size: int) -> bytes:
    """Digest of the shard `path`, of `size` bytes, that lies at `where`: size, header, blocks."""
    header = 8 + int.from_bytes(fs.cat_file(where, start=0, end=8), "little")
    starts = [_place(path, size, k) for k in range(BLOCKS)]
    ends = [min(size, start + BLOCK_BYTES) for start in starts]
    starts, ends = [0, *starts], [min(size, header), *ends]
    digest = hashlib.sha256(str(size).encode())
    if fs.protocol == "hf":  # the one file system whose ranges come over the network and one after another
        with ThreadPoolExecutor(16) as pool:
            blocks = list(pool.map(fs.cat_file, [where] * len(starts), starts, ends))
    else:
        blocks = fs.cat_ranges([where] * len(starts), starts, ends, on_error="raise")
    for block in blocks:
        digest.update(block)
    return digest.digest()


def _place(path: str, size: int, k: int) -> int:
    """Where block k of a file starts, drawn from the file's name and size alone."""
    drawn = hashlib.sha256(f"{path}:{size}:{k}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") % max(1, size - BLOCK_BYTES + 1)


def _has(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Holds a file lock; the kernel lets go of it when the process dies, however it dies."""
    with place.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
