"""The device a model runs on: which one a name means, and how it says that its memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vidgen.errors import CapacityError, ConfigError


def device_named(device: str) -> torch.device:
    """auto (the GPU if there is one), cpu, cuda or cuda:N; ConfigError for one that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"engine.device: {device!r} is not a device; allowed: auto, cpu, cuda, cuda:N") from error
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device: {device!r} is not supported; allowed: auto, cpu, cuda, cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine.device: {device!r} is not there; this machine has {torch.cuda.device_count()} GPUs")
    return place


@contextmanager
def memory_errors(device: torch.device, what: str) -> Iterator[None]:
    """Turns every way of running out of memory into CapacityError, with the numbers."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = str(error)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        text = str(error)
    else:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise CapacityError(f"out of memory with {what}: {' '.join(text.split())}")
