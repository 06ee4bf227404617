"""A value of nested dataclasses, mappings, sequences and tensors, taken apart into a small description and its tensors,
and put together again. Tensors are never pickled; one that occurs twice is there once.

Refuses to know how either is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.Size)


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a tensor belongs: its number."""

    index: int


@dataclass(frozen=True, slots=True)
class Branch:
    """A container: its type, the names of its parts (keys or fields; None for a sequence), and the parts."""

    kind: type
    names: tuple[Any, ...] | None
    parts: tuple[Any, ...]


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """(description, tensors). TypeError names a value that is none of the above."""
    tensors: list[Tensor] = []
    known: dict[int, int] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = len(tensors)
                tensors.append(value)
            return Leaf(known[id(value)])
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, (list, tuple)):
            return Branch(type(value), None, tuple(map(describe, value)))
        if isinstance(value, dict):
            return Branch(dict, tuple(value), tuple(map(describe, value.values())))
        if is_dataclass(value) and not isinstance(value, type):
            names = tuple(f.name for f in fields(value))
            return Branch(type(value), names, tuple(describe(getattr(value, name)) for name in names))
        raise TypeError(f"a {type(value).__name__} cannot be sent to the other ranks")

    return describe(value), tensors


def put_together(description: Any, tensors: Sequence[Tensor]) -> Any:
    """The way back."""
    if isinstance(description, Leaf):
        return tensors[description.index]
    if not isinstance(description, Branch):
        return description
    parts = [put_together(part, tensors) for part in description.parts]
    if description.names is None:
        return description.kind(parts)
    named = dict(zip(description.names, parts, strict=True))
    return named if description.kind is dict else description.kind(**named)
