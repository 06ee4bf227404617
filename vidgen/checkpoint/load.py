"""Weights of a component into a module that was built on the meta device: memory-mapped, assigned, strict.

Refuses to know any architecture and to repair anything: a missing, extra or mis-shaped key is an error that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vidgen.checkpoint.adapter import Adapter, Delta
from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.errors import CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 5
"""Keys that one message names; it counts the others."""

Module = TypeVar("Module", bound=nn.Module)


def dtype_named(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16`; CheckpointError lists them for anything else."""
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def published_dtype(folder: CheckpointFolder, component: str) -> torch.dtype:
    """The dtype in which a component means to be run: what vidgen.json says for the whole checkpoint, else what the
    component's config says, else the one in which most of its bytes are stored."""
    configs = folder.configs()
    own = configs.get(component, {})
    named = configs.get("vidgen", {}).get("dtype") or own.get("dtype") or own.get("torch_dtype")
    if named is None and component not in configs["stored"]:
        raise CheckpointError(f"{folder.resolved.name}: {component} has no safetensors file")
    return dtype_named(str(named or configs["stored"][component]))


def load_weights(
    module: Module,
    folder: CheckpointFolder,
    component: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keep_fp32: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> Module:
    """Assigns a component's tensors to `module`, built on the meta device with the checkpoint's keys as names.

    Floating-point tensors get `dtype`, except those with a part of their key in `keep_fp32`, which get fp32. `tied`
    maps a key to the one whose tensor it shares; either may be stored. The folder's adapters are fused, in fp32, before
    the cast. The module comes back in evaluation mode and without gradients. `folder` must be local. CheckpointError
    names every key that is missing, extra or mis-shaped.
    """
    assert folder.local is not None, "weights are read from a local folder"
    tied = dict(tied or {})
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    with _Shards(folder, component) as shards:
        source = {key: _stored_as(key, shards.where, tied) for key in expected}
        _check_keys(folder, component, expected, source, shards, tied)
        read: dict[str, torch.Tensor] = {}
        deltas = folder.deltas.get(component, {})
        for stored in dict.fromkeys(source.values()):
            assert stored is not None
            tensor = shards.tensor(stored)
            if stored in deltas:
                tensor = fused(tensor, deltas[stored], folder.adapters)
            read[stored] = _cast(tensor, stored, dtype, keep_fp32).to(device)
    module.load_state_dict({key: read[stored] for key, stored in source.items() if stored}, strict=True, assign=True)
    for alias, owner in tied.items():
        _set(module, alias, module.get_parameter(owner))
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"{component}: {left} are computed, not stored, and were left on the meta device"
    return module.eval().requires_grad_(False)


def fused(tensor: torch.Tensor, deltas: Sequence[Delta], adapters: Sequence[Adapter]) -> torch.Tensor:
    """The tensor with what adapters add to it, in fp32: W + sum of scale x up @ down (Hu et al. 2021, section 4.1)."""
    result = tensor.float()
    for delta in deltas:
        with safe_open(adapters[delta.adapter].place, framework="pt", device="cpu") as file:
            scale = delta.scale
            if delta.full:
                added = file.get_tensor(delta.full).float()
            else:
                down, up = file.get_tensor(delta.down).float(), file.get_tensor(delta.up).float()
                if delta.alpha:
                    scale *= float(file.get_tensor(delta.alpha)) / down.shape[0]
                added = up.flatten(1) @ down.flatten(1)
        if delta.rows is not None:
            added = added[slice(*delta.rows)]
        result = result + scale * added.reshape(result.shape)
    return result


def _stored_as(key: str, where: Mapping[str, Path], tied: Mapping[str, str]) -> str | None:
    """The stored key that holds the tensor of `key`: itself, its owner, or an alias of it."""
    owner = tied.get(key, key)
    names = (owner, *(alias for alias, of in tied.items() if of == owner))
    return next((name for name in names if name in where), None)


def _check_keys(
    folder: CheckpointFolder,
    component: str,
    expected: Mapping[str, tuple[int, ...]],
    source: Mapping[str, str | None],
    shards: _Shards,
    tied: Mapping[str, str],
) -> None:
    missing = [key for key, stored in source.items() if stored is None]
    extra = [key for key in shards.where if key not in expected]
    misshaped = [
        f"{stored} is {list(shards.shape(stored))}, expected {list(expected[key])}"
        for key, stored in source.items()
        if stored is not None and shards.shape(stored) != expected[key]
    ]
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
        for what, keys in (("missing", missing), ("extra", extra), ("mis-shaped", misshaped))
        if keys
    ]
    if found:
        raise CheckpointError(f"{folder.resolved.name}: {component} does not fit its config: {'; '.join(found)}")
    for alias, owner in tied.items():
        both = alias in shards.where and owner in shards.where
        if both and not torch.equal(shards.tensor(alias), shards.tensor(owner)):
            raise CheckpointError(
                f"{folder.resolved.name}: {component} stores {alias} and {owner}, which must be equal"
            )


def _cast(tensor: torch.Tensor, key: str, dtype: torch.dtype, keep_fp32: Collection[str]) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    kept = any(part in keep_fp32 for part in key.split("."))
    return tensor.to(torch.float32 if kept else dtype)


def _set(module: nn.Module, key: str, value: nn.Parameter) -> None:
    place, _, name = key.rpartition(".")
    setattr(module.get_submodule(place), name, value)


class _Shards:
    """A component's safetensors files, open and memory-mapped; `where` maps each key to its file."""

    def __init__(self, folder: CheckpointFolder, component: str) -> None:
        assert folder.local is not None
        self._folder, self._component, self._root = folder, component, folder.local
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.where: dict[str, Path] = {}

    def __enter__(self) -> _Shards:
        name, weights = self._folder.resolved.name, self._folder.weights(self._component)
        if not weights:
            raise CheckpointError(f"{name}: {self._component} has no safetensors file")
        for path in weights:
            place = self._root / path
            try:
                self._open[place] = self._stack.enter_context(safe_open(str(place), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise CheckpointError(f"{name}: {path} cannot be read: {error}") from error
            for key in self._open[place].keys():  # noqa: SIM118 (not a mapping)
                self.where[key] = place
        self._check_index(name)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _check_index(self, name: str) -> None:
        index = self._folder.index(self._component)
        if index is None:
            return
        for key, shard in index.items():
            if self.where.get(key) != self._root / self._component / shard:
                raise CheckpointError(f"{name}: {self._component}: the index puts {key} into {shard}, which lacks it")
        for key, place in self.where.items():
            if key not in index:
                raise CheckpointError(f"{name}: {self._component}: {place.name} holds {key}, which the index lacks")

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._open[self.where[key]].get_slice(key).get_shape())

    def tensor(self, key: str) -> torch.Tensor:
        return self._open[self.where[key]].get_tensor(key)
