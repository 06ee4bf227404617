"""What is recorded of one side as it runs: what it made, its seconds and its peak memory.

Refuses to know which side.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vidgen.parallel import Ranks
from vidgen.parity.report import Report
from vidgen.sampling.step import Draws, Start
from vidgen.types import Request


@dataclass(slots=True)
class Trace:
    """What one side did: embeddings as the transformer got them, latents after each step, frames [F, H, W, 3]; of ours
    also where it began, its decoder, and the generator's state as decoding began."""

    texts: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    frames: Tensor | None = None
    moments: tuple[Tensor, Tensor] | None = None
    step_times: list[float] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    decode: Callable[[Tensor, Request, Draws, Ranks], Iterator[Tensor]] | None = None
    drawn: Tensor | None = None


def clip_of(frames: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[F, H, W, 3] in [0, 1] -> [1, 3, F, H, W] in [-1, 1]."""
    return (frames.permute(3, 0, 1, 2)[None] * 2 - 1).to(device, dtype)


@contextmanager
def measured(report: Report, side: str, device: torch.device) -> Iterator[None]:
    """Peak memory of what happens inside, and nothing left of it afterwards."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        page = 4096
        while not done.wait(0.05):
            peak[0] = max(peak[0], int(Path("/proc/self/statm").read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/statm").exists():
        watcher.start()
    yield
    done.set()
    report.bytes[side] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak[0]
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def a_step(times: Sequence[float]) -> float:
    """Seconds a step, the first left out: it holds what is done once."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else math.nan
