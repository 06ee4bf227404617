"""Variance-preserving diffusion on a discrete schedule: its levels, DDIM, and the DPM-Solver++ SDE of CogVideoX.

Levels are named as everywhere here: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar). With zero terminal SNR the
first alpha is 0, so that every formula is written to hold there. Refuses to know any checkpoint and any model.

Letters: B batch, T training timesteps, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vidgen.sampling.step import Draws, History, Sampler, Schedule

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def betas(kind: str, train: int, start: float, end: float) -> np.ndarray:
    """Noise variances of the T training timesteps, float64: evenly spaced (`linear`), evenly spaced in their square
    roots (`scaled_linear`), or the capped squared cosine of Nichol and Dhariwal 2021 (`squaredcos_cap_v2`), which
    takes no start and end."""
    if kind == "linear":
        return np.linspace(start, end, train)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, train) ** 2
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((i / train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train + 1)]
        return np.array([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(train)])
    raise ValueError(f"beta_schedule is {kind!r}; allowed: {', '.join(BETA_SCHEDULES)}")


def alpha_bars(betas: np.ndarray, *, snr_shift_scale: float = 1.0, zero_terminal_snr: bool = False) -> np.ndarray:
    """alpha_bar of the T training timesteps, float64.

    `snr_shift_scale` s divides every SNR by s, a / (s + (1 - s) a) (CogVideoX, after Esser et al. 2024). With
    `zero_terminal_snr` the square roots are then shifted and scaled so that the last one is exactly 0 (Lin et al.
    2023, algorithm 1).
    """
    bars = np.cumprod(1.0 - betas)
    bars = bars / (snr_shift_scale + (1 - snr_shift_scale) * bars)
    if not zero_terminal_snr:
        return bars
    roots = np.sqrt(bars)
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))) ** 2


def spaced_timesteps(spacing: str, steps: int, train: int) -> list[int]:
    """S falling timesteps in [0, T), spaced as in table 2 of Lin et al. 2023.

    For some S the reference's `trailing` arithmetic ends in one step too many, at timestep -1, by rounding; that step
    is left out.
    """
    if spacing == "trailing":
        return (np.round(np.arange(train, 0, -(train / steps))).astype(np.int64)[:steps] - 1).tolist()
    if spacing == "leading":
        return (np.arange(steps)[::-1] * (train // steps)).tolist()
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps).round()[::-1].astype(np.int64).tolist()
    raise ValueError(f"timestep_spacing is {spacing!r}; allowed: {', '.join(SPACINGS)}")


def diffusion_schedule(
    bars: np.ndarray, steps: int, *, spacing: str, timesteps: Sequence[float] | None = None
) -> Schedule:
    """Levels of S steps over the T training levels `bars`; the last step ends at the clean sample.

    A spaced step ends T // S timesteps below its start, which is where the reference puts it even if the next step
    starts elsewhere (S does not divide T), and is clean below 0. Explicit `timesteps`, falling whole numbers in
    [0, T), replace the spacing; each of their steps ends where the next one starts.
    """
    train = len(bars)
    if timesteps is None:
        starts = spaced_timesteps(spacing, steps, train)
        ends = [t - train // steps for t in starts]
    else:
        starts = [int(t) for t in timesteps]
        ends = [*starts[1:], -1]
    before = [float(bars[t]) for t in starts]
    after = [float(bars[t]) if t >= 0 else 1.0 for t in ends]
    return Schedule(
        timesteps=tuple(float(t) for t in starts),
        alphas=tuple(math.sqrt(bar) for bar in before),
        sigmas=tuple(math.sqrt(1 - bar) for bar in before),
        alphas_next=tuple(math.sqrt(bar) for bar in after),
        sigmas_next=tuple(math.sqrt(1 - bar) for bar in after),
    )


def add_noise(clean: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """x [B, ...] where the schedule starts: alpha clean + sigma noise."""
    return schedule.alphas[0] * clean + schedule.sigmas[0] * noise


def clean_sample(kind: str, x: Tensor, prediction: Tensor, alpha: float, sigma: float) -> Tensor:
    """The clean sample that a prediction at (alpha, sigma) stands for: of the noise (`epsilon`), of the clean sample
    itself (`sample`), or of v = alpha noise - sigma clean (`v_prediction`, Salimans and Ho 2022, appendix D)."""
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return alpha * x - sigma * prediction
    raise ValueError(f"prediction_type is {kind!r}; allowed: {', '.join(PREDICTIONS)}")


def ddim(schedule: Schedule, prediction_type: str) -> Sampler:
    """DDIM without noise (Song et al. 2020, equation 12 with sigma_t = 0), in the form
    sigma' / sigma x + (alpha' - alpha sigma' / sigma) clean of CogVideoXDDIMScheduler."""

    def step(x: Tensor, prediction: Tensor, i: int, history: History, draws: Draws) -> tuple[Tensor, History]:
        alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
        clean = clean_sample(prediction_type, x, prediction.float(), alpha, sigma)
        kept = schedule.sigmas_next[i] / sigma
        return kept * x + (schedule.alphas_next[i] - alpha * kept) * clean, {}

    return step


def cogvideox_dpm(schedule: Schedule, prediction_type: str) -> Sampler:
    """SDE-DPM-Solver++ (Lu et al. 2022), multistep of order 2, as CogVideoXDPMScheduler has it.

    The first step and one that ends at the clean sample are of order 1. Each step draws noise of the latents' shape
    once, and a step of order 2 draws once more and uses the second. History: `clean`, the clean sample of the step
    before, [B, ...] fp32.
    """

    def step(x: Tensor, prediction: Tensor, i: int, history: History, draws: Draws) -> tuple[Tensor, History]:
        alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
        clean = clean_sample(prediction_type, x, prediction.float(), alpha, sigma)
        before, end = half_log_snr(alpha, sigma), half_log_snr(schedule.alphas_next[i], schedule.sigmas_next[i])
        h = end - before
        noise, target = draws.normal(x.shape[1:]), clean
        if i > 0 and schedule.sigmas_next[i] > 0:
            ratio = (before - half_log_snr(schedule.alphas[i - 1], schedule.sigmas[i - 1])) / h
            target = (1 + 1 / (2 * ratio)) * clean - 1 / (2 * ratio) * history["clean"]
            noise = draws.normal(x.shape[1:])
        kept = schedule.sigmas_next[i] / sigma * math.exp(-h)
        drawn = schedule.sigmas_next[i] * math.sqrt(-math.expm1(-2 * h))
        x = kept * x - math.expm1(-2 * h) * schedule.alphas_next[i] * target + drawn * noise.to(x.device)
        return x, {"clean": clean}

    return step


def half_log_snr(alpha: float, sigma: float) -> float:
    """log(alpha / sigma); -inf without signal and +inf without noise."""
    if alpha == 0:
        return -math.inf
    return math.log(alpha / sigma) if sigma > 0 else math.inf
