"""Wan's tasks beyond text alone, against diffusers' pipelines: images, two images, a video to change, two experts, few
steps. That every stage of every kind agrees is in tests/models/test_families.py; here is what only Wan has."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.models.oracle import STAGE, WHOLE, Build, opened
from tests.models.wan import tiny_checkpoint
from tests.models.wan.tiny_checkpoint import CASES, CONCATENATED, DENSE_VAE, ONE_IMAGE
from vidgen import engine
from vidgen.conditioning import read
from vidgen.errors import ConfigError
from vidgen.loop import Loop
from vidgen.models.wan.pipeline import Branch, WanPipeline
from vidgen.sampling.step import Draws, Start
from vidgen.types import Hooks, Request

pytestmark = pytest.mark.usefixtures("without_gradients")

FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[str, Path] = {}

    def once(case: str = "", **options: Any) -> Path:
        key = case or repr(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("wan")
            CASES[case].write(made[key]) if case else tiny_checkpoint.build(made[key], **options)
        return made[key]

    return once


def picture(seed: int) -> Image.Image:
    """Smooth colours of the request's size."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of PNG frames: pictures 0, 1, 2, ..."""
    place = tmp_path_factory.mktemp("clip") / "clip.zip"
    with zipfile.ZipFile(place, "w") as archive:
        for index in range(FRAMES):
            archive.writestr(f"{index:05d}.png", png(index))
    return place


def asked(loaded: engine.Engine, prompt: str = "a red circle moving left", **changes: Any) -> Request:
    values = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 4, "seed": 7}
    return loaded.request(prompt, **{**values, "negative_prompt": "blue dog", **changes})


def native(loaded: engine.Engine) -> WanPipeline:
    assert isinstance(loaded.backend, Loop)
    assert isinstance(loaded.backend.pipeline, WanPipeline)
    return loaded.backend.pipeline


def last_latents(loaded: engine.Engine, *requests: Request) -> Tensor:
    """What denoising left, what is pinned included."""
    states: list[Any] = []
    starts: list[Start] = []
    pipeline = native(loaded)
    begin = pipeline.begin
    pipeline.begin = lambda *arguments: starts.append(begin(*arguments)) or starts[-1]  # type: ignore[method-assign]
    try:
        for _ in loaded.generate(requests, Hooks(save=states.append)):
            break
    finally:
        del pipeline.begin
    return starts[-1].pinned(states[-1].latents)


def oracle(name: str, folder: Path, **options: Any) -> Any:
    return opened(getattr(diffusers, name), folder, **options)


def theirs(pipe: Any, request: Request, **arguments: Any) -> Tensor:
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **arguments,
    ).frames


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "latents that are all alike would prove nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=WHOLE)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("tiling", [None, (24, 24, 16, 16)], ids=["whole", "tiled"])
@pytest.mark.parametrize("case", ["i2v", "first_and_last", "experts_i2v", "experts_first_and_last", "dense_i2v"])
def test_images_become_the_oracles_video(build: Build, case: str, tiling: tuple[int, int, int, int] | None) -> None:
    folder = build(case)
    loaded, pipe = engine.load(str(folder), task="i2v"), oracle("WanImageToVideoPipeline", folder)
    images: dict[str, Any] = {"image": 3} | ({"last_image": 4} if "last" in case else {})
    made = asked(loaded, **{name: png(seed) for name, seed in images.items()}, tiling=tiling)
    if tiling is not None:
        pipe.vae.enable_tiling(*tiling)
    given = {name: picture(seed) for name, seed in images.items()}
    # The second scale stands in our defaults, not in the oracle's.
    given |= dict(made.params)
    assert_same(last_latents(loaded, made), theirs(pipe, made, num_frames=FRAMES, **given))


def test_a_single_frame_is_made_of_an_image(build: Build) -> None:
    folder = build("experts_i2v")
    loaded, pipe = engine.load(str(folder), task="i2v"), oracle("WanImageToVideoPipeline", folder)
    made = asked(loaded, image=png(1), num_frames=1)
    expected = theirs(pipe, made, num_frames=1, image=picture(1), **dict(made.params))
    assert_same(last_latents(loaded, made), expected)


@pytest.mark.parametrize("case", ["i2v", "dense_i2v", "experts_i2v"])
def test_a_batch_of_other_images_and_prompts_is_what_each_is_alone(build: Build, case: str) -> None:
    loaded = engine.load(str(build(case)), task="i2v")
    first = asked(loaded, image=png(1), seed=1)
    second = asked(loaded, "the green square and the cat or a dog", image=png(2), seed=2, guidance_scale=3.0)
    together = last_latents(loaded, first, second)
    for found, request in zip(together.split(1), (first, second), strict=True):
        # Matrix products of a batch of two are blocked differently, and guided steps multiply it.
        torch.testing.assert_close(found, last_latents(loaded, request), rtol=0, atol=WHOLE)
    assert (together[0] - together[1]).abs().max() > 0.1


def begun(loaded: engine.Engine, request: Request) -> Start:
    pipeline, media = native(loaded), read(request)
    texts = {name: pipeline.encode_text([prompt]) for name, prompt in pipeline.texts(request, media).items()}
    return pipeline.begin([request], [media], texts, pipeline.schedule(request), Draws([request.seed]))


def test_mask_and_encoded_images_are_the_oracles(build: Build) -> None:
    folder = build("experts_first_and_last")
    loaded, pipe = engine.load(str(folder), task="i2v"), oracle("WanImageToVideoPipeline", folder)
    given = [pipe.video_processor.preprocess(picture(seed), height=HEIGHT, width=WIDTH) for seed in (3, 4)]
    for images in (given[:1], given):
        noise, expected = pipe.prepare_latents(
            *(images[0], 1, 4, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu")),
            generator=torch.Generator().manual_seed(7),
            last_image=images[1] if len(images) > 1 else None,
        )
        files = {"image": png(3)} | ({"last_image": png(4)} if len(images) > 1 else {})
        start = begun(loaded, asked(loaded, **files))
        assert torch.equal(start.latents, noise)
        extra = start.conditioning["conditional"].extra
        assert torch.equal(extra[:, :4], expected[:, :4])
        torch.testing.assert_close(extra, expected, rtol=0, atol=STAGE)


def test_both_branches_look_at_one_encoded_image(build: Build) -> None:
    loaded = engine.load(str(build("i2v")), task="i2v")
    conditional, unconditional = begun(loaded, asked(loaded, image=png(3))).conditioning.values()
    assert conditional.image is unconditional.image is not None
    assert conditional.extra is unconditional.extra


def test_a_dense_checkpoint_keeps_the_first_latent_frame_and_is_told_that_it_is_clean(build: Build) -> None:
    loaded = engine.load(str(build("dense_i2v")), task="i2v")
    made, pipeline, seen = asked(loaded, image=png(5)), native(loaded), []
    handle = pipeline.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[1].clone()))
    latents = last_latents(loaded, made)
    handle.remove()
    assert torch.equal(latents[:, :, :1], begun(loaded, made).pinned(torch.zeros_like(latents))[:, :, :1])
    schedule = pipeline.schedule(made)
    assert [t.tolist() for t in seen[::2]] == [[[0.0, t, t]] for t in schedule.timesteps]
    assert seen[0].dtype == torch.float32
    without = engine.load(str(build("dense_i2v")), task="t2v")
    native(without).transformer.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    last_latents(without, asked(without))
    assert seen[-1].shape == (1,), "without an image, one timestep for all frames"


def test_images_are_encoded_in_fp32_whatever_the_dtype(build: Build) -> None:
    folder = build("i2v")
    exact, half = (engine.load(str(folder), task="i2v", dtype=dtype) for dtype in ("float32", "bfloat16"))
    parts = {name.partition(".")[0]: weight.dtype for name, weight in native(half).vae.named_parameters()}
    assert parts == {
        "encoder": torch.float32,
        "quant_conv": torch.float32,
        "post_quant_conv": torch.bfloat16,
        "decoder": torch.bfloat16,
    }
    images = [begun(loaded, asked(loaded, image=png(3))).conditioning["conditional"].extra for loaded in (exact, half)]
    assert images[1].dtype == torch.bfloat16
    assert torch.equal(images[0].bfloat16(), images[1]), "rounded once, when it goes into the transformer"
    frames = np.concatenate(list(next(iter(half.generate([asked(half, image=png(3))]))).chunks))
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and frames.std() > 1


# ---------------------------------------------------------------- a video to change


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.55, 0.2])
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_a_video_is_changed_as_the_oracle_changes_it(build: Build, clip: Path, sampler: str, strength: float) -> None:
    # A corrector switched off counts from the whole schedule's first step, wherever denoising begins.
    folder = build(scheduler={"disable_corrector": [3]}) if sampler == "unipc" else build(euler=True)
    loaded, pipe = engine.load(str(folder), task="v2v"), oracle("WanVideoToVideoPipeline", folder)
    made = asked(loaded, video=clip, num_inference_steps=7, params={"strength": strength})
    assert native(loaded).schedule(made).steps == int(7 * strength)
    expected = theirs(pipe, made, video=[picture(index) for index in range(FRAMES)], strength=strength)
    assert_same(last_latents(loaded, made), expected)


def test_a_weaker_change_leaves_more_of_the_video(build: Build, clip: Path) -> None:
    loaded = engine.load(str(build("v2v")), task="v2v")
    clean = native(loaded)._encoded(read(asked(loaded, video=clip, params={"strength": 0.5})).video, None)  # type: ignore[arg-type]
    distances = []
    for strength in (0.25, 1.0):
        start = begun(loaded, asked(loaded, video=clip, params={"strength": strength}))
        distances.append(float((start.latents - clean).square().mean()))
    assert distances[0] < distances[1]


# ---------------------------------------------------------------- two experts


@pytest.mark.parametrize("second", [None, 1.0, 6.0])
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_each_expert_guides_with_its_own_scale(build: Build, sampler: str, second: float | None) -> None:
    folder = build(boundary_ratio=0.875, euler=sampler == "euler")
    loaded, pipe = engine.load(str(folder)), oracle("WanPipeline", folder)
    made = asked(loaded, guidance_scale=4.0, params={"guidance_scale_2": second})
    schedule = native(loaded).schedule(made)
    guidances = [native(loaded).guidance(made, schedule, i) for i in range(schedule.steps)]
    assert [g.expert for g in guidances] == [
        "transformer" if timestep >= 875 else "transformer_2" for timestep in schedule.timesteps
    ]
    assert {g.expert: g.scale for g in guidances} == {"transformer": 4.0, "transformer_2": second or 4.0}
    expected = theirs(pipe, made, num_frames=FRAMES, guidance_scale_2=second)
    assert_same(last_latents(loaded, made), expected)


def test_the_first_scale_alone_switches_guidance_off(build: Build) -> None:
    folder = build("experts_t2v")
    loaded, pipe = engine.load(str(folder)), oracle("WanPipeline", folder)
    made = asked(loaded, guidance_scale=1.0, params={"guidance_scale_2": 3.0})
    expected = theirs(pipe, made, num_frames=FRAMES, guidance_scale_2=3.0)
    assert_same(last_latents(loaded, made), expected)


def test_a_prompts_keys_and_values_are_made_once_an_expert_and_kept_for_the_one_at_work(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine.load(str(build("experts_t2v")))
    pipeline, made, held = native(loaded), [], []
    for name, expert in pipeline.experts.items():
        original = expert.text_context
        monkeypatch.setattr(
            expert, "text_context", lambda text, name=name, original=original: made.append(name) or original(text)
        )
    predict = pipeline.predict

    def watched(x: Tensor, schedule: Any, i: int, conditioning: Branch, *rest: Any) -> Tensor:
        result = predict(x, schedule, i, conditioning, *rest)
        assert conditioning.made is not None
        held.append(conditioning.made[0])
        return result

    monkeypatch.setattr(pipeline, "predict", watched)
    last_latents(loaded, asked(loaded), asked(loaded, seed=9))
    assert made == ["transformer"] * 2 + ["transformer_2"] * 2, "two prompts, which the batch's items share"
    assert held == ["transformer"] * 4 + ["transformer_2"] * 4
    assert pipeline._negative == {}, "the next batch begins with the other expert"


# ---------------------------------------------------------------- few steps


class Explicit:
    """The oracle's scheduler with a schedule of ours: its pipelines do not hand one on."""

    def __init__(self, scheduler: Any, **given: Any) -> None:
        self.original, self.given = scheduler.set_timesteps, given
        scheduler.set_timesteps = self

    def __call__(self, steps: int, device: Any = None) -> None:
        self.original(device=device, **self.given)


@pytest.mark.parametrize(
    ("sampler", "given", "shift"),
    [
        ("euler", {"sigmas": (1.0, 0.75, 0.5, 0.25)}, 5.0),
        ("euler", {"timesteps": (1000.0, 937.5, 833.33, 625.0)}, 1.0),
        ("euler", {"timesteps": (999.0, 757.0)}, 1.0),
        ("unipc", {"sigmas": (1.0, 0.9375, 0.8333, 0.625)}, 1.0),
        ("unipc", {"sigmas": (1.0, 0.5)}, 5.0),
        ("unipc", {"sigmas": (1.0,)}, 5.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["t2v", "experts_t2v"])
def test_a_distilled_models_few_explicit_steps_are_the_oracles(
    build: Build, case: str, sampler: str, given: dict[str, tuple[float, ...]], shift: float
) -> None:
    boundary = {"boundary_ratio": 0.875} if case == "experts_t2v" else {}
    options = {"euler": True} if sampler == "euler" else {"scheduler": {"flow_shift": shift}}
    folder = build(**boundary, **options)
    loaded, pipe = engine.load(str(folder)), oracle("WanPipeline", folder)
    if sampler == "euler":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # As an array: the UniPC scheduler multiplies what it is given.
    Explicit(pipe.scheduler, **{name: np.array(values) for name, values in given.items()})
    steps = len(next(iter(given.values())))
    made = asked(loaded, guidance_scale=1.0, shift=shift, num_inference_steps=steps, **given)
    seen: list[int] = []
    handles = [e.register_forward_pre_hook(lambda *_: seen.append(1)) for e in native(loaded).experts.values()]
    found = last_latents(loaded, made)
    for handle in handles:
        handle.remove()
    assert len(seen) == steps, "one forward a step"
    assert_same(found, theirs(pipe, made, num_frames=FRAMES))


# ---------------------------------------------------------------- what a checkpoint cannot do


@pytest.mark.parametrize(
    ("options", "task", "allowed"),
    [
        ({}, "i2v", "t2v, v2v"),
        ({"transformer": ONE_IMAGE}, "t2v", "i2v"),
        ({"boundary_ratio": 0.9, "transformer": CONCATENATED}, "v2v", "i2v"),
        ({"boundary_ratio": 0.875}, "v2v", "t2v"),
        ({"vae": DENSE_VAE, "expand_timesteps": True}, "v2v", "t2v, i2v"),
    ],
    ids=["text", "image", "image_experts", "experts", "dense"],
)
def test_a_task_that_the_checkpoint_cannot_do_is_refused_when_it_is_loaded(
    build: Build, options: dict[str, Any], task: str, allowed: str
) -> None:
    with pytest.raises(ConfigError, match=f"'{task}' is not a task of this checkpoint of wan; allowed: {allowed}"):
        engine.load(str(build(**options)), task=task)
