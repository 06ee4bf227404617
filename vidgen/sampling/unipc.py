"""UniPC on a flow prediction, and its spacing of the noise levels. Refuses to know any model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from vidgen.sampling.flow import shifted, stretched
from vidgen.sampling.step import Draws, History, Sampler, Schedule
from vidgen.specs.flow import FlowScheduler


def unipc_schedule(
    options: FlowScheduler, steps: int, *, shift: float | None = None, sigmas: Sequence[float] | None = None
) -> Schedule:
    """Flow sigmas as UniPCMultistepScheduler spaces them: S levels from 1 towards 1 / T, shifted.

    Explicit `sigmas` (length S) replace the spacing and are shifted too. The first is held 1e-6 below 1, where the
    log-SNR is finite. Timesteps are whole numbers: T sigma, truncated.
    """
    train = options.num_train_timesteps
    spaced = np.linspace(1, 1 / train, steps + 1)[:-1] if sigmas is None else np.array(sigmas, dtype=np.float64)
    levels = shifted(spaced, options.shift if shift is None else shift)
    if options.shift_terminal:
        levels = stretched(levels, options.shift_terminal)
    if abs(levels[0] - 1) < 1e-6:
        levels[0] -= 1e-6
    timesteps = (levels * train).astype(np.int64)
    last = levels[-1] if options.final_sigmas_type == "sigma_min" else 0.0
    return Schedule.flow(timesteps.tolist(), [*levels.tolist(), last])


def unipc(schedule: Schedule, options: FlowScheduler) -> Sampler:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2, data prediction, multistep) on a flow prediction.

    Each step first corrects x with the prediction made at it (UniC), then predicts the next x (UniP). History:
    `clean_0`, `clean_1`, ... the clean-sample predictions of the last steps, newest first, and `corrected`, the x from
    which the last predictor step started. Orders follow from i alone.
    """

    def order_at(i: int) -> int:
        wanted = min(options.solver_order, i + 1)
        return min(wanted, schedule.steps - i) if options.lower_order_final else wanted

    def step(
        x: torch.Tensor, prediction: torch.Tensor, i: int, history: History, draws: Draws
    ) -> tuple[torch.Tensor, History]:
        clean = x - schedule.sigmas[i] * prediction.float()
        cleans = [history[f"clean_{k}"] for k in range(min(i, options.solver_order))]
        if i > 0 and (i - 1) not in options.disable_corrector:
            x = _unic(schedule, options, i, order_at(i - 1), history["corrected"], clean, cleans)
        cleans = [clean, *cleans][: options.solver_order]
        following = _unip(schedule, options, i, order_at(i), x, cleans)
        return following, {"corrected": x} | {f"clean_{k}": value for k, value in enumerate(cleans)}

    return step


def _unip(
    schedule: Schedule, options: FlowScheduler, i: int, order: int, x: torch.Tensor, cleans: list[torch.Tensor]
) -> torch.Tensor:
    """The predictor: x at step i -> x at sigma_next[i], from clean predictions at steps i, i - 1, ..."""
    start, end = schedule.sigmas[i], schedule.sigmas_next[i]
    h = _half_log_snr(end) - _half_log_snr(start)
    if h == 0:
        return x
    result = end / start * x - (1 - end) * math.expm1(-h) * cleans[0]
    if order == 1:
        return result
    ratios = [(_half_log_snr(schedule.sigmas[i - k]) - _half_log_snr(start)) / h for k in range(1, order)]
    weights = [0.5] if order == 2 else _solve(ratios, h, options.solver_type)
    scale = (1 - end) * _bh(h, options.solver_type)
    for ratio, weight, clean in zip(ratios, weights, cleans[1:], strict=False):
        result = result - scale * weight / ratio * (clean - cleans[0])
    return result


def _unic(
    schedule: Schedule,
    options: FlowScheduler,
    i: int,
    order: int,
    x: torch.Tensor,
    clean: torch.Tensor,
    cleans: list[torch.Tensor],
) -> torch.Tensor:
    """The corrector: redoes the step from i - 1 (where x was) to i, now that the clean prediction at i is known.
    `cleans` are those at steps i - 1, i - 2, ..."""
    start, end = schedule.sigmas[i - 1], schedule.sigmas[i]
    h = _half_log_snr(end) - _half_log_snr(start)
    ratios = [(_half_log_snr(schedule.sigmas[i - 1 - k]) - _half_log_snr(start)) / h for k in range(1, order)]
    weights = [0.5] if order == 1 else _solve([*ratios, 1.0], h, options.solver_type)
    scale = (1 - end) * _bh(h, options.solver_type)
    result = end / start * x - (1 - end) * math.expm1(-h) * cleans[0]
    for ratio, weight, older in zip(ratios, weights, cleans[1:], strict=False):
        result = result - scale * weight / ratio * (older - cleans[0])
    return result - scale * weights[-1] * (clean - cleans[0])


def _half_log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(sigma) if sigma > 0 else math.inf


def _bh(h: float, solver_type: str) -> float:
    """B(h) of the paper, for data prediction: -h (bh1) or e^-h - 1 (bh2)."""
    return -h if solver_type == "bh1" else math.expm1(-h)


def _solve(ratios: list[float], h: float, solver_type: str) -> list[float]:
    """Weights rho of the extra points at `ratios` r_k, from sum_k r_k^(j-1) rho_k = j! phi_(j+1)(-h) (-h) / B(h) for
    j = 1, 2, ... (equation 5 of the paper, in its data-prediction form)."""
    hh, factorial = -h, 1
    phi = math.expm1(hh) / hh - 1
    rows, right = [], []
    for j in range(1, len(ratios) + 1):
        rows.append([r ** (j - 1) for r in ratios])
        right.append(phi * factorial / _bh(h, solver_type))
        factorial *= j + 1
        phi = phi / hh - 1 / factorial
    return [float(w) for w in np.linalg.solve(np.array(rows), np.array(right))]
