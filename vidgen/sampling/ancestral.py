"""Euler steps on a diffusion model's prediction, ancestral (with fresh noise at each step) and plain, as k-diffusion
has them (Karras et al. 2022; crowsonkb/k-diffusion, `sample_euler_ancestral` and `sample_euler`).

Latents explode instead of preserving variance: x = clean + sigma noise, so that alpha is 1 at every level and sigma is
k-diffusion's. The model was trained on variance-preserving inputs and is shown x times `input_scale`. Refuses to know
any checkpoint and any model.

Letters: B batch, T training timesteps, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from vidgen.sampling.diffusion import SPACINGS, clean_sample, spaced_timesteps
from vidgen.sampling.step import Draws, History, Sampler, Schedule

LOWEST_BAR = 2.0**-24
"""What stands for an alpha_bar of 0, so that the sigma of zero terminal SNR is 4096 and not infinite; the value of
EulerAncestralDiscreteScheduler."""


def noise_levels(bars: np.ndarray) -> np.ndarray:
    """sqrt((1 - alpha_bar) / alpha_bar) of the T training timesteps, float32 as the reference schedulers keep it."""
    bars = np.where(bars == 0, LOWEST_BAR, bars).astype(np.float32)
    return np.sqrt((1 - bars) / bars)


def spaced(spacing: str, steps: int, train: int, offset: int = 0) -> list[float]:
    """S falling timesteps, spaced as in table 2 of Lin et al. 2023: `linspace` from T - 1 to 0 and not rounded,
    `leading` and `trailing` whole; `offset` (steps_offset) moves the leading ones."""
    if spacing == "linspace":
        return [float(t) for t in np.linspace(0, train - 1, steps, dtype=np.float32)[::-1]]
    moved = offset if spacing == "leading" else 0
    return [float(t + moved) for t in spaced_timesteps(spacing, steps, train)]


def sigma_schedule(
    bars: np.ndarray, steps: int, *, spacing: str, offset: int = 0, timesteps: Sequence[float] | None = None
) -> Schedule:
    """Levels of S steps over T training levels `bars` (alpha_bar, falling); each step ends where the next one starts
    and the last at the clean sample. Explicit falling `timesteps` in [0, T - 1], which need not be whole, replace the
    spacing. Between whole timesteps sigma is interpolated linearly. ValueError if sigma would rise."""
    if spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing is {spacing!r}; allowed: {', '.join(SPACINGS)}")
    train = len(bars)
    told = spaced(spacing, steps, train, offset) if timesteps is None else [float(np.float32(t)) for t in timesteps]
    between = np.interp(told, np.arange(train), noise_levels(bars)).astype(np.float32)
    sigmas = [float(sigma) for sigma in between]
    for i, (before, after) in enumerate(pairwise(sigmas)):
        if after > before:
            raise ValueError(
                f"sigma rises from {before:.6g} to {after:.6g} after step {i + 1} of {steps}: zero terminal SNR stands "
                f"for a sigma of {LOWEST_BAR**-0.5:.0f}, below those next to it; allowed: fewer steps"
            )
    ones = (1.0,) * len(told)
    return Schedule(tuple(told), ones, tuple(sigmas), ones, (*sigmas[1:], 0.0))


def start_sigma(schedule: Schedule, spacing: str) -> float:
    """What the start noise is multiplied by. Leading timesteps do not begin at the last training level, so that what a
    clean sample would add to the variance is put in."""
    highest = max(schedule.sigmas)
    return math.sqrt(highest**2 + 1) if spacing == "leading" else highest


def input_scale(sigma: float) -> float:
    """1 / sqrt(sigma^2 + 1): what x is multiplied by before the model sees it."""
    return 1 / math.sqrt(sigma**2 + 1)


def denoised(kind: str, x: torch.Tensor, prediction: torch.Tensor, sigma: float) -> torch.Tensor:
    """The clean sample that a prediction (`epsilon` or `v_prediction`) made at sigma stands for."""
    alpha = input_scale(sigma)
    return clean_sample(kind, x * alpha, prediction, alpha, sigma * alpha)


def euler_ancestral(schedule: Schedule, prediction_type: str) -> Sampler:
    """A Euler step down to sigma_down, then fresh noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma_next^2.

    Noise of the latents' shape is drawn at each step, also at the last, where sigma_up is 0."""

    def step(
        x: torch.Tensor, prediction: torch.Tensor, i: int, history: History, draws: Draws
    ) -> tuple[torch.Tensor, History]:
        sigma, after = schedule.sigmas[i], schedule.sigmas_next[i]
        up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        down = math.sqrt(after**2 - up**2)
        slope = (x - denoised(prediction_type, x, prediction.float(), sigma)) / sigma
        noise = draws.normal(x.shape[1:]).to(x.device)
        return x + slope * (down - sigma) + noise * up, {}

    return step


def euler(schedule: Schedule, prediction_type: str) -> Sampler:
    """The plain Euler step, which draws nothing: dx / dsigma = (x - clean) / sigma."""

    def step(
        x: torch.Tensor, prediction: torch.Tensor, i: int, history: History, draws: Draws
    ) -> tuple[torch.Tensor, History]:
        sigma = schedule.sigmas[i]
        slope = (x - denoised(prediction_type, x, prediction.float(), sigma)) / sigma
        return x + slope * (schedule.sigmas_next[i] - sigma), {}

    return step
