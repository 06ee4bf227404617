"""Which components of a pipeline are in the device's memory: all of them, or only the one that works.

A component is a network that a pipeline holds: a text encoder, a transformer, one of two experts, a VAE. Sparing moves
no number: the same weights do the same work in the same place, and a component comes back as soon as any part of it is
called. Refuses to know what the networks are, and when memory is short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Residency:
    """The components of `pipeline`, which are all on `device` at first, or all on the CPU, to be brought there."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.device = device
        self.components = dict(_components(pipeline))
        self.sparing = False
        self.resident = ""
        """While sparing: the component that is on the device."""
        self._weights: dict[str, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self._hooks: list[Any] = []

    def spare(self) -> None:
        """From now on a component is on the device only while it works; its weights stay in the CPU's memory too."""
        assert not self.sparing
        self.sparing, self.resident = True, ""
        for name, module in self.components.items():
            _move_buffers(module, self.device)
            self._weights[name] = [(p, p.data.to("cpu")) for p in module.parameters()]
            self._send_away(name)
            for part in module.modules():
                self._hooks.append(part.register_forward_pre_hook(self._caller(name)))

    def settle(self) -> None:
        """All components are on the device again, and stay there."""
        assert self.sparing
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name in self.components:
            self._bring(name)
        self._weights.clear()
        self.sparing, self.resident = False, ""

    def _caller(self, name: str) -> Any:
        def called(module: nn.Module, args: Any) -> None:
            if self.resident != name:
                if self.resident:
                    self._send_away(self.resident)
                self.resident = ""
                self._bring(name)
                self.resident = name

        return called

    def _bring(self, name: str) -> None:
        with torch.inference_mode(False):
            try:
                for parameter, weight in self._weights[name]:
                    parameter.data = weight.to(self.device)
            except BaseException:
                self._send_away(name)
                raise

    def _send_away(self, name: str) -> None:
        """What takes the weights' place is empty, and on the device: whoever asks a component where it is is told so,
        and whoever uses a weight without calling a part of the component finds that it is not there."""
        with torch.inference_mode(False):
            for parameter, weight in self._weights[name]:
                parameter.data = torch.empty(0, dtype=weight.dtype, device=self.device)


def _components(holder: Any, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, nn.Module]]:
    """(name, network) of each that an object holds: itself, in a mapping, or in an object it holds. A network in two
    places is in the first."""
    seen: set[int] = set()
    for name, value in vars(holder).items():
        for inner, module in _networks(f"{prefix}{name}", value, depth):
            if id(module) not in seen:
                seen.add(id(module))
                yield inner, module


def _networks(name: str, value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, nn.Module):
                yield f"{name}.{key}", inner
    elif depth and type(value).__module__.startswith("vidgen.text"):
        yield from _components(value, f"{name}.", depth - 1)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
