"""LTX-Video as a whole and stage by stage against diffusers' three pipelines, on tiny random checkpoints."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from PIL import Image
from torch import Tensor

from tests.models.ltx.tiny_checkpoint import CASES, PIPELINES, SIZE
from tests.models.oracle import STAGE, WHOLE, Build, assert_same_frames, native, opened, ours
from vidgen import engine
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.models.ltx.pipeline import linear_quadratic, pack, unpack
from vidgen.sampling.step import Draws
from vidgen.text.prompt import Prompt
from vidgen.types import Hooks, Media, Request

pytestmark = pytest.mark.usefixtures("without_gradients")

PROMPT, NEGATIVE = "a red circle moving left", "blue dog"
DISTILLED = (1000.0, 725.0, 0.03)


def picture(seed: int = 0, height: int = 64, width: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def as_media(image: Image.Image) -> Media:
    data = io.BytesIO()
    image.save(data, "PNG")
    return Media("", "", data.getvalue())


def oracle(folder: Path, pipeline: str, **options: Any) -> Any:
    return opened(PIPELINES[pipeline], folder, **options)


def theirs(pipe: Any, request: Request, image: Image.Image | None = None, **options: Any) -> Any:
    """The oracle's video. Its generator is torch's global one, from which its decoder draws whatever it is given."""
    params: dict[str, Any] = dict(request.params)
    if image is not None:
        params["image"] = image
    if request.timesteps is not None:
        params["timesteps"] = list(request.timesteps)
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        frame_rate=request.fps,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.manual_seed(request.seed),
        **params | {"output_type": "np"} | options,
    ).frames[0]


def request(loaded: engine.Engine, params: dict[str, Any] | None = None, **changes: Any) -> Request:
    own = loaded.spec.defaults(loaded.task, loaded.params)["params"] | (params or {})
    values = {**SIZE, "negative_prompt": NEGATIVE, "seed": 7, "params": own}
    values |= changes
    return loaded.request(values.pop("prompt", PROMPT), **values)


def last_state(loaded: engine.Engine, made: Request) -> Tensor:
    states: list[Any] = []
    next(iter(loaded.generate([made], Hooks(save=states.append))))
    return states[-1].latents


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_video_is_the_oracles(tmp_path: Path, name: str, guidance: float) -> None:
    case = CASES[name]
    case.write(tmp_path)
    loaded = engine.load(str(tmp_path), task=case.task)
    index = json.loads((tmp_path / "model_index.json").read_text())
    pipe = oracle(tmp_path, case.pipeline or index["_class_name"])
    image = picture() if case.task == "i2v" else None
    media = {"image": as_media(image)} if image else {}
    made = request(loaded, **dict(case.sampling) | {"guidance_scale": guidance} | media)
    assert_same_frames(ours(loaded, made)[0], theirs(pipe, made, image))


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
def test_a_static_scheduler_of_a_text_pipeline_spaces_evenly(build: Build, version: str) -> None:
    for scheduler in ({}, {"shift": 3.0, "shift_terminal": 0.1}):
        folder = build(version=version, scheduler=scheduler)
        loaded, pipe = engine.load(str(folder)), oracle(folder, "LTXPipeline")
        made = request(loaded)
        assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))
        found = native(loaded).schedule(made)
        assert found.timesteps == pytest.approx(pipe.scheduler.timesteps.tolist(), abs=1e-4)
        assert (*found.sigmas, 0.0) == pytest.approx(pipe.scheduler.sigmas.tolist(), abs=1e-7)


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("size", [(64, 96, 17), (512, 704, 161)])
def test_levels_shift_with_the_number_of_tokens_as_the_oracles_do(
    build: Build, steps: int, size: tuple[int, int, int]
) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    height, width, frames = size
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder, "LTXPipeline")
    made = request(loaded, height=height, width=width, num_frames=frames, num_inference_steps=steps)
    tokens = (frames // 8 + 1) * (height // 32) * (width // 32)
    pipe.scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
    )
    found = native(loaded).schedule(made)
    assert found.timesteps == pytest.approx(pipe.scheduler.timesteps.tolist(), abs=1e-3)
    assert (*found.sigmas, 0.0) == pytest.approx(pipe.scheduler.sigmas.tolist(), abs=1e-6)


def test_a_shift_of_the_request_replaces_the_dynamic_one(build: Build) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder, "LTXPipeline")
    made = request(loaded, shift=5.0)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 3, 3), mu=float(np.log(5.0)))
    assert native(loaded).schedule(made).timesteps == pytest.approx(pipe.scheduler.timesteps.tolist(), abs=1e-3)
    assert native(loaded).schedule(request(loaded)).timesteps != native(loaded).schedule(made).timesteps


def test_explicit_levels_of_a_request_are_its_schedule(build: Build) -> None:
    loaded = engine.load(str(build(version="0.9.5", pipeline="LTXConditionPipeline")))
    sigmas = native(loaded).schedule(request(loaded, sigmas=(1.0, 0.6, 0.2)))
    assert sigmas.sigmas == pytest.approx((1.0, 0.6, 0.2), abs=1e-6)
    assert sigmas.timesteps == pytest.approx((1000.0, 600.0, 200.0), abs=1e-3)
    times = native(loaded).schedule(request(loaded, timesteps=DISTILLED))
    assert times.timesteps == pytest.approx(DISTILLED)
    assert times.sigmas == pytest.approx((1.0, 0.725, 3e-5), abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 31, 50])
def test_levels_of_the_condition_pipeline_are_the_oracles(steps: int) -> None:
    assert linear_quadratic(steps) == pytest.approx(linear_quadratic_schedule(steps).tolist(), abs=1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_rescale_is_the_oracles(build: Build, rescale: float) -> None:
    folder = build()
    loaded, pipe = engine.load(str(folder)), oracle(folder, "LTXPipeline")
    made = request(loaded, {"guidance_rescale": rescale}, guidance_scale=7.0)
    expected = theirs(pipe, made, output_type="latent")
    assert float((last_state(loaded, made)[0] - expected).abs().max()) < WHOLE


@pytest.mark.parametrize(
    "params", [{"decode_timestep": 0.3}, {"decode_noise_scale": None}, {"decode_noise_scale": 0.6}]
)
def test_decoding_with_a_timestep_is_the_oracles(build: Build, params: dict[str, Any]) -> None:
    folder = build(version="0.9.1")
    loaded, pipe = engine.load(str(folder)), oracle(folder, "LTXPipeline")
    made = request(loaded, params)
    found = ours(loaded, made)[0]
    assert_same_frames(found, theirs(pipe, made))
    assert np.abs(found.astype(int) - ours(loaded, request(loaded))[0].astype(int)).max() > 1


def test_parameters_that_a_request_leaves_out_are_the_defaults(build: Build) -> None:
    loaded = engine.load(str(build(version="0.9.1")))
    bare = replace(request(loaded), params=())
    assert np.array_equal(ours(loaded, bare)[0], ours(loaded, request(loaded))[0])


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_noise_on_a_given_image_is_the_oracles(build: Build, scale: float) -> None:
    folder = build(version="0.9.5", pipeline="LTXConditionPipeline")
    loaded, pipe = engine.load(str(folder), task="i2v"), oracle(folder, "LTXConditionPipeline")
    made = request(loaded, {"image_cond_noise_scale": scale}, image=as_media(picture()), num_inference_steps=4)
    assert_same_frames(ours(loaded, made)[0], theirs(pipe, made, picture()))


@pytest.mark.parametrize("pipeline", ["LTXPipeline", "LTXConditionPipeline"])
def test_text_is_the_oracles(build: Build, pipeline: str) -> None:
    folder = build(pipeline=pipeline, version="0.9.5")
    loaded = native(engine.load(str(folder)))
    expected, shown, _, _ = oracle(folder, pipeline).encode_prompt([PROMPT], do_classifier_free_guidance=False)
    text = loaded.encode_text([Prompt(PROMPT)])[0]
    assert text.tokens == int(shown.sum()) == 6
    assert float((expected[0, : text.tokens] - text.embedding[: text.tokens]).abs().max()) < STAGE
    alone = replace(loaded.text_encoder, padding="none").encode(Prompt(PROMPT)).embedding
    attended = float((alone - text.embedding[:6]).abs().max()) > 10 * STAGE
    assert attended is (pipeline == "LTXPipeline"), "only LTXConditionPipeline hides the padding from the encoder"


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("pipeline", ["LTXPipeline", "LTXConditionPipeline"])
def test_the_start_is_drawn_as_the_oracle_draws_it(build: Build, pipeline: str, task: str) -> None:
    folder = build(pipeline=pipeline, version="0.9.5")
    loaded = engine.load(str(folder), task=task)
    name = "LTXImageToVideoPipeline" if (pipeline, task) == ("LTXPipeline", "i2v") else pipeline
    pipe = oracle(folder, name)
    image = {"image": as_media(picture())} if task == "i2v" else {}
    silent = {"image_cond_noise_scale": 0.0} if name == "LTXConditionPipeline" else {}
    made = request(loaded, silent, **image)
    media = Conditioning(np.array(picture()) if task == "i2v" else None)
    pipeline_ = native(loaded)
    texts = {branch: pipeline_.encode_text([prompt]) for branch, prompt in pipeline_.texts(made, media).items()}
    draws = Draws([made.seed])
    start = pipeline_.begin([made], [media], texts, pipeline_.schedule(made), draws)
    pixels = pipe.video_processor.preprocess(picture(), 64, 96)
    generator = torch.Generator().manual_seed(made.seed)
    size: dict[str, Any] = {"num_channels_latents": 4, "height": 64, "width": 96, "num_frames": 17}
    size |= {"generator": generator, "dtype": torch.float32}
    if name == "LTXConditionPipeline":
        given = ([pixels.unsqueeze(2)], [1.0], [0]) if image else ([], [], [])
        expected = pipe.prepare_latents(*given, **size)[0]
    else:
        expected = pipe.prepare_latents(*([pixels] if image else []), **size)
        expected = expected[0] if image else expected
    assert float((start.latents - expected).abs().max()) < STAGE
    assert torch.equal(draws.generators[0].get_state(), generator.get_state())
    if image:
        assert start.pin is not None
        assert torch.equal(start.pinned(torch.zeros_like(start.latents))[:, :6], start.latents[:, :6])


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
def test_latents_after_every_step_are_the_oracles(build: Build, version: str) -> None:
    pipeline = "LTXConditionPipeline" if version == "0.9.5" else "LTXImageToVideoPipeline"
    folder = build(version=version, pipeline=pipeline)
    loaded, pipe = engine.load(str(folder), task="i2v"), oracle(folder, pipeline)
    made = request(loaded, image=as_media(picture()))
    states: list[Any] = []
    next(iter(loaded.generate([made], Hooks(save=states.append))))
    expected: list[Tensor] = []

    def seen(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        expected.append(values["latents"].clone())
        return values

    theirs(pipe, made, picture(), callback_on_step_end=seen)
    for state, other in zip(states, expected, strict=True):
        assert state.latents.shape == other.shape == (1, 18, 4)
        assert float((state.latents - other)[:, 6:].abs().max()) < WHOLE  # the image's own six are pinned


def test_tiled_decoding_is_the_oracles_at_the_same_tiles(build: Build) -> None:
    for version in ("0.9.0", "0.9.1"):
        folder = build(version=version)
        loaded, pipe = engine.load(str(folder)), oracle(folder, "LTXPipeline")
        made = request(loaded, tiling=(64, 64, 32, 32))
        pipe.vae.enable_tiling(64, 64, None, 32, 32)
        assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))


def test_a_batch_of_prompts_of_two_lengths_is_two_single_videos(build: Build) -> None:
    for task, pipeline, version in (("t2v", "LTXPipeline", "0.9.1"), ("i2v", "LTXConditionPipeline", "0.9.5")):
        folder = build(version=version, pipeline=pipeline)
        loaded, pipe = engine.load(str(folder), task=task), oracle(folder, pipeline)
        images = (picture(1), picture(2)) if task == "i2v" else (None, None)
        media = [{"image": as_media(image)} if image else {} for image in images]
        first = request(loaded, seed=1, **media[0])
        second = replace(request(loaded, seed=2, guidance_scale=5.0, **media[1]), prompt="dog")
        frames = ours(loaded, first, second)
        for found, made, image in zip(frames, (first, second), images, strict=True):
            assert_same_frames(found, theirs(pipe, made, image))


def test_the_frame_rate_of_a_request_moves_its_positions(build: Build) -> None:
    for pipeline in ("LTXPipeline", "LTXConditionPipeline"):
        folder = build(version="0.9.5", pipeline=pipeline)
        loaded, pipe = engine.load(str(folder)), oracle(folder, pipeline)
        made = request(loaded, fps=8.0)
        assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))
        latents = last_state(loaded, made)
        assert float((latents - last_state(loaded, request(loaded, fps=30.0))).abs().max()) > 10 * WHOLE


def test_in_bf16_it_is_as_near_to_fp32_as_the_oracle_in_bf16(build: Build) -> None:
    folder = build(dtype=torch.bfloat16)
    config = folder / "text_encoder/config.json"
    loaded = engine.load(str(folder))
    assert set(native(loaded).dtypes.values()) == {torch.bfloat16}
    assert native(loaded).vae.latents_std.dtype == torch.float32
    made = request(loaded)
    half = theirs(oracle(folder, "LTXPipeline", torch_dtype=torch.bfloat16), made, output_type="latent")
    # Unlike diffusers, transformers loads in the dtype that config.json names.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    exact = theirs(oracle(folder, "LTXPipeline", torch_dtype=torch.float32), made, output_type="latent")
    distance = (last_state(loaded, made)[0] - exact).abs().mean()
    # Rounding is random: equal on average, so 1.5 leaves room.
    assert 0 < distance <= 1.5 * (half - exact).abs().mean()


def test_continuing_a_saved_state_gives_the_same_bits(build: Build) -> None:
    for task, version, pipeline in (("t2v", "0.9.1", "LTXPipeline"), ("i2v", "0.9.5", "LTXConditionPipeline")):
        loaded = engine.load(str(build(version=version, pipeline=pipeline)), task=task)
        made = request(loaded, **({"image": as_media(picture())} if task == "i2v" else {}))
        states: list[Any] = []
        (whole,) = (np.concatenate(list(v.chunks)) for v in loaded.generate([made], Hooks(save=states.append)))
        middle = states[1]
        hooks = Hooks(resume=lambda requests, middle=middle: middle)  # type: ignore[misc]
        (rest,) = (np.concatenate(list(video.chunks)) for video in loaded.generate([made], hooks))
        assert np.array_equal(rest, whole)


def test_float16_is_refused(build: Build) -> None:
    with pytest.raises(CheckpointError, match="float16"):
        engine.load(str(build()), dtype="float16")


def test_packing_and_unpacking_are_the_oracles() -> None:
    x = torch.randn(2, 4, 3, 2, 5)
    assert torch.equal(pack(x), LTXPipeline._pack_latents(x))
    assert torch.equal(unpack(pack(x), (3, 2, 5)), x)
