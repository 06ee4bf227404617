"""Flow-matching schedules, sampler steps as functions with explicit state, the guidance formula, and random draws.

A sampler is one step, `(x, prediction, i, history, draws) -> (x, history)`: the loop over steps lives elsewhere, so a
step can be saved, cancelled, counted and split over ranks. Refuses to know any model: a prediction is a tensor.

Letters: B batch, S steps. Latents are fp32 and so is every step; coefficients are float64 numbers computed on the host
from the float32 sigmas that the reference schedulers also store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

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


@dataclass(frozen=True, slots=True)
class FlowOptions:
    """A flow-matching schedule and its solver, named as in scheduler_config.json, with `shift` for UniPC's flow_shift.

    A family's spec reads them from a checkpoint and refuses what is not one of these.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    shift_terminal: float | None = None
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "final_sigmas_type": ("zero", "sigma_min"),
            "solver_order": (1, 2, 3),
            "solver_type": ("bh1", "bh2"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"{key} is {getattr(self, key)!r}; allowed: {', '.join(map(str, values))}")
        if self.solver_order > 1 and self.final_sigmas_type == "zero" and not self.lower_order_final:
            raise ValueError(
                f"lower_order_final is False; solver_order {self.solver_order} down to a final sigma of zero needs it"
            )


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Timestep shifting of a flow schedule: s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Stretches 1 - sigma so that the last sigma is `terminal` (the `shift_terminal` of LTX-Video)."""
    rest = 1 - sigmas
    return 1 - rest / (rest[-1] / (1 - terminal))


def unipc_schedule(
    options: FlowOptions, steps: int, shift: float | None = None, sigmas: Sequence[float] | None = None
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


def euler_schedule(
    options: FlowOptions,
    steps: int,
    shift: float | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> Schedule:
    """Flow sigmas as FlowMatchEulerDiscreteScheduler spaces them: S levels from 1 to the shifted 1 / T, shifted again.

    Explicit `sigmas` or `timesteps` (length S) replace the spacing; the sigmas, given or timesteps / T, are shifted,
    given timesteps are told to the model as they are. Timesteps are T sigma in float32, not rounded.
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
    levels = shifted(spaced, by)
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


def unipc(schedule: Schedule, options: FlowOptions) -> Sampler:
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
    schedule: Schedule, options: FlowOptions, i: int, order: int, x: torch.Tensor, cleans: list[torch.Tensor]
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
    options: FlowOptions,
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
