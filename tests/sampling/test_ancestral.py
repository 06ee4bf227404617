"""Euler ancestral and Euler on a diffusion model's prediction agree with the reference schedulers, step by step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from vidgen.sampling.ancestral import (
    euler,
    euler_ancestral,
    input_scale,
    noise_levels,
    sigma_schedule,
    start_sigma,
)
from vidgen.sampling.diffusion import alpha_bars, betas
from vidgen.sampling.step import Draws, Sampler, Schedule

SHAPE = (2, 3, 4, 5)
CLOSE = 1e-5
"""Ours are computed in float64 and rounded; the reference rounds a cumulative product a thousand times."""
CLOSE_AFTER_A_LEAP = 1e-4
"""From sigma 157 to next to nothing in one step: what is left of x has lost two of fp32's seven digits, both sides."""
CLOSE_FROM_FAR = 5e-4
"""The same from a sigma of 4,096 (zero SNR, where the reference goes from alpha_bar to beta and back) or 20,000."""
SAMPLERS = {"euler_ancestral": (EulerAncestralDiscreteScheduler, euler_ancestral)}
SAMPLERS["euler"] = (EulerDiscreteScheduler, euler)


def config(**changes: Any) -> dict[str, Any]:
    published = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    return published | changes


def bars_of(options: dict[str, Any]) -> np.ndarray:
    spread = betas(options["beta_schedule"], options["num_train_timesteps"], options["beta_start"], options["beta_end"])
    return alpha_bars(spread, zero_terminal_snr=options["rescale_betas_zero_snr"])


def schedule_of(options: dict[str, Any], steps: int, **given: Any) -> Schedule:
    return sigma_schedule(
        bars_of(options), steps, spacing=options["timestep_spacing"], offset=options["steps_offset"], **given
    )


def model(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a network."""
    return torch.sin(x * (1 + timestep / 1000)) + 0.3 * x.roll(1, dims=-1)


def distance(reference: Any, sampler: Sampler, schedule: Schedule, spacing: str) -> tuple[float, bool]:
    """Largest difference between the two trajectories, relative to the reference's size at that step, calling the
    reference as the pipeline does; and whether the generators end in the same state."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs, ours = start * reference.init_noise_sigma, start * start_sigma(schedule, spacing)
    worst = float((theirs - ours).abs().max() / theirs.abs().max())
    generators, draws = [torch.Generator().manual_seed(seed) for seed in (5, 6)], Draws([5, 6])
    history: dict[str, torch.Tensor] = {}
    assert len(reference.timesteps) == schedule.steps
    for i, t in enumerate(reference.timesteps):
        guess = model(reference.scale_model_input(theirs, t), float(t))
        theirs = reference.step(guess, t, theirs, generator=generators, return_dict=False)[0]
        guess = model(ours * input_scale(schedule.sigmas[i]), schedule.timesteps[i])
        ours, history = sampler(ours, guess, i, history, draws)
        assert history == {} and ours.dtype == torch.float32
        worst = max(worst, float((theirs - ours).abs().max() / theirs.abs().max()))
    same = all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, draws.generators, strict=True))
    return worst, same


@pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero_snr"])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_levels_are_the_reference_schedulers(kind: str, zero: bool) -> None:
    options = config(beta_schedule=kind, rescale_betas_zero_snr=zero)
    reference = EulerAncestralDiscreteScheduler(**options).sigmas.numpy()[:-1][::-1]
    # 1 - alpha_bar of the lowest levels loses four digits in float32, which is next to nothing beside x itself.
    assert np.allclose(noise_levels(bars_of(options)), reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 100, 999, 1000])
def test_timesteps_are_the_reference_schedulers_to_the_bit(steps: int, spacing: str, offset: int) -> None:
    options = config(timestep_spacing=spacing, steps_offset=offset)
    reference = EulerAncestralDiscreteScheduler(**options)
    reference.set_timesteps(steps)
    assert list(schedule_of(options, steps).timesteps) == reference.timesteps.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 5, 30, 100])
def test_each_step_is_the_references(name: str, steps: int, prediction: str, spacing: str) -> None:
    options = config(prediction_type=prediction, timestep_spacing=spacing, steps_offset=1)
    cls, make = SAMPLERS[name]
    reference = cls(**options)
    reference.set_timesteps(steps)
    schedule = schedule_of(options, steps)
    worst, same_draws = distance(reference, make(schedule, prediction), schedule, spacing)
    assert worst < (CLOSE if steps > 2 else CLOSE_AFTER_A_LEAP)
    assert same_draws, "as many numbers as the reference, in the same order"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero_snr"])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_each_step_is_the_references_on_every_noise_schedule(name: str, kind: str, zero: bool) -> None:
    options = config(beta_schedule=kind, rescale_betas_zero_snr=zero, prediction_type="v_prediction")
    options |= {"timestep_spacing": "trailing"}
    cls, make = SAMPLERS[name]
    reference = cls(**options)
    reference.set_timesteps(20)
    schedule = schedule_of(options, 20)
    assert not zero or schedule.sigmas[0] == pytest.approx(4096, rel=1e-6)
    worst, same_draws = distance(reference, make(schedule, "v_prediction"), schedule, "trailing")
    assert worst < CLOSE_FROM_FAR and same_draws


@pytest.mark.parametrize("timesteps", [(999, 500, 20), (900.5, 333.25, 1.0, 0.5)])
def test_explicit_timesteps_are_the_references_schedule(timesteps: tuple[float, ...]) -> None:
    # EulerAncestralDiscreteScheduler takes none; the other has the same levels.
    reference = EulerDiscreteScheduler(**config())
    reference.set_timesteps(timesteps=list(timesteps))
    schedule = schedule_of(config(), len(timesteps), timesteps=timesteps)
    assert schedule.timesteps == tuple(float(t) for t in timesteps)
    assert np.allclose((*schedule.sigmas, 0.0), reference.sigmas, rtol=1e-4, atol=2e-6)
    worst, _ = distance(reference, euler(schedule, "epsilon"), schedule, "linspace")
    assert worst < CLOSE


def test_a_step_ends_where_the_next_one_starts_and_alpha_is_one() -> None:
    schedule = schedule_of(config(), 9)
    assert schedule.sigmas_next == (*schedule.sigmas[1:], 0.0)
    assert set(schedule.alphas + schedule.alphas_next) == {1.0}
    assert all(a > b for a, b in pairwise(schedule.sigmas))


def test_no_step_count_has_a_step_beyond_the_training_range() -> None:
    for steps in range(1, 1001):
        schedule = schedule_of(config(timestep_spacing="trailing"), steps)
        assert schedule.steps == steps and schedule.timesteps[-1] >= 0
    reference = EulerAncestralDiscreteScheduler(**config(timestep_spacing="trailing"))
    reference.set_timesteps(61)
    assert len(reference.timesteps) == 62 and reference.timesteps[-1] == -1, "the reference's own slip"


@pytest.mark.parametrize("make", [euler_ancestral, euler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_reaches_the_clean_sample(make: Any, prediction: str) -> None:
    schedule = schedule_of(config(), 12)
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    x = clean + schedule.sigmas[0] * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    sampler, draws, history = make(schedule, prediction), Draws([1, 2]), {}
    for i, sigma in enumerate(schedule.sigmas):
        noise = (x - clean) / sigma
        right = noise if prediction == "epsilon" else (noise - sigma * clean) * input_scale(sigma)
        x, history = sampler(x, right, i, history, draws)
    # At sigma 157, where it begins, a sample of order 1 keeps five digits.
    assert torch.allclose(x, clean, atol=1e-4)


def test_only_the_ancestral_step_draws_and_it_draws_at_the_last_step_too() -> None:
    schedule = schedule_of(config(), 1)
    for make, drawn in ((euler, False), (euler_ancestral, True)):
        draws = Draws([3])
        before = draws.state()
        make(schedule, "epsilon")(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), 0, {}, draws)
        assert torch.equal(before, draws.state()) != drawn
        if drawn:
            other = Draws([3])
            other.normal((2, 2))
            assert torch.equal(other.state(), draws.state())


def test_the_start_of_leading_timesteps_has_the_variance_of_a_clean_sample_too() -> None:
    schedule = schedule_of(config(timestep_spacing="leading"), 10)
    assert start_sigma(schedule, "leading") == pytest.approx(math.hypot(schedule.sigmas[0], 1))
    assert start_sigma(schedule, "linspace") == schedule.sigmas[0]


def test_a_schedule_that_would_rise_is_refused_where_the_reference_gives_nan() -> None:
    options = config(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"sigma rises from 4096 to 7668.* after step 1 of 500.* fewer steps"):
        schedule_of(options, 500)
    reference = EulerAncestralDiscreteScheduler(**options)
    reference.set_timesteps(500)
    x = reference.scale_model_input(torch.ones(SHAPE), reference.timesteps[0])
    assert bool(reference.step(x, reference.timesteps[0], x, return_dict=False)[0].isnan().all())
    assert schedule_of(options, 200).steps == 200


def test_an_unknown_spacing_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="timestep_spacing is 'karras'; allowed: trailing, leading, linspace"):
        schedule_of(config(timestep_spacing="karras"), 5)
