"""Discrete schedules, DDIM and CogVideoX's DPM agree with the reference schedulers, step by step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from vidgen.sampling.diffusion import (
    PREDICTIONS,
    SPACINGS,
    add_noise,
    alpha_bars,
    betas,
    clean_sample,
    cogvideox_dpm,
    ddim,
    diffusion_schedule,
    spaced_timesteps,
)
from vidgen.sampling.step import Draws, Sampler, Schedule

SHAPE = (2, 3, 4, 5)
CLOSE = 1e-5
"""The references' coefficients are float32 for two of the three beta schedules; a step works in fp32 on both sides."""


def config(**changes: Any) -> dict[str, Any]:
    published = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0,
        "steps_offset": 0,
    }
    return published | changes


def bars_of(config: dict[str, Any]) -> np.ndarray:
    spread = betas(config["beta_schedule"], config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    return alpha_bars(
        spread, snr_shift_scale=config["snr_shift_scale"], zero_terminal_snr=config["rescale_betas_zero_snr"]
    )


def schedule_of(config: dict[str, Any], steps: int) -> Schedule:
    return diffusion_schedule(bars_of(config), steps, spacing=config["timestep_spacing"])


def model(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a network."""
    return torch.sin(x * (1 + timestep / 1000)) + 0.3 * x.roll(1, dims=-1)


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def ddim_distance(reference: Any, sampler: Sampler, schedule: Schedule, first: int = 0) -> float:
    """Largest difference between the two trajectories, relative to the reference's size."""
    theirs = ours = start()
    history: dict[str, torch.Tensor] = {}
    worst, draws = 0.0, Draws([5, 6])
    for i, t in enumerate(reference.timesteps[first:]):
        theirs = reference.step(model(theirs, float(t)), t, theirs, return_dict=False)[0]
        ours, history = sampler(ours, model(ours, schedule.timesteps[i]), i, history, draws)
        worst = max(worst, float((theirs - ours).abs().max() / theirs.abs().max()))
    return worst


def dpm_distance(reference: Any, sampler: Sampler, schedule: Schedule, first: int = 0) -> tuple[float, bool]:
    """As above, calling the reference as the pipelines do; and whether the generators end in the same state."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    theirs = ours = start()
    history: dict[str, torch.Tensor] = {}
    worst, draws, old = 0.0, Draws([5, 6]), None
    timesteps = reference.timesteps[first:]
    for i, t in enumerate(timesteps):
        back = timesteps[i - 1] if i > 0 else None
        theirs, old = reference.step(model(theirs, float(t)), old, t, back, theirs, generator=generators)
        ours, history = sampler(ours, model(ours, schedule.timesteps[i]), i, history, draws)
        assert history["clean"].shape == SHAPE and history["clean"].dtype == torch.float32
        worst = max(worst, float((theirs - ours).abs().max() / theirs.abs().max()))
    same = all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, draws.generators, strict=True))
    return worst, same


@pytest.mark.parametrize("snr", [1.0, 3.0])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_levels_are_the_reference_schedulers(kind: str, zero: bool, snr: float) -> None:
    options = config(beta_schedule=kind, rescale_betas_zero_snr=zero, snr_shift_scale=snr)
    reference = CogVideoXDDIMScheduler(**options).alphas_cumprod.double().numpy()
    # The cumulative product of a thousand float32 factors is off by about 1e-5.
    assert np.allclose(bars_of(options), reference, rtol=2e-5, atol=1e-6 if kind != "scaled_linear" else 0)
    assert (bars_of(options)[-1] == 0) == zero


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 150, 999, 1000])
def test_timesteps_are_the_reference_schedulers(steps: int, spacing: str) -> None:
    reference = CogVideoXDDIMScheduler(**config(timestep_spacing=spacing))
    reference.set_timesteps(steps)
    assert spaced_timesteps(spacing, steps, 1000) == reference.timesteps.tolist()


def test_every_step_count_has_that_many_falling_timesteps_of_the_training_range() -> None:
    for steps in range(1, 1001):
        timesteps = spaced_timesteps("trailing", steps, 1000)
        assert len(timesteps) == steps and timesteps[-1] >= 0 and timesteps[0] == 999
        assert all(a > b for a, b in pairwise(timesteps))
    reference = CogVideoXDDIMScheduler(**config())
    reference.set_timesteps(61)
    assert reference.timesteps.tolist() == [*spaced_timesteps("trailing", 61, 1000), -1], "the reference's own slip"


@pytest.mark.parametrize("snr", [1.0, 3.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 30, 50])
def test_ddim_agrees_with_the_reference_step_by_step(steps: int, prediction: str, spacing: str, snr: float) -> None:
    zero = prediction != "epsilon"  # Noise says nothing of the clean sample where there is only noise.
    options = config(
        prediction_type=prediction, timestep_spacing=spacing, snr_shift_scale=snr, rescale_betas_zero_snr=zero
    )
    reference = CogVideoXDDIMScheduler(**options)
    reference.set_timesteps(steps)
    schedule = schedule_of(options, steps)
    assert ddim_distance(reference, ddim(schedule, prediction), schedule) < CLOSE


@pytest.mark.parametrize("snr", [1.0, 3.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 50])
def test_dpm_agrees_with_the_reference_step_by_step(steps: int, prediction: str, spacing: str, snr: float) -> None:
    zero = prediction != "epsilon"
    options = config(
        prediction_type=prediction, timestep_spacing=spacing, snr_shift_scale=snr, rescale_betas_zero_snr=zero
    )
    reference = CogVideoXDPMScheduler(**options)
    reference.set_timesteps(steps)
    schedule = schedule_of(options, steps)
    worst, same_draws = dpm_distance(reference, cogvideox_dpm(schedule, prediction), schedule)
    assert worst < CLOSE
    assert same_draws, "as many numbers as the reference, in the same order"


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
def test_both_samplers_agree_on_the_other_beta_schedules(kind: str) -> None:
    options = config(beta_schedule=kind, rescale_betas_zero_snr=False)
    schedule = schedule_of(options, 8)
    reference, other = CogVideoXDDIMScheduler(**options), CogVideoXDPMScheduler(**options)
    reference.set_timesteps(8), other.set_timesteps(8)
    # These references compute their levels in float32.
    assert ddim_distance(reference, ddim(schedule, "v_prediction"), schedule) < 1e-4
    assert dpm_distance(other, cogvideox_dpm(schedule, "v_prediction"), schedule)[0] < 1e-4


@pytest.mark.parametrize("first", [1, 4, 9])
def test_a_tail_of_the_schedule_is_what_the_reference_does_with_fewer_timesteps(first: int) -> None:
    options = config()
    schedule = schedule_of(options, 10).tail(first)
    reference, other = CogVideoXDDIMScheduler(**options), CogVideoXDPMScheduler(**options)
    reference.set_timesteps(10), other.set_timesteps(10)
    assert ddim_distance(reference, ddim(schedule, "v_prediction"), schedule, first) < CLOSE
    worst, same_draws = dpm_distance(other, cogvideox_dpm(schedule, "v_prediction"), schedule, first)
    assert worst < CLOSE and same_draws


@pytest.mark.parametrize("snr", [1.0, 3.0])
def test_noise_is_added_at_the_level_where_the_schedule_starts(snr: float) -> None:
    options = config(snr_shift_scale=snr)
    reference = CogVideoXDDIMScheduler(**options)
    reference.set_timesteps(10)
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for first in (0, 3, 9):
        timestep = reference.timesteps[first : first + 1].repeat(SHAPE[0])
        expected = reference.add_noise(clean, noise, timestep)
        assert torch.allclose(add_noise(clean, noise, schedule_of(options, 10).tail(first)), expected, atol=1e-6)


def test_explicit_timesteps_end_where_the_next_one_starts_and_the_last_at_the_clean_sample() -> None:
    bars = bars_of(config())
    schedule = diffusion_schedule(bars, 3, spacing="trailing", timesteps=(999, 500, 20))
    assert schedule.timesteps == (999.0, 500.0, 20.0)
    assert schedule.alphas_next == (*schedule.alphas[1:], 1.0) and schedule.sigmas_next[-1] == 0
    assert schedule.alphas == tuple(math.sqrt(bars[t]) for t in (999, 500, 20))
    spaced = diffusion_schedule(bars, 5, spacing="trailing")
    assert diffusion_schedule(bars, 5, spacing="leading", timesteps=spaced.timesteps) == spaced


@pytest.mark.parametrize("make", [ddim, cogvideox_dpm])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_perfect_denoiser_reaches_the_clean_sample(make: Any, prediction: str) -> None:
    schedule = schedule_of(config(), 9)
    schedule = diffusion_schedule(bars_of(config()), 9, spacing="trailing", timesteps=schedule.timesteps)
    clean, x = torch.randn(SHAPE), start()
    sampler, history, draws = make(schedule, prediction), {}, Draws([1, 2])
    for i in range(9):
        alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
        right = clean if prediction == "sample" else (alpha * x - clean) / sigma
        assert torch.allclose(clean_sample(prediction, x, right, alpha, sigma), clean, atol=1e-5)
        x, history = sampler(x, right, i, history, draws)
        assert bool(torch.isfinite(x).all())
    assert torch.allclose(x, clean, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: betas("cosine", 10, 0.1, 0.2), "beta_schedule is 'cosine'"),
        (lambda: spaced_timesteps("karras", 10, 1000), "timestep_spacing is 'karras'"),
        (lambda: clean_sample("flow", start(), start(), 0.5, 0.5), "prediction_type is 'flow'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_allowed_ones(call: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}; allowed: "):
        call()
