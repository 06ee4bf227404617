"""Which family makes the videos, from which checkpoint: configuration keys to a Spec, its sizes and a hash, and to
what an engine loads.

Reads configs only, never weights. Refuses to know rows.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from typing import Any

from vidgen import family, formats, tokens
from vidgen.checkpoint.adapter import open_adapter
from vidgen.checkpoint.folder import CheckpointFolder, open_checkpoint
from vidgen.config import JobConfig, loras, model_options
from vidgen.errors import ConfigError, UserError
from vidgen.family import Spec
from vidgen.types import ModelSettings, Plan


@dataclass(frozen=True, slots=True)
class Model:
    """A family, bound to a checkpoint. `checkpoint`, `commit` and `checkpoint_hash` are "" for one without weights."""

    family: str
    spec: Spec
    params: Any
    checkpoint: str
    commit: str
    checkpoint_hash: str
    codec: str
    folder: CheckpointFolder | None
    loras: tuple[tuple[str, float, str], ...] = ()
    """Component, weight and digest of each adapter."""
    switches: tuple[tuple[str, str], ...] = ()
    """What pixels depend on beside checkpoint, adapters and requests, by configuration key: model.pipeline and
    model.options of a family that has them."""

    def text_limit(self) -> tuple[tokens.Counter, int] | None:
        """A counter and the most tokens a prompt may have, where the family has such a limit."""
        found = self.spec.text_limit(self.params)
        if found is None or self.folder is None:
            return None
        component, limit = found
        return tokens.counter(self.folder.files(component), self.folder.read, component), limit


def resolve(config: JobConfig) -> Model:
    """ConfigError or CheckpointError (both end with exit code 2) names the key or the missing component."""
    name, folder = config.model.family, None
    if name == "auto" or family.spec(name).CHECKPOINT:
        folder = open_checkpoint(config.model.checkpoint, config.model.revision)
    configs = folder.configs() if folder is not None else {}
    if name == "auto":
        name = family.recognise(configs["model_index"])
    if importlib.util.find_spec(f"vidgen.models.{name}.binding") is not None:
        assert folder is not None, f"{name} binds a checkpoint"
        return _bound(config, name, folder)
    spec = family.spec(name)
    missing = [component for component in spec.COMPONENTS if component not in configs]
    if folder is not None and missing:
        raise ConfigError(
            f"model.checkpoint: {folder.resolved.name} has no {', '.join(missing)}; "
            f"{name} needs {', '.join(spec.COMPONENTS)}"
        )
    if config.model.task not in spec.TASKS:
        raise ConfigError(
            f"model.task: {config.model.task!r} is not a task of {name}; allowed: {', '.join(spec.TASKS)}"
        )
    if folder is not None and config.model.loras:
        adapters = [open_adapter(lora.path, lora.weight, lora.component) for lora in loras(config)]
        folder = folder.with_adapters(adapters, family.adapter_names(name))
    elif config.model.loras:
        raise ConfigError(f"model.loras: {name} has no weights to change")
    return Model(
        family=name,
        spec=spec,
        params=spec.read(configs),
        checkpoint=folder.resolved.name if folder else "",
        commit=folder.resolved.commit if folder else "",
        checkpoint_hash=folder.hash() if folder else "",
        codec=_codec(config),
        folder=folder,
        loras=folder.adapter_digests() if folder else (),
    )


def settings(config: JobConfig, plan: Plan, device: str, threads: int | None) -> ModelSettings:
    """What to load for the items of a frozen plan; `config` is the frozen one, or what a resume made of it."""
    return ModelSettings(
        checkpoint=plan.checkpoint,
        family=plan.family,
        task=plan.task,
        revision=plan.resolved["model"]["revision"],
        loras=loras(config),
        pipeline=config.model.pipeline,
        options=model_options(config),
        dtype=config.model.dtype,
        device=device,
        offload=config.engine.offload,
        quantization=config.engine.quantization,
        compile=str(config.engine.compile),
        attention=config.engine.attention,
        threads=threads,
        cache_dir=config.model.cache_dir,
        expected_hash=plan.checkpoint_hash or None,
    )


def _bound(config: JobConfig, name: str, folder: CheckpointFolder) -> Model:
    """A family whose Spec depends on more than the checkpoint: its `binding.py` makes one of the configuration. What
    its adapters change is known when its components are loaded."""
    binding = importlib.import_module(f"vidgen.models.{name}.binding")
    bound = binding.bind(folder, config.model.pipeline, dict(model_options(config)))
    if config.model.task not in bound.spec.TASKS:
        raise ConfigError(
            f"model.task: {config.model.task!r} is not a task of {bound.params.pipeline}; "
            f"allowed: {', '.join(bound.spec.TASKS)}"
        )
    adapters = tuple(open_adapter(lora.path, lora.weight, lora.component) for lora in loras(config))
    return Model(
        family=name,
        spec=bound.spec,
        params=bound.params,
        checkpoint=folder.resolved.name,
        commit=folder.resolved.commit,
        checkpoint_hash=bound.checkpoint_hash,
        codec=_codec(config),
        folder=folder,
        loras=replace(folder, adapters=adapters).adapter_digests(),
        switches=bound.switches,
    )


def _codec(config: JobConfig) -> str:
    output = config.output
    try:
        codec = formats.codec_of(output.format, output.codec)
    except UserError as error:
        raise ConfigError(str(error)) from error
    if codec.crf is not None and not codec.crf[0] <= output.crf <= codec.crf[1]:
        low, high = codec.crf
        raise ConfigError(f"output.crf: {output.crf} is not allowed; {codec.name} takes {low} to {high}")
    return codec.name
