"""Wan as a whole and stage by stage against diffusers' WanPipeline, on tiny random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from tests.models.oracle import STAGE, WHOLE, Build, assert_same_frames, native, opened, ours
from tests.models.wan import tiny_checkpoint
from vidgen import engine
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.loop import Loop
from vidgen.sampling.step import Draws
from vidgen.text.prompt import Prompt
from vidgen.types import Request

pytestmark = pytest.mark.usefixtures("without_gradients")

SIZE = {"height": 32, "width": 48, "num_frames": 9}
PROMPT, NEGATIVE = "a red circle moving left", "blue &amp; green  dog"


def oracle(folder: Path, **options: Any) -> WanPipeline:
    return opened(WanPipeline, folder, **options)


def theirs(pipe: WanPipeline, request: Request, **options: Any) -> np.ndarray:
    # With a temporal factor of 1 the oracle takes every count for a wrong one and adds a frame.
    added = 1 if pipe.vae_scale_factor_temporal == 1 else 0
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames - added,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **options,
    ).frames[0]


def request(loaded: engine.Engine, **changes: Any) -> Request:
    values = {**SIZE, "negative_prompt": NEGATIVE, "num_inference_steps": 5, "guidance_scale": 5.0, "seed": 7}
    return loaded.request(PROMPT, **values | changes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "30KB"},
        {"scheduler": {"flow_shift": 5.0, "solver_order": 3}},
        {"scheduler": {"flow_shift": 1.0, "final_sigmas_type": "sigma_min", "solver_type": "bh1"}},
        {"euler": True},
        {"vae": tiny_checkpoint.STILL},
        {"vae": tiny_checkpoint.UNSHUFFLED},
        {"transformer": {"patch_size": (1, 1, 1), "num_layers": 1, "num_attention_heads": 3}},
        {"transformer": {"cross_attn_norm": False}},
    ],
    ids=[
        "plain",
        "sharded",
        "shift5_order3",
        "shift1_bh1",
        "euler",
        "still_vae",
        "unshuffled_vae",
        "patch111",
        "no_cross_norm",
    ],
)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_whole_video_is_the_oracles(build: Build, options: dict[str, Any], guidance: float) -> None:
    folder = build(**options)
    loaded = engine.load(str(folder))
    made = request(loaded, guidance_scale=guidance)
    assert_same_frames(ours(loaded, made)[0], theirs(oracle(folder), made))


@pytest.mark.parametrize("shift", [1.0, 5.0, 9.0])
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_sampler_and_shift_of_a_request_win_over_the_checkpoints(build: Build, sampler: str, shift: float) -> None:
    folder = build()
    pipe = oracle(folder)
    if sampler == "unipc":
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    else:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    loaded = engine.load(str(folder))
    made = request(loaded, sampler=sampler, shift=shift)
    assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))


def test_explicit_sigmas_and_timesteps_of_a_request_are_its_schedule(build: Build) -> None:
    loaded = engine.load(str(build()))
    sigmas, timesteps = (1.0, 0.6, 0.2), (1000.0, 611.5, 200.25)
    for sampler in ("unipc", "euler"):
        schedule = native(loaded).schedule(
            request(loaded, sampler=sampler, sigmas=sigmas, shift=1.0, num_inference_steps=3)
        )
        assert schedule.sigmas == pytest.approx(sigmas, abs=2e-6)
    made = request(loaded, sampler="euler", timesteps=timesteps, num_inference_steps=3)
    assert native(loaded).schedule(made).timesteps == timesteps
    assert len(ours(loaded, made)[0]) == 9


def test_text_is_the_oracles(build: Build) -> None:
    folder = build()
    loaded = native(engine.load(str(folder)))
    expected, _ = oracle(folder).encode_prompt([PROMPT], do_classifier_free_guidance=False, max_sequence_length=512)
    text = loaded.encode_text([Prompt(PROMPT)])[0].embedding
    assert float((expected[0, : len(text)] - text).abs().max()) < STAGE
    assert not expected[0, len(text) :].any()


def test_one_prediction_is_the_oracles(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    made, pipeline = request(loaded), native(loaded)
    schedule, draws = pipeline.schedule(made), Draws([made.seed])
    texts = {branch: pipeline.encode_text([prompt]) for branch, prompt in pipeline.texts(made, Conditioning()).items()}
    start = pipeline.begin([made], [Conditioning()], texts, schedule, draws)
    noise = torch.randn((1, 4, 3, 4, 6), generator=torch.Generator().manual_seed(made.seed))
    assert torch.equal(start.latents, noise)
    embeddings = pipe.encode_prompt([PROMPT], [NEGATIVE], max_sequence_length=512)
    for branch, embedding in zip(("conditional", "unconditional"), embeddings, strict=True):
        expected = pipe.transformer(noise, torch.tensor([schedule.timesteps[2]]), embedding, return_dict=False)[0]
        found = pipeline.predict(noise, schedule, 2, start.conditioning[branch])
        assert float((expected - found).abs().max()) < STAGE


def test_latents_after_the_loop_are_the_oracles(build: Build) -> None:
    folder = build()
    loaded = engine.load(str(folder))
    made = request(loaded)
    assert isinstance(loaded.backend, Loop)
    states = []
    loaded_hooks = engine.Hooks(save=states.append)
    next(iter(loaded.generate([made], loaded_hooks)))
    expected = theirs(oracle(folder), made, output_type="latent")
    assert float((states[-1].latents[0] - expected).abs().max()) < WHOLE


def test_decoding_is_the_oracles(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    latents = torch.randn((1, 4, 3, 4, 6), generator=torch.Generator().manual_seed(1))
    found = torch.cat(list(native(loaded).decode(latents, request(loaded), Draws([0]))))
    std = torch.tensor(tiny_checkpoint.VAE["latents_std"]).view(1, -1, 1, 1, 1)
    mean = torch.tensor(tiny_checkpoint.VAE["latents_mean"]).view(1, -1, 1, 1, 1)
    video = pipe.vae.decode(latents / (1 / std) + mean, return_dict=False)[0]
    expected = pipe.video_processor.postprocess_video(video, output_type="np")[0]
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


def test_a_batch_is_the_oracles_batch_with_a_generator_an_item(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder)
    first, second = request(loaded, seed=1), request(loaded, seed=2, guidance_scale=3.0)
    frames = ours(loaded, first, second)
    assert_same_frames(frames[0], theirs(pipe, first))
    assert_same_frames(frames[1], theirs(pipe, second))


def test_a_bf16_checkpoint_in_a_stated_fp32_is_the_plain_oracles(build: Build) -> None:
    folder = build(dtype=torch.bfloat16, seed=3)
    config = folder / "text_encoder/config.json"
    # Unlike diffusers, transformers loads in the dtype that config.json names.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    (folder / "vidgen.json").write_text(json.dumps({"dtype": "float32"}))
    pipe = oracle(folder)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    for dtype in (None, "float32"):
        loaded = engine.load(str(folder), dtype=dtype)
        made = request(loaded)
        assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))
        assert next(iter(loaded.generate([made]))).dtype == "float32"


def test_in_bf16_it_is_as_near_to_fp32_as_the_oracle_in_bf16(build: Build) -> None:
    folder = build(dtype=torch.bfloat16, seed=4)
    exact = theirs(oracle(folder, torch_dtype=torch.float32), request(engine.load(str(folder))))
    loaded = engine.load(str(folder))
    assert set(native(loaded).dtypes.values()) == {torch.bfloat16}
    half = theirs(oracle(folder, torch_dtype=torch.bfloat16), request(loaded))
    distance = np.abs(ours(loaded, request(loaded))[0] / 255.0 - exact).mean()
    # Rounding is random: equal on average, so 1.5 leaves room; uint8 adds 1/1020 on average.
    assert 0 < distance <= 1.5 * np.abs(half - exact).mean() + 1 / 1020


def test_norms_and_time_embedding_stay_fp32_and_so_do_timesteps(build: Build) -> None:
    loaded = engine.load(str(build()), dtype="bfloat16")
    transformer = native(loaded).transformer
    dtypes = {name: weight.dtype for name, weight in transformer.named_parameters()}
    assert dtypes["blocks.0.ffn.net.2.weight"] == torch.bfloat16
    for kept in ("condition_embedder.time_embedder.linear_1.weight", "blocks.1.scale_shift_table", "scale_shift_table"):
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


def test_keys_and_values_of_a_negative_prompt_are_made_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = engine.load(str(build()))
    transformer = native(loaded).transformer
    made: list[int] = []
    original = transformer.text_context
    monkeypatch.setattr(transformer, "text_context", lambda text: made.append(1) or original(text))
    ours(loaded, request(loaded))
    assert len(made) == 2
    ours(loaded, request(loaded), request(loaded, seed=9))
    assert len(made) == 3, "the negative prompt's are kept; one prompt shared by a batch is made once"
    ours(loaded, request(loaded, negative_prompt="cat"))
    assert len(made) == 5
