"""The family contract: what a folder under `vidgen/models/` must offer, and how it is found.

The folder is the registry: a family is there when `vidgen/models/<name>/spec.py` is. Imports no torch; a pipeline or
backend is imported only when an engine loads it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from vidgen.errors import ConfigError
from vidgen.types import Request


class Spec(Protocol):
    """The module `vidgen/models/<family>/spec.py`: sizes, limits, defaults, cost. Standard library only.

    `configs` maps a component of the checkpoint (model_index, transformer, vae, text_encoder, tokenizer, scheduler,
    ...) to its parsed JSON. `params` is whatever frozen dataclass `read` returns.
    """

    REVISION: int
    """Raised when our own pixels change."""
    TASKS: Mapping[str, Mapping[str, bool]]
    """Each task, with the conditioning media it takes (image, last_image, video), true for one it cannot do without."""
    CHECKPOINT: bool
    """False for a family without weights (the test card)."""
    PIPELINES: Mapping[str, tuple[str, ...]]
    """Values of model_index.json's _class_name that belong to this family, each with the tasks it does in diffusers."""
    COMPONENTS: tuple[str, ...]
    """Folders a checkpoint must have."""
    PARAMS: Mapping[str, type]
    """What may stand under `sampling.params`, with its type."""
    SAMPLERS: tuple[str, ...]

    def read(self, configs: Mapping[str, Mapping[str, Any]]) -> Any:
        """Sizes and switches of a checkpoint; raises CheckpointError naming an unsupported option."""

    def defaults(self, task: str, params: Any) -> dict[str, Any]:
        """Every sampling field (height .. guidance_scale, negative_prompt, sampler, shift, sigmas, timesteps, params)
        for `task`; ConfigError if this checkpoint cannot do it."""

    def problems(self, request: Request, params: Any, parallel: Mapping[str, Any]) -> list[str]:
        """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""

    def frames_out(self, request: Request) -> int:
        """Frames of the finished video."""

    def tiling(self, mode: str, request: Request, params: Any) -> tuple[int, int, int, int] | None:
        """VAE tiles for this shape under `engine.vae_tiling` (auto, on, off): a function of family and shape alone."""

    def batch_key(self, request: Request, params: Any) -> str:
        """Items with equal keys may share a batch: shape, task, steps, schedule, branches."""

    def tokens(self, request: Request, params: Any) -> int:
        """Tokens of one forward of the transformer."""

    def flops(self, request: Request, params: Any) -> float:
        """Floating-point operations of all transformer forwards of the item (2 per multiply-add)."""

    def weight_bytes(self, params: Any) -> int:
        """Bytes of the checkpoint's tensors in their published dtype, counted from the sizes alone."""

    def heads(self, params: Any) -> int:
        """Attention heads of the transformer, which a gang's Ulysses ranks divide; 1 for a family without any."""

    def text_limit(self, params: Any) -> tuple[str, int] | None:
        """(tokenizer component, most tokens a prompt may have, the closing one included), or None."""


def families() -> list[str]:
    """Names of all families, sorted."""
    import vidgen.models

    found = []
    for module in pkgutil.iter_modules(vidgen.models.__path__):
        if module.ispkg and importlib.util.find_spec(f"vidgen.models.{module.name}.spec") is not None:
            found.append(module.name)
    return sorted(found)


def spec(name: str) -> Spec:
    """The spec of a family; raises ConfigError listing the families there are."""
    if name not in families():
        raise ConfigError(f"model.family: {name!r} is not a family; allowed: auto, {', '.join(families())}")
    return cast(Spec, importlib.import_module(f"vidgen.models.{name}.spec"))


def adapter_names(name: str) -> Callable[[str], str | tuple[str, ...] | None] | None:
    """What a family makes of the module names in other people's LoRA adapters: its `adapters.py`, if it has one."""
    if importlib.util.find_spec(f"vidgen.models.{name}.adapters") is None:
        return None
    found: Callable[[str], str | tuple[str, ...] | None]
    found = importlib.import_module(f"vidgen.models.{name}.adapters").module_name
    return found


def recognise(model_index: Mapping[str, Any]) -> str:
    """The native family whose pipelines include the checkpoint's `_class_name`."""
    wanted = model_index.get("_class_name")
    for name in families():
        if wanted in spec(name).PIPELINES:
            return name
    known = sorted(cls for name in families() for cls in spec(name).PIPELINES)
    raise ConfigError(
        f"model.family: auto cannot tell a family from model_index.json: _class_name is {wanted!r}; "
        f"known: {', '.join(known)}"
    )
