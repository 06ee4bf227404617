"""Allegro as a whole and stage by stage against diffusers' AllegroPipeline, on tiny random checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AllegroPipeline, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from tests.models.allegro import tiny_checkpoint
from tests.models.oracle import STAGE, WHOLE, Build, native, opened, ours
from vidgen import engine
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError, ConfigError
from vidgen.sampling.step import Draws
from vidgen.types import Request

pytestmark = pytest.mark.usefixtures("without_gradients")

SIZE = {"height": 128, "width": 128, "num_frames": 24}
PROMPT, NEGATIVE = "A red circle moving left", "blue and  green DOG"
RAW = {"clean_caption": False}


def oracle(folder: Path, **options: Any) -> AllegroPipeline:
    pipe = opened(AllegroPipeline, folder, **options)
    pipe.vae.enable_tiling()
    return pipe


def theirs(pipe: AllegroPipeline, request: Request, **options: Any) -> Any:
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        clean_caption=bool(request.param("clean_caption")),
        generator=torch.Generator().manual_seed(request.seed),
        **{"output_type": "np", **options},
    ).frames[0]


def latents_of(loaded: engine.Engine, *requests: Request) -> torch.Tensor:
    """After the last step: decoding, which is compared on its own, takes most of the time."""
    states: list[Any] = []
    next(iter(loaded.generate(requests, engine.Hooks(save=states.append))))
    return states[-1].latents


def assert_same_latents(mine: torch.Tensor, other: torch.Tensor) -> None:
    assert mine.shape == other.shape
    assert float(other.std()) > 0.1
    assert float((mine - other).abs().max() / other.abs().max()) < WHOLE


def request(loaded: engine.Engine, **changes: Any) -> Request:
    values = {**SIZE, "negative_prompt": NEGATIVE, "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 7}
    return loaded.request(PROMPT, **{**values, "params": RAW, **changes})


def test_a_whole_video_of_several_tiles_is_the_oracles(build: Build) -> None:
    folder = build()
    loaded = engine.load(str(folder))
    made = request(loaded, width=176, num_frames=40)
    assert made.tiling == (128, 128, 8, 48)
    frames, expected = ours(loaded, made)[0], theirs(oracle(folder), made)
    assert frames.shape == expected.shape == (40, 128, 176, 3)
    assert expected.std() > 0.03, "the oracle's frames are flat, so that they would prove nothing"
    # 0.5 is the rounding to uint8.
    assert np.abs(frames.astype(np.float64) - expected * 255).max() <= 0.5 + WHOLE * 255


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transformer": tiny_checkpoint.LOW},
        {"scheduler": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}},
        {"scheduler": {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"}},
        {"euler": True, "scheduler": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}},
    ],
    ids=["published", "low_resolution", "v_trailing", "leading", "euler"],
)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_latents_after_the_loop_are_the_oracles(build: Build, options: dict[str, Any], guidance: float) -> None:
    folder = build(**options)
    loaded = engine.load(str(folder))
    made = request(loaded, guidance_scale=guidance)
    expected = theirs(oracle(folder), made, output_type="latent")
    assert_same_latents(latents_of(loaded, made)[0], expected)


def test_a_sampler_of_the_request_wins_over_the_checkpoints(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    assert request(loaded).sampler == "euler_ancestral"
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    made = request(loaded, sampler="euler")
    assert_same_latents(latents_of(loaded, made)[0], theirs(pipe, made, output_type="latent"))


def test_explicit_timesteps_of_a_request_are_its_schedule(build: Build) -> None:
    # AllegroPipeline takes timesteps and then spaces its own, so its scheduler is told them where it asks for steps.
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    timesteps = (950.0, 611.5, 200.25)

    class Told(EulerDiscreteScheduler):
        def set_timesteps(self, steps: int, device: Any = None) -> None:
            super().set_timesteps(timesteps=list(timesteps), device=device)

    pipe.scheduler = Told.from_config(pipe.scheduler.config)
    made = request(loaded, sampler="euler", timesteps=timesteps, num_inference_steps=3)
    assert native(loaded).schedule(made).timesteps == timesteps
    assert_same_latents(latents_of(loaded, made)[0], theirs(pipe, made, output_type="latent"))


def test_text_is_the_oracles_beyond_which_it_masks(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    made = request(loaded)
    embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt(PROMPT, True, negative_prompt=NEGATIVE)
    prompts = native(loaded).texts(made, Conditioning())
    assert list(prompts) == ["conditional", "unconditional"]
    for prompt, expected, shown in zip(prompts.values(), (embeds, negative_embeds), (mask, negative_mask), strict=True):
        (text,) = native(loaded).encode_text([prompt])
        assert expected.shape[1] == 512 and int(shown.sum()) == text.tokens == len(text.embedding)
        assert float((expected[0, : text.tokens] - text.embedding).abs().max()) < STAGE


def test_the_start_and_one_prediction_are_the_oracles(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    made, pipeline = request(loaded), native(loaded)
    schedule, draws = pipeline.schedule(made), Draws([made.seed])
    texts = {branch: pipeline.encode_text([prompt]) for branch, prompt in pipeline.texts(made, Conditioning()).items()}
    start = pipeline.begin([made], [Conditioning()], texts, schedule, draws)
    pipe.scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(made.seed)
    latents = pipe.prepare_latents(1, 4, 24, 128, 128, torch.float32, "cpu", generator)
    assert float((start.latents - latents).abs().max()) < 1e-4, "of 157 times noise"
    embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt(PROMPT, True, negative_prompt=NEGATIVE)
    rope = pipe._prepare_rotary_positional_embeddings(1, 128, 128, 6, "cpu")
    for branch, text, shown in (
        ("conditional", embeds, mask),
        ("unconditional", negative_embeds, negative_mask),
    ):
        t = pipe.scheduler.timesteps[2]
        pipe.scheduler._step_index = 2
        expected = pipe.transformer(
            pipe.scheduler.scale_model_input(latents, t),
            text.unsqueeze(1),
            t.expand(1),
            encoder_attention_mask=shown,
            image_rotary_emb=rope,
            return_dict=False,
        )[0]
        found = pipeline.predict(start.latents, schedule, 2, start.conditioning[branch])
        assert float((expected - found).abs().max()) < STAGE


def test_a_batch_of_prompts_of_different_length_is_each_oracles(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    first = request(loaded, seed=1, num_inference_steps=3)
    second = request(loaded, seed=2, guidance_scale=3.0, negative_prompt="", num_inference_steps=3)
    both = latents_of(loaded, first, second)
    for latents, made in zip(both, (first, second), strict=True):
        assert_same_latents(latents, theirs(pipe, made, output_type="latent"))


@pytest.mark.skipif(importlib.util.find_spec("bs4") is None, reason="beautifulsoup4 is not installed")
def test_captions_are_cleaned_by_default_as_the_oracle_does(build: Build) -> None:
    folder = build()
    loaded = engine.load(str(folder))
    made = loaded.request("A RED circle, moving: left! (the dog)", **SIZE, num_inference_steps=2, seed=3)
    assert made.param("clean_caption") is True
    assert_same_latents(latents_of(loaded, made)[0], theirs(oracle(folder), made, output_type="latent"))
    assert not torch.equal(
        native(loaded).encode_text([native(loaded).texts(made, Conditioning())["conditional"]])[0].embedding,
        native(loaded).encode_text([native(loaded).texts(request(loaded), Conditioning())["conditional"]])[0].embedding,
    )


def test_a_named_dtype_leaves_autoencoder_and_timestep_in_fp32(build: Build) -> None:
    loaded = engine.load(str(build()), dtype="bfloat16")
    pipeline = native(loaded)
    assert pipeline.dtypes == {
        "transformer": torch.bfloat16,
        "vae": torch.float32,
        "text_encoder": torch.bfloat16,
    }
    dtypes = {name: weight.dtype for name, weight in pipeline.transformer.named_parameters()}
    assert dtypes["transformer_blocks.0.ff.net.2.weight"] == torch.bfloat16
    for kept in ("adaln_single.linear.weight", "transformer_blocks.1.scale_shift_table", "scale_shift_table"):
        assert dtypes[kept] == torch.float32
    seen: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    made = request(loaded)
    latents = latents_of(loaded, made)
    assert latents.dtype == torch.float32 and bool(latents.isfinite().all())
    assert {t.dtype for t in seen} == {torch.float32}
    assert [float(t[0]) for t in seen[::2]] == list(pipeline.schedule(made).timesteps)


def test_in_bf16_it_is_as_near_to_fp32_as_the_oracle_in_bf16(build: Build) -> None:
    folder = build()
    exact = theirs(oracle(folder), request(engine.load(str(folder))), output_type="latent")
    loaded = engine.load(str(folder), dtype="bfloat16")
    half = theirs(oracle(folder, torch_dtype=torch.bfloat16), request(loaded), output_type="latent").float()
    distance = (latents_of(loaded, request(loaded))[0] - exact).abs().mean()
    # Theirs keeps the latents in bf16, too.
    assert 0 < distance <= (half - exact).abs().mean()


def test_an_autoencoder_that_does_not_ask_for_fp32_follows_the_named_dtype(build: Build) -> None:
    loaded = engine.load(str(build(vae={"force_upcast": False})), dtype="bfloat16")
    assert native(loaded).dtypes["vae"] == torch.bfloat16


def test_float16_is_refused(build: Build) -> None:
    with pytest.raises(CheckpointError, match=r"float16.*allowed: float32, bfloat16"):
        engine.load(str(build()), dtype="float16")


def test_another_task_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"'i2v'.*t2v"):
        engine.load(str(build()), task="i2v")


def test_the_oracle_draws_at_every_step_and_so_do_we(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    assert isinstance(pipe.scheduler, EulerAncestralDiscreteScheduler)
    made = request(loaded, num_inference_steps=2)
    generator = torch.Generator().manual_seed(made.seed)
    pipe(PROMPT, **SIZE, num_inference_steps=2, clean_caption=False, generator=generator, output_type="latent")
    states: list[Any] = []
    next(iter(loaded.generate([made], engine.Hooks(save=states.append))))
    assert torch.equal(states[-1].generators[0], generator.get_state())
