"""Mochi as a whole and stage by stage against diffusers' MochiPipeline, on tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MochiPipeline
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from tests.models.mochi import tiny_checkpoint
from tests.models.oracle import STAGE, WHOLE, Build, assert_same_frames, native, opened, ours
from vidgen import engine
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.loop import State
from vidgen.models.mochi.pipeline import linear_quadratic
from vidgen.sampling.step import Draws
from vidgen.text.prompt import Prompt
from vidgen.types import Request

pytestmark = [pytest.mark.usefixtures("without_gradients"), pytest.mark.filterwarnings("ignore:In CPU autocast")]

PROMPT, NEGATIVE = "a red circle moving left", "blue &amp; green  dog"


def oracle(folder: Path, **options: Any) -> MochiPipeline:
    return opened(MochiPipeline, folder, **options)


def theirs(pipe: MochiPipeline, request: Request, **options: Any) -> Any:
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **{"output_type": "np", **options},
    ).frames[0]


def request(loaded: engine.Engine, prompt: str = PROMPT, **changes: Any) -> Request:
    values = {**tiny_checkpoint.SMALL, "negative_prompt": NEGATIVE, "num_inference_steps": 5, "seed": 7}
    return loaded.request(prompt, **values | changes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "100KB"},
        {"scheduler": {"invert_sigmas": True, "shift": 3.0}},
        {"scheduler": {"invert_sigmas": True, "shift_terminal": 0.1, "num_train_timesteps": 500}},
        {"transformer": {"num_layers": 1, "num_attention_heads": 3, "out_channels": 12}},
    ],
    ids=["plain", "sharded", "shift3", "terminal", "one_layer"],
)
@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_a_whole_video_is_the_oracles(build: Build, options: dict[str, Any], guidance: float) -> None:
    folder = build(**options)
    loaded = engine.load(str(folder))
    made = request(loaded, guidance_scale=guidance)
    assert_same_frames(ours(loaded, made)[0], theirs(oracle(folder), made))


@pytest.mark.parametrize("zero", [True, False], ids=["zeros", "its_closing_token"])
def test_an_empty_prompt_is_what_the_checkpoint_makes_of_it(build: Build, zero: bool) -> None:
    folder = build(zero_empty_prompt=zero)
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    assert loaded.spec.defaults("t2v", loaded.params)["negative_prompt"] == ""
    made = request(loaded, negative_prompt="")
    assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))
    made = request(loaded, prompt="", guidance_scale=1.0)
    assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))
    assert [text.tokens for text in native(loaded).encode_text([Prompt(""), Prompt(" ")])] == [0 if zero else 1, 1]


def test_an_empty_prompt_with_and_without_zeros_is_not_the_same(build: Build) -> None:
    videos = []
    for zero in (True, False):
        loaded = engine.load(str(build(zero_empty_prompt=zero)))
        videos.append(ours(loaded, request(loaded, negative_prompt=""))[0].astype(int))
    assert np.abs(videos[0] - videos[1]).max() > 2


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 64])
def test_noise_levels_are_the_oracles_inverted(build: Build, steps: int) -> None:
    folder = build()
    loaded, scheduler = engine.load(str(folder)), oracle(folder).scheduler
    spaced = linear_quadratic_schedule(steps, 0.025)
    assert linear_quadratic(steps) == pytest.approx(spaced, abs=1e-12)
    scheduler.set_timesteps(sigmas=spaced)
    schedule = native(loaded).schedule(request(loaded, num_inference_steps=steps))
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    levels = (1 - scheduler.sigmas.double()).tolist()
    # Ours are rounded to float32 once more; the levels lie within [0, 1].
    assert (*schedule.sigmas, schedule.sigmas_next[-1]) == pytest.approx(levels, abs=6e-8)
    assert schedule.sigmas[0] == 1.0 and schedule.timesteps[0] == 0.0 and schedule.sigmas_next[-1] == 0.0


def test_explicit_sigmas_and_shift_of_a_request_are_its_schedule(build: Build) -> None:
    loaded, scheduler = engine.load(str(build())), oracle(build()).scheduler
    sigmas = (1.0, 0.6, 0.2)
    for shift in (1.0, 4.0):
        made = request(loaded, sigmas=sigmas, shift=shift, num_inference_steps=3)
        schedule = native(loaded).schedule(made)
        scheduler.set_shift(shift)
        scheduler.set_timesteps(sigmas=list(sigmas))
        assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
        assert schedule.sigmas == pytest.approx([shift * s / (1 + (shift - 1) * s) for s in sigmas], abs=1e-6)
        assert len(ours(loaded, made)[0]) == 13


def test_one_step_of_explicit_sigmas_runs(build: Build) -> None:
    loaded = engine.load(str(build()))
    assert len(ours(loaded, request(loaded, sigmas=(1.0,), num_inference_steps=1, num_frames=1))[0]) == 1


def test_text_is_the_oracles(build: Build) -> None:
    folder = build()
    loaded = native(engine.load(str(folder)))
    for prompt in (PROMPT, "", NEGATIVE, "a red " * 300):
        expected, mask, _, _ = oracle(folder).encode_prompt([prompt], do_classifier_free_guidance=False)
        text = loaded.encode_text([Prompt(prompt)])[0]
        assert text.tokens == int(mask.sum()) <= 256
        assert float((expected[0, : text.tokens] - text.embedding).abs().max()) < STAGE


def test_one_prediction_is_the_oracles_negated(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    made, pipeline = request(loaded), native(loaded)
    schedule, draws = pipeline.schedule(made), Draws([made.seed])
    texts = {branch: pipeline.encode_text([prompt]) for branch, prompt in pipeline.texts(made, Conditioning()).items()}
    start = pipeline.begin([made], [Conditioning()], texts, schedule, draws)
    noise = torch.randn((1, 12, 3, 4, 6), generator=torch.Generator().manual_seed(made.seed))
    assert torch.equal(start.latents, noise)
    encoded = pipe.encode_prompt([PROMPT], [NEGATIVE])
    for branch, embedding, mask in (("conditional", *encoded[:2]), ("unconditional", *encoded[2:])):
        expected = pipe.transformer(noise, embedding, torch.tensor([schedule.timesteps[2]]), mask, return_dict=False)[0]
        found = pipeline.predict(noise, schedule, 2, start.conditioning[branch])
        assert expected.std() > 0.1
        assert float((expected + found).abs().max()) < STAGE


def test_latents_after_every_step_are_the_oracles(build: Build) -> None:
    folder = build()
    loaded = engine.load(str(folder))
    made = request(loaded)
    states: list[State] = []
    next(iter(loaded.generate([made], engine.Hooks(save=states.append))))
    expected: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        expected.append(values["latents"])
        return values

    theirs(oracle(folder), made, output_type="latent", callback_on_step_end=keep)
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    for state, latents in zip(states, expected, strict=True):
        assert float((state.latents - latents).abs().max()) < WHOLE
    assert float((states[0].latents - states[-1].latents).abs().max()) > 0.1


def test_decoding_is_the_oracles(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    latents = torch.randn((1, 12, 3, 4, 6), generator=torch.Generator().manual_seed(1))
    found = torch.cat(list(native(loaded).decode(latents, request(loaded), Draws([0]))))
    config = pipe.vae.config
    std, mean = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_std, config.latents_mean))
    video = pipe.vae.decode(latents * std / config.scaling_factor + mean, return_dict=False)[0]
    expected = pipe.video_processor.postprocess_video(video, output_type="np")[0]
    assert expected.std() > 0.05
    assert np.abs(found.numpy() - expected).max() < STAGE


def test_tiled_decoding_is_the_oracles_at_the_same_tiles(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    tiles = (32, 32, 16, 16)
    made = request(loaded, tiling=tiles)
    pipe.vae.enable_tiling(*tiles)
    tiled = ours(loaded, made)[0]
    assert_same_frames(tiled, theirs(pipe, made))
    assert np.abs(tiled.astype(int) - ours(loaded, request(loaded))[0].astype(int)).max() > 1


@pytest.mark.parametrize("zero", [True, False], ids=["zeros", "its_closing_token"])
def test_a_batch_of_prompts_of_different_lengths_is_each_by_itself(build: Build, zero: bool) -> None:
    folder = build(zero_empty_prompt=zero)
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    made = [
        request(loaded, seed=1),
        request(loaded, prompt="dog", seed=2, guidance_scale=3.0, negative_prompt=""),
        request(loaded, prompt="", seed=3),
    ]
    assert len({loaded.spec.batch_key(one, loaded.params) for one in made}) == 1
    for frames, one in zip(ours(loaded, *made), made, strict=True):
        assert_same_frames(frames, theirs(pipe, one))


def test_in_bf16_it_is_as_near_to_fp32_as_the_oracle_in_bf16(build: Build) -> None:
    folder = build(dtype=torch.bfloat16, seed=4)
    exact = theirs(oracle(folder, torch_dtype=torch.float32), request(engine.load(str(folder))))
    loaded = engine.load(str(folder))
    assert set(native(loaded).dtypes.values()) == {torch.bfloat16}
    half = theirs(oracle(folder, torch_dtype=torch.bfloat16), request(loaded))
    distance = np.abs(ours(loaded, request(loaded))[0] / 255.0 - exact).mean()
    # Rounding is random: equal on average, so 1.5 leaves room; uint8 adds 1/1020 on average.
    assert 0 < distance <= 1.5 * np.abs(half - exact).mean() + 1 / 1020


def test_frequencies_and_head_norms_stay_fp32_and_so_do_timesteps(build: Build) -> None:
    loaded = engine.load(str(build()), dtype="bfloat16")
    transformer = native(loaded).transformer
    dtypes = {name: weight.dtype for name, weight in transformer.named_parameters()}
    assert dtypes["transformer_blocks.0.ff.net.2.weight"] == torch.bfloat16
    for kept in ("pos_frequencies", *(f"transformer_blocks.2.attn1.norm_{n}.weight" for n in ("q", "added_k"))):
        assert dtypes[kept] == torch.float32
    seen: list[torch.Tensor] = []
    transformer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    made = request(loaded)
    ours(loaded, made)
    assert {t.dtype for t in seen} == {torch.float32}
    assert [float(t[0]) for t in seen[::2]] == list(native(loaded).schedule(made).timesteps)


def test_float16_is_refused(build: Build) -> None:
    with pytest.raises(CheckpointError, match="float16"):
        engine.load(str(build()), dtype="float16")
