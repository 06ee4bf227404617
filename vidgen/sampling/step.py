"""The words that samplers and families share: a schedule, the start of a batch, how a step is guided, and random draws.

A sampler is one step, `(x, prediction, i, history, draws) -> (x, history)`: the loop over steps lives elsewhere, so a
step can be saved, cancelled, counted and split over ranks. Refuses to know any model: a prediction is a tensor.

Letters: B batch, S steps. Latents are fp32 and so is every step; coefficients are float64 numbers computed on the host
from the float32 levels that the reference schedulers also store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
"""Branches of the guidance: what is predicted for the prompt, and for the negative prompt."""
History: TypeAlias = dict[str, torch.Tensor]
"""What a sampler remembers between steps: named fp32 tensors [B, ...], so that it can be written as safetensors."""


class Draws:
    """Random numbers for a batch, each item from its own CPU generator in fp32.

    The item's numbers depend on its seed and on the order of draws alone, never on its neighbours in the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal [B, *shape], fp32, on the CPU; one call of `torch.randn((1, *shape))` an item."""
        drawn = [torch.randn((1, *shape), generator=g, dtype=torch.float32) for g in self.generators]
        return torch.cat(drawn, dim=0)

    def state(self) -> torch.Tensor:
        """State of every generator, uint8 [B, n]."""
        return torch.stack([g.get_state() for g in self.generators])

    def restore(self, state: torch.Tensor) -> None:
        """Sets every generator to a row of `state`, uint8 [B, n]; ValueError if B differs."""
        if len(state) != len(self.generators):
            raise ValueError(f"{len(state)} generator states for a batch of {len(self.generators)}")
        for generator, row in zip(self.generators, state, strict=True):
            generator.set_state(row.cpu().clone())  # set_state overlooks the storage offset of a view

    def item(self, b: int) -> Draws:
        """The draws of one item of the batch, going on where they are now."""
        one = Draws([0])
        one.generators = [self.generators[b]]
        return one


Sampler: TypeAlias = Callable[[torch.Tensor, torch.Tensor, int, History, Draws], tuple[torch.Tensor, History]]
"""(x [B, ...] fp32, prediction like x, step i, history, draws) -> (x at the next noise level, history)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels of S steps: x = alpha * clean + sigma * noise holds with (alpha, sigma) at a step's start and with
    (alpha_next, sigma_next) after it. `timesteps` is what the model is told. Tuples of S floats."""

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    alphas_next: tuple[float, ...]
    sigmas_next: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def tail(self, first: int) -> Schedule:
        """The steps from `first` on: what is left when a video to be changed stands for the steps before."""
        return Schedule(*(getattr(self, f.name)[first:] for f in fields(self)))

    @classmethod
    def flow(cls, timesteps: Sequence[float], sigmas: Sequence[float]) -> Schedule:
        """A rectified-flow schedule, alpha = 1 - sigma: S timesteps and S + 1 sigmas, the last after the last step."""
        levels = [float(np.float32(s)) for s in sigmas]
        alphas = [1.0 - s for s in levels]
        return cls(
            timesteps=tuple(float(t) for t in timesteps),
            alphas=tuple(alphas[:-1]),
            sigmas=tuple(levels[:-1]),
            alphas_next=tuple(alphas[1:]),
            sigmas_next=tuple(levels[1:]),
        )


@dataclass(frozen=True, slots=True)
class Start:
    """Where denoising of a batch begins: latents [B, ...] fp32, and the family's own conditioning of each branch.

    `pin` is (mask, value), both broadcastable to the latents: where mask is true the latents are held at value before
    each forward and after the last step.
    """

    latents: torch.Tensor
    conditioning: Mapping[str, Any]
    pin: tuple[torch.Tensor, torch.Tensor] | None = None

    def pinned(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.pin is None else torch.where(self.pin[0], self.pin[1], x)


@dataclass(frozen=True, slots=True)
class Guidance:
    """How one step of one item is guided: `scale` and `rescale` of `guide`, which `branches` are predicted (the
    conditional one first), and which transformer (`expert`) predicts them."""

    scale: float
    branches: tuple[str, ...]
    rescale: float = 0.0
    expert: str = "transformer"


def branches(guided: bool) -> tuple[str, ...]:
    """Of a step with classifier-free guidance, or without."""
    return (CONDITIONAL, UNCONDITIONAL) if guided else (CONDITIONAL,)


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor | None, scale: torch.Tensor, rescale: torch.Tensor
) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, in the form u + w (c - u)), in fp32.

    `conditional` and `unconditional` are [B, ...]; `scale` and `rescale` are [B]. Without an unconditional prediction
    the conditional one is the result. `rescale` in (0, 1] pulls the result's standard deviation towards the
    conditional one's (Lin et al. 2023, equations 15 and 16).
    """
    conditional = conditional.float()
    if unconditional is None:
        return conditional
    unconditional = unconditional.float()
    ones = (-1, *[1] * (conditional.ndim - 1))
    guided = unconditional + scale.view(ones) * (conditional - unconditional)
    if not bool(rescale.any()):
        return guided
    dims = tuple(range(1, conditional.ndim))
    matched = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    weight = rescale.view(ones)
    return torch.where(weight > 0, weight * matched + (1 - weight) * guided, guided)
