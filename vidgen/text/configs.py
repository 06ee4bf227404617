"""The configuration of an encoder in a checkpoint's folder, from transformers; and that no code which a checkpoint
brings is run.

transformers asks on the terminal whether it may run such code unless it is told: we tell it no. Refuses to know what is
built of a configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, dynamic_module_utils

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.errors import CheckpointError


def load_config(folder: CheckpointFolder, component: str, allowed: Collection[str]) -> Any:
    """The configuration of a component of a local checkpoint; CheckpointError if it cannot be read, or is of a model
    that is none of the `allowed` types."""
    assert folder.local is not None, "a configuration is loaded from a local folder"
    name = folder.resolved.name
    try:
        config = AutoConfig.from_pretrained(folder.local / component, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {component} cannot be loaded: {error}") from error
    if config.model_type not in allowed:
        raise CheckpointError(
            f"{name}: {component} has model_type {config.model_type!r}; allowed: {', '.join(allowed)}"
        )
    return config


@contextmanager
def no_questions() -> Iterator[None]:
    """Where a library reads a checkpoint through transformers and cannot be told: code that the checkpoint brings is a
    ValueError, not a question to whoever sits at the terminal."""
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
