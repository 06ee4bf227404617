"""HunyuanVideo as a whole and where it begins, against diffusers' pipelines, on tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from PIL import Image

from tests.models.oracle import STAGE, Build, assert_same_frames, opened, ours
from vidgen import engine
from vidgen.conditioning import Conditioning
from vidgen.errors import CheckpointError
from vidgen.loop import Loop
from vidgen.models.hunyuan.pipeline import HunyuanPipeline
from vidgen.sampling.step import Draws
from vidgen.text.llama_clip import PicturePrompt
from vidgen.types import Request

pytestmark = pytest.mark.usefixtures("without_gradients")

SIZE: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 3, "seed": 7}
PROMPT, NEGATIVE = "a red circle moving left", "the blue dog"
KINDS = {"t2v": "t2v", "replace": "i2v", "concat": "i2v"}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("media") / "image.png"
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((SIZE["width"], SIZE["height"])).save(place)
    return place


def load(folder: Path, kind: str, **options: Any) -> engine.Engine:
    return engine.load(str(folder), task=KINDS[kind], **options)


def native(loaded: engine.Engine) -> HunyuanPipeline:
    assert isinstance(loaded.backend, Loop) and isinstance(loaded.backend.pipeline, HunyuanPipeline)
    return loaded.backend.pipeline


def request(loaded: engine.Engine, kind: str, picture: Path, **changes: Any) -> Request:
    image = {"image": picture} if KINDS[kind] == "i2v" else {}
    return loaded.request(changes.pop("prompt", PROMPT), **SIZE | {"negative_prompt": NEGATIVE} | image | changes)


def oracle(folder: Path, kind: str, **options: Any) -> Any:
    pipeline = HunyuanVideoPipeline if kind == "t2v" else HunyuanVideoImageToVideoPipeline
    return opened(pipeline, folder, **options)


def theirs(pipe: Any, asked: Request, picture: Path, **options: Any) -> np.ndarray:
    image = {"image": Image.open(picture)} if asked.task == "i2v" else {}
    return pipe(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        height=asked.height,
        width=asked.width,
        num_frames=asked.num_frames,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        true_cfg_scale=asked.param("true_cfg_scale"),
        generator=torch.Generator().manual_seed(asked.seed),
        **image,
        **{"output_type": "np"} | options,
    ).frames[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.5])
def test_a_whole_video_is_the_oracles(build: Build, picture: Path, kind: str, true_cfg_scale: float) -> None:
    loaded = load(build(kind), kind)
    asked = request(loaded, kind, picture, params={"true_cfg_scale": true_cfg_scale})
    assert asked.guidance_scale == (1.0 if kind == "concat" else 6.0)
    (frames,) = ours(loaded, asked)
    assert_same_frames(frames, theirs(oracle(build(kind), kind), asked, picture))
    assert len(frames) == loaded.spec.frames_out(asked) == (5 if kind == "concat" else 9)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5, 12.0])
def test_the_embedded_scale_is_the_oracles(build: Build, picture: Path, guidance_scale: float) -> None:
    loaded = load(build(), "t2v")
    asked = request(loaded, "t2v", picture, guidance_scale=guidance_scale)
    assert_same_frames(ours(loaded, asked)[0], theirs(oracle(build(), "t2v"), asked, picture))


def test_shift_and_explicit_sigmas_of_a_request_win_over_the_checkpoints(build: Build, picture: Path) -> None:
    loaded, pipe = load(build(), "t2v"), oracle(build(), "t2v")
    assert loaded.spec.defaults("t2v", loaded.params)["shift"] == 7.0
    sigmas = (1.0, 0.6, 0.2)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for given in ({}, {"sigmas": sigmas}):
        asked = request(loaded, "t2v", picture, shift=3.0, **given)
        assert_same_frames(
            ours(loaded, asked)[0],
            theirs(pipe, asked, picture, **{name: list(value) for name, value in given.items()}),
        )


def test_explicit_timesteps_are_told_to_the_model_as_they_are(build: Build, picture: Path) -> None:
    loaded = load(build(), "t2v")
    timesteps = (1000.0, 611.5, 200.25)
    schedule = native(loaded).schedule(request(loaded, "t2v", picture, timesteps=timesteps, shift=1.0))
    assert schedule.timesteps == timesteps
    assert schedule.sigmas == pytest.approx([t / 1000 for t in timesteps], abs=1e-6)


def test_the_schedule_is_the_oracles(build: Build, picture: Path) -> None:
    loaded, scheduler = load(build(), "t2v"), FlowMatchEulerDiscreteScheduler(shift=7.0)
    for steps in (1, 4, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        schedule = native(loaded).schedule(request(loaded, "t2v", picture, num_inference_steps=steps))
        assert schedule.timesteps == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
        assert (*schedule.sigmas, schedule.sigmas_next[-1]) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["t2v", "replace"])
def test_tiles_are_the_oracles(build: Build, picture: Path, kind: str) -> None:
    loaded, pipe, tiles = load(build(kind), kind), oracle(build(kind), kind), (32, 32, 16, 24)
    pipe.vae.enable_tiling(tiles[0], tiles[1], None, tiles[2], tiles[3])
    asked = request(loaded, kind, picture, tiling=tiles, num_frames=21, num_inference_steps=2)
    assert_same_frames(ours(loaded, asked)[0], theirs(pipe, asked, picture))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts_of_different_length_and_scale_is_the_oracles_one_by_one(
    build: Build, picture: Path, kind: str
) -> None:
    loaded, pipe = load(build(kind), kind), oracle(build(kind), kind)
    scales = (1.0, 1.0) if kind == "concat" else (6.0, 3.0)
    prompts = (PROMPT, "the green square and the cat or a dog")
    asked = [
        request(loaded, kind, picture, prompt=prompt, guidance_scale=scale, seed=seed)
        for seed, (prompt, scale) in enumerate(zip(prompts, scales, strict=True))
    ]
    videos = list(loaded.generate(asked))
    assert [video.batch for video in videos] == [2, 2]
    for one, video in zip(asked, videos, strict=True):
        assert_same_frames(np.concatenate(list(video.chunks)), theirs(pipe, one, picture))


@pytest.mark.parametrize("kind", ["replace", "concat"])
def test_the_start_with_an_image_is_the_oracles(build: Build, picture: Path, kind: str) -> None:
    loaded, pipe = load(build(kind), kind), oracle(build(kind), kind)
    asked, pipeline = request(loaded, kind, picture), native(loaded)
    image = Image.open(picture)
    media, draws = Conditioning(image=np.asarray(image)), Draws([asked.seed])
    texts = {branch: pipeline.encode_text([prompt]) for branch, prompt in pipeline.texts(asked, media).items()}
    start = pipeline.begin([asked], [media], texts, pipeline.schedule(asked), draws)
    tensor = pipe.video_processor.preprocess(image, asked.height, asked.width)
    latents, images = pipe.prepare_latents(
        tensor,
        *(1, 4, asked.height, asked.width, asked.num_frames, torch.float32, torch.device("cpu")),
        torch.Generator().manual_seed(asked.seed),
        None,
        pipe.transformer.config.image_condition_type,
    )
    torch.testing.assert_close(start.latents, latents, rtol=0, atol=STAGE)
    branch = start.conditioning["conditional"]
    if kind == "replace":
        assert branch.image is None and start.pin is not None
        torch.testing.assert_close(start.pinned(latents)[:, :, :1], images, rtol=0, atol=STAGE)
        assert torch.equal(start.pinned(latents)[:, :, 1:], latents[:, :, 1:])
    else:
        assert start.pin is None and branch.image.shape == (1, 5, 3, 6, 8)
        torch.testing.assert_close(branch.image[:, :4, 0], images[:, :, 0], rtol=0, atol=STAGE)
        assert bool((branch.image[:, 4, 0] == 1).all()) and not branch.image[:, :, 1:].any()
    assert torch.equal(draws.state()[0], _state_after_one_draw(asked.seed, latents.shape))


def _state_after_one_draw(seed: int, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    torch.randn(shape, generator=generator)
    return generator.get_state()


def test_the_unconditional_branch_of_an_image_sees_black_and_every_second_token(build: Build, picture: Path) -> None:
    loaded = load(build("replace"), "replace")
    asked = request(loaded, "replace", picture, params={"true_cfg_scale": 2.0})
    media = Conditioning(image=np.asarray(Image.open(picture)))
    prompts = native(loaded).texts(asked, media)
    guided, unguided = prompts["conditional"], prompts["unconditional"]
    assert isinstance(guided, PicturePrompt) and isinstance(unguided, PicturePrompt)
    assert guided.interleave == 4 and guided.image is media.image
    assert unguided.interleave == 2 and unguided.image is not None and not unguided.image.any()
    assert unguided.text == NEGATIVE


def test_a_scale_of_one_has_one_branch(build: Build, picture: Path) -> None:
    loaded = load(build(), "t2v")
    for scale, branches in ((1.0, 1), (1.5, 2)):
        asked = request(loaded, "t2v", picture, params={"true_cfg_scale": scale})
        assert len(native(loaded).texts(asked, Conditioning())) == branches
        guidance = native(loaded).guidance(asked, native(loaded).schedule(asked), 0)
        assert (len(guidance.branches), guidance.scale) == (branches, scale)


def test_in_bf16_the_embedded_scale_is_rounded_as_the_oracles_and_the_timestep_is_not(
    build: Build, picture: Path
) -> None:
    folder = build(dtype=torch.bfloat16)
    loaded, pipe = load(folder, "t2v"), oracle(folder, "t2v", torch_dtype=torch.bfloat16)
    assert set(native(loaded).dtypes.values()) == {torch.bfloat16}
    asked = request(loaded, "t2v", picture)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    native(loaded).transformer.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[3])))
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["timestep"], kwargs["guidance"])), with_kwargs=True
    )
    ours(loaded, asked)
    theirs(pipe, asked, picture)
    mine, others = seen[:3], seen[3:]
    assert [float(timestep[0]) for timestep, _ in mine] == list(native(loaded).schedule(asked).timesteps)
    assert {timestep.dtype for timestep, _ in mine} == {torch.float32}
    # The oracle's scheduler hands back bf16 latents, whose dtype its next timestep takes.
    assert {timestep.dtype for timestep, _ in others[1:]} == {torch.bfloat16}
    for (_, guidance), (_, scale) in zip(mine, others, strict=True):
        assert torch.equal(guidance, scale) and float(guidance[0]) == 6016


def test_in_bf16_it_is_as_near_to_fp32_as_the_oracle_in_bf16(build: Build, picture: Path) -> None:
    folder = build(dtype=torch.bfloat16)
    loaded = load(folder, "t2v")
    asked = request(loaded, "t2v", picture)
    exact = theirs(oracle(folder, "t2v", torch_dtype=torch.float32), asked, picture)
    half = theirs(oracle(folder, "t2v", torch_dtype=torch.bfloat16), asked, picture)
    distance = np.abs(ours(loaded, asked)[0] / 255.0 - exact).mean()
    # Rounding is random: equal on average, so 1.5 leaves room; uint8 adds 1/1020 on average.
    assert 0 < distance <= 1.5 * np.abs(half - exact).mean() + 1 / 1020


def test_float16_is_refused_for_the_transformer_alone(build: Build) -> None:
    with pytest.raises(CheckpointError, match="transformer would run in float16"):
        load(build(), "t2v", dtype="float16")


def test_only_the_mode_of_an_images_posterior_is_used(build: Build, picture: Path) -> None:
    """Another seed gives other noise around the same image, so the first frame, which is pinned, is the same."""
    loaded = load(build("replace"), "replace")
    states: list[Any] = []
    for seed in (1, 2):
        hooks = engine.Hooks(save=states.append)
        list(loaded.generate([request(loaded, "replace", picture, seed=seed, num_inference_steps=1)], hooks))
    pipeline, media = native(loaded), Conditioning(image=np.asarray(Image.open(picture)))
    asked = request(loaded, "replace", picture)
    assert torch.equal(pipeline._encoded(media, asked), pipeline._encoded(media, asked))
    assert not torch.equal(states[0].latents, states[1].latents)
