"""Signs of life of a pipeline that knows nothing of us: hooks on its networks count steps, tell the time and cancel.

Not every pipeline has callbacks; every one calls its networks. Refuses to know what they compute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vidgen.errors import Cancelled
from vidgen.types import Hooks

DENOISERS = ("transformer", "transformer_2", "unet")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")


class Watch:
    """One generation as it goes: `seconds` of encode, denoise and decode, and `forwards` of the denoiser.

    A step is a run of forwards at one timestep, so guidance in two forwards is one step; a pipeline that takes more
    steps than it was asked for (Text2Video-Zero goes back in time) shows as many as it takes.
    """

    def __init__(self, hooks: Hooks, steps: int, device: torch.device) -> None:
        self.hooks, self.steps, self.device = hooks, steps, device
        self.forwards, self.step = 0, 0
        self.seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self._stage, self._since = "encode", time.perf_counter()
        self._timestep: float | None = None

    def finish(self) -> None:
        """Closes the last stage's time."""
        self._enter("decode")
        self._enter("")

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Hooks on the pipeline's networks for as long as the block runs."""
        handles = []
        for name in DENOISERS:
            if isinstance(network := getattr(pipe, name, None), nn.Module):
                handles.append(network.register_forward_pre_hook(self._denoiser, with_kwargs=True))
        for name in ENCODERS:
            if isinstance(network := getattr(pipe, name, None), nn.Module):
                handles.append(network.register_forward_pre_hook(self._encoder))
        decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
        if isinstance(decoder, nn.Module):
            handles.append(decoder.register_forward_pre_hook(self._decoder))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _encoder(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._alive("encode", 0, 1)

    def _denoiser(self, network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._enter("denoise")
        self.forwards += 1
        at = _number(named.get("timestep", arguments[1] if len(arguments) > 1 else None))
        if at is None or at != self._timestep:
            self.step += 1
        self._timestep = at
        self._alive("denoise", self.step, max(self.steps, self.step))

    def _decoder(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.forwards:  # a VAE may decode for other reasons before
            self._enter("decode")
            self._alive("decode", 0, 1)

    def _alive(self, stage: str, step: int, steps: int) -> None:
        if self.hooks.cancelled():
            raise Cancelled(f"{stage}, step {step} of {steps}")
        self.hooks.progress(stage, step, steps)

    def _enter(self, stage: str) -> None:
        if stage == self._stage:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now


def _number(timestep: Any) -> float | None:
    """The largest entry: pipelines that hold frames still give those a timestep of 0."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max()) if timestep.numel() else None
    return float(timestep) if isinstance(timestep, (int, float)) else None
