"""What a configuration makes of this family: pipeline class, checkpoint and options, bound to one Spec and one hash.

The planner and the engine call `bind`, and must come to the same. No torch. Refuses to know rows and weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.models.diffusers import options as written
from vidgen.models.diffusers import params as bindings
from vidgen.models.diffusers.params import Params
from vidgen.models.diffusers.parts import Part, open_parts, whole_hash, with_parts
from vidgen.models.diffusers.spec import Bound, bound


@dataclass(frozen=True)
class Binding:
    """A pipeline class bound to a checkpoint. `switches` are what pixels depend on beside the checkpoint and the
    request, by configuration key; `checkpoint_hash` is over the checkpoint and all components from elsewhere."""

    spec: Bound
    params: Params
    parts: tuple[Part, ...]
    checkpoint_hash: str
    switches: tuple[tuple[str, str], ...]


def bind(folder: CheckpointFolder, pipeline: str | None, options: Mapping[str, Any]) -> Binding:
    """ConfigError and CheckpointError name the key, what is wrong with it and what is allowed."""
    chosen = written.read(options)
    parts = tuple(open_parts(chosen))
    params = bindings.read(with_parts(folder.configs(), parts), pipeline, chosen, _weights(folder, parts))
    if "tokenizer/tokenizer.json" not in folder.sizes:
        params = replace(params, text_tokens=None)  # counting needs it
    switches = {"model.pipeline": params.pipeline, "model.options": chosen.canonical()}
    return Binding(
        spec=bound(params),
        params=params,
        parts=parts,
        checkpoint_hash=whole_hash(folder, parts),
        switches=tuple((key, text) for key, text in sorted(switches.items()) if text),
    )


def _weights(folder: CheckpointFolder, parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """(bytes, numbers) of each component with weights, from the headers of its files."""
    found: dict[str, tuple[int, int]] = {}
    places = {name: (folder, name) for name in folder.components} | {part.name: (part, part.base) for part in parts}
    for name, (owner, component) in places.items():
        sizes = owner.weights(component)
        if sizes:
            numbers = sum(math.prod(shape) for shape in owner.tensors(component).values())
            found[name] = (sum(sizes.values()), numbers)
    return found
