"""Rectified-flow schedules and the Euler step on a velocity prediction.

Refuses to know which checkpoint has which scheduler (`vidgen.specs.flow` reads that) and any model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from vidgen.sampling.step import Draws, History, Sampler, Schedule
from vidgen.specs.flow import FlowScheduler


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Timestep shifting of a flow schedule: s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Stretches 1 - sigma so that the last sigma is `terminal` (the `shift_terminal` of LTX-Video)."""
    rest = 1 - sigmas
    return 1 - rest / (rest[-1] / (1 - terminal))


def dynamic_shift(options: FlowScheduler, tokens: int) -> float:
    """mu of a clip of so many tokens: the line through (base_image_seq_len, base_shift) and (max_image_seq_len,
    max_shift), as the pipelines with `use_dynamic_shifting` compute it."""
    slope = (options.max_shift - options.base_shift) / (options.max_image_seq_len - options.base_image_seq_len)
    return tokens * slope + (options.base_shift - slope * options.base_image_seq_len)


def time_shifted(sigmas: np.ndarray, mu: float, kind: str) -> np.ndarray:
    """Dynamic shifting: m / (m + 1 / sigma - 1) with m = e^mu (`exponential`, which is `shifted` by e^mu in another
    rounding) or m = mu (`linear`)."""
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1))


def euler_schedule(
    options: FlowScheduler,
    steps: int,
    *,
    shift: float | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Schedule:
    """Flow sigmas as FlowMatchEulerDiscreteScheduler spaces them: S levels from 1 to the shifted 1 / T, shifted again.

    Explicit `sigmas` or `timesteps` (length S) replace the spacing; the sigmas, given or timesteps / T, are shifted,
    given timesteps are told to the model as they are. `mu` shifts dynamically in place of `shift`. Timesteps are
    T sigma in float32, not rounded.
    """
    train, by = options.num_train_timesteps, options.shift if shift is None else shift
    spaced: np.ndarray
    if sigmas is not None:
        spaced = np.array(sigmas, dtype=np.float32)
    elif timesteps is not None:
        spaced = np.array(timesteps, dtype=np.float32) / train
    else:
        lowest = float(shifted(np.array(1 / train, dtype=np.float32), by))
        spaced = np.linspace(1.0 * train, lowest * train, steps) / train
    levels = shifted(spaced, by) if mu is None else time_shifted(spaced, mu, options.time_shift_type)
    if options.shift_terminal:
        levels = stretched(levels, options.shift_terminal)
    levels = levels.astype(np.float32)
    told = levels * np.float32(train) if timesteps is None else np.array(timesteps, dtype=np.float32)
    return Schedule.flow(told.tolist(), [*levels.tolist(), 0.0])


def euler(schedule: Schedule) -> Sampler:
    """The Euler step of a flow, dx/dsigma = prediction (Lipman et al. 2023): x + (sigma_next - sigma) prediction."""

    def step(
        x: torch.Tensor, prediction: torch.Tensor, i: int, history: History, draws: Draws
    ) -> tuple[torch.Tensor, History]:
        return x + (schedule.sigmas_next[i] - schedule.sigmas[i]) * prediction.float(), {}

    return step
