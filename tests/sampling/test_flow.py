"""Schedules and sampler steps agree with the reference schedulers; the guidance formula does what its papers say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from vidgen.sampling.flow import dynamic_shift, euler, euler_schedule
from vidgen.sampling.step import Draws, Sampler, Schedule, guide
from vidgen.sampling.unipc import unipc, unipc_schedule
from vidgen.specs.flow import FlowScheduler, flow_scheduler

SHAPE = (2, 3, 2, 4, 4)


def unipc_config(**changes: Any) -> dict[str, Any]:
    config = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "solver_order": 2,
        "solver_type": "bh2",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "disable_corrector": [],
    }
    return config | changes


def options_of(config: dict[str, Any]) -> FlowScheduler:
    return flow_scheduler(config)


def euler_config(**changes: Any) -> dict[str, Any]:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    return config | changes


def model(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a network, so that the errors of a wrong order show."""
    return torch.sin(x * (1 + timestep / 1000)) + 0.3 * x.roll(1, dims=-1)


def step_by_step(reference: Any, sampler: Sampler, schedule: Schedule) -> float:
    """Largest difference between the two trajectories, over all steps, relative to the reference's size."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs, ours, history, worst = start, start, {}, 0.0
    draws = Draws([0, 1])
    for i, t in enumerate(reference.timesteps):
        theirs = reference.step(model(theirs, float(t)), t, theirs, return_dict=False)[0]
        ours, history = sampler(ours, model(ours, schedule.timesteps[i]), i, history, draws)
        worst = max(worst, float((theirs - ours).abs().max() / theirs.abs().max()))
    return worst


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_unipc_schedule_is_the_reference_schedulers(shift: float, steps: int) -> None:
    reference = UniPCMultistepScheduler.from_config(unipc_config(flow_shift=shift))
    reference.set_timesteps(steps)
    schedule = unipc_schedule(options_of(unipc_config()), steps, shift=shift)
    assert schedule.timesteps == tuple(float(t) for t in reference.timesteps)
    assert schedule.sigmas + schedule.sigmas_next[-1:] == tuple(float(s) for s in reference.sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_schedule_is_the_reference_schedulers(shift: float, steps: int) -> None:
    reference = FlowMatchEulerDiscreteScheduler.from_config(euler_config(shift=shift))
    reference.set_timesteps(steps)
    schedule = euler_schedule(options_of(euler_config()), steps, shift=shift)
    # float32 numbers near 1000 lie 6e-5 apart: equal up to one of those.
    assert np.allclose(schedule.timesteps, reference.timesteps.numpy(), rtol=2e-7, atol=0)
    assert np.allclose(schedule.sigmas + schedule.sigmas_next[-1:], reference.sigmas.numpy(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("terminal", [None, 0.1])
def test_explicit_sigmas_and_the_terminal_are_used_as_the_reference_schedulers_use_them(terminal: float | None) -> None:
    sigmas = [1.0, 0.8, 0.5, 0.25]
    reference = UniPCMultistepScheduler.from_config(unipc_config(shift_terminal=terminal))
    reference.set_timesteps(sigmas=np.array(sigmas))
    schedule = unipc_schedule(options_of(unipc_config(shift_terminal=terminal)), 4, sigmas=sigmas)
    assert schedule.timesteps == tuple(float(t) for t in reference.timesteps)
    assert np.allclose(schedule.sigmas, reference.sigmas[:-1].numpy(), rtol=2e-7)
    flow = FlowMatchEulerDiscreteScheduler.from_config(euler_config(shift_terminal=terminal))
    flow.set_timesteps(sigmas=sigmas)
    levels = euler_schedule(options_of(euler_config(shift_terminal=terminal)), 4, sigmas=sigmas)
    assert np.allclose(levels.sigmas, flow.sigmas[:-1].numpy(), rtol=2e-7)
    assert np.allclose(levels.timesteps, flow.timesteps.numpy(), rtol=2e-7)


def test_explicit_timesteps_are_told_to_the_model_as_they_are() -> None:
    timesteps = [1000.0, 700.5, 250.25]
    reference = FlowMatchEulerDiscreteScheduler.from_config(euler_config())
    reference.set_timesteps(timesteps=timesteps)
    schedule = euler_schedule(options_of(euler_config()), 3, timesteps=timesteps)
    assert schedule.timesteps == tuple(timesteps)
    assert np.allclose(schedule.sigmas, reference.sigmas[:-1].numpy(), rtol=2e-7)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_unipc_agrees_with_the_reference_step_by_step(order: int, steps: int, shift: float) -> None:
    config = unipc_config(solver_order=order, flow_shift=shift)
    reference = UniPCMultistepScheduler.from_config(config)
    reference.set_timesteps(steps)
    options = options_of(config)
    schedule = unipc_schedule(options, steps)
    # Both work in fp32 on numbers of size 1 to 10; the reference also computes its coefficients in fp32.
    assert step_by_step(reference, unipc(schedule, options), schedule) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"disable_corrector": [0, 1]},
        {"solver_order": 1, "lower_order_final": False},
        {"num_train_timesteps": 500},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_unipc_options_do_what_they_do_in_the_reference(changes: dict[str, Any]) -> None:
    config = unipc_config(**changes)
    reference = UniPCMultistepScheduler.from_config(config)
    reference.set_timesteps(8)
    options = options_of(config)
    schedule = unipc_schedule(options, 8)
    assert step_by_step(reference, unipc(schedule, options), schedule) < 1e-4
    # ... and the option matters: without it the trajectory is another one.
    plain = options_of(unipc_config())
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    ends = []
    for chosen in (options, plain):
        plan = unipc_schedule(chosen, 8)
        x, history = start, {}
        for i in range(8):
            x, history = unipc(plan, chosen)(x, model(x, plan.timesteps[i]), i, history, Draws([0, 1]))
        ends.append(x)
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_euler_agrees_with_the_reference_step_by_step(steps: int, shift: float) -> None:
    reference = FlowMatchEulerDiscreteScheduler.from_config(euler_config(shift=shift))
    reference.set_timesteps(steps)
    schedule = euler_schedule(options_of(euler_config(shift=shift)), steps)
    assert step_by_step(reference, euler(schedule), schedule) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_perfect_denoiser_is_a_fixed_point_of_every_sampler(order: int) -> None:
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    options = options_of(unipc_config(solver_order=order))
    for schedule, sampler in (
        (s := unipc_schedule(options, 9), unipc(s, options)),
        (s := euler_schedule(options, 9), euler(s)),
    ):
        x, history = schedule.alphas[0] * clean + schedule.sigmas[0] * noise, {}
        for i in range(schedule.steps):
            x, history = sampler(x, (x - clean) / schedule.sigmas[i], i, history, Draws([0, 1]))
        assert torch.allclose(x, clean, atol=1e-5)  # fp32 rounding over nine steps


@pytest.mark.parametrize(
    ("key", "value"),
    [("solver_order", 4), ("solver_type", "heun"), ("lower_order_final", False), ("final_sigmas_type", "one")],
)
def test_an_option_that_no_solver_here_has_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        FlowScheduler(**{key: value})


def test_bh1_ends_at_sigma_zero_with_finite_latents() -> None:
    sampler_options = FlowScheduler(solver_type="bh1", shift=3.0)
    schedule = unipc_schedule(sampler_options, 6)
    x, history = torch.randn(SHAPE), {}
    for i in range(6):
        x, history = unipc(schedule, sampler_options)(x, model(x, schedule.timesteps[i]), i, history, Draws([0, 1]))
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [200, 1536, 8064])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_shifting_follows_the_number_of_tokens(kind: str, tokens: int, terminal: float | None) -> None:
    config = euler_config(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        time_shift_type=kind,
        shift_terminal=terminal,
    )
    reference = FlowMatchEulerDiscreteScheduler.from_config(config)
    options, sigmas = flow_scheduler(config), np.linspace(1.0, 1 / 7, 7)
    mu = dynamic_shift(options, tokens)
    assert mu == pytest.approx(0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024))
    reference.set_timesteps(sigmas=sigmas, mu=mu)
    schedule = euler_schedule(options, 7, sigmas=sigmas.tolist(), mu=mu)
    assert np.allclose(schedule.timesteps, reference.timesteps.numpy(), rtol=1e-6)
    assert step_by_step(reference, euler(schedule), schedule) < 1e-5


def test_the_tail_of_a_schedule_goes_on_where_the_whole_would_be() -> None:
    schedule = Schedule.flow([900.0, 600.0, 300.0], [0.9, 0.6, 0.3, 0.0])
    tail = schedule.tail(1)
    assert tail.timesteps == (600.0, 300.0)
    assert tail.sigmas == schedule.sigmas[1:] and tail.sigmas_next == schedule.sigmas_next[1:]
    assert tail.steps == 2


def test_the_draws_of_one_item_go_on_where_the_batch_left_them() -> None:
    batch, alone = Draws([3, 4]), Draws([4])
    batch.normal((2,)), alone.normal((2,))
    assert torch.equal(batch.item(1).normal((5,)), alone.normal((5,)))


def test_guidance_of_one_is_the_conditional_prediction_and_of_zero_the_unconditional() -> None:
    conditional, unconditional = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    scale = torch.tensor([1.0, 0.0, 5.0])
    guided = guide(conditional, unconditional, scale, torch.zeros(3))
    assert torch.allclose(guided[0], conditional[0], atol=1e-6)
    assert torch.equal(guided[1], unconditional[1])
    assert torch.allclose(guided[2], unconditional[2] + 5 * (conditional[2] - unconditional[2]))
    assert torch.equal(guide(conditional, None, scale, torch.zeros(3)), conditional)


def test_guidance_rescale_restores_the_conditional_standard_deviation_of_its_own_item_only() -> None:
    conditional, unconditional = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    plain = guide(conditional, unconditional, torch.tensor([6.0, 6.0]), torch.zeros(2))
    guided = guide(conditional, unconditional, torch.tensor([6.0, 6.0]), torch.tensor([1.0, 0.0]))
    assert math.isclose(float(guided[0].std()), float(conditional[0].std()), rel_tol=1e-5)
    assert torch.equal(guided[1], plain[1])


def test_guidance_works_in_fp32_whatever_the_predictions_dtype() -> None:
    conditional, unconditional = torch.randn(1, 8).bfloat16(), torch.randn(1, 8).bfloat16()
    guided = guide(conditional, unconditional, torch.tensor([5.0]), torch.zeros(1))
    assert guided.dtype == torch.float32
    assert torch.equal(guided, unconditional.float() + 5 * (conditional.float() - unconditional.float()))


def test_draws_of_an_item_do_not_depend_on_its_neighbours_and_can_be_restored() -> None:
    alone, together = Draws([7]), Draws([3, 7])
    first = together.normal((2, 3))
    assert torch.equal(alone.normal((2, 3))[0], first[1])
    assert torch.equal(first[1:], torch.randn((1, 2, 3), generator=torch.Generator().manual_seed(7)))
    state = together.state()
    following = together.normal((4,))
    together.restore(state)
    assert torch.equal(together.normal((4,)), following)
    with pytest.raises(ValueError, match="batch of 1"):
        alone.restore(state)
