"""CogVideoX as a whole and stage by stage against diffusers' three pipelines, on tiny random checkpoints."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from PIL import Image
from transformers import T5EncoderModel

from tests.models.cogvideox import tiny_checkpoint
from tests.models.oracle import STAGE, WHOLE, Build, assert_same_frames, native, opened, ours
from vidgen import engine
from vidgen.conditioning import Conditioning
from vidgen.errors import ConfigError
from vidgen.sampling.step import Draws
from vidgen.text.prompt import Prompt
from vidgen.types import Hooks, Media, Request

pytestmark = pytest.mark.usefixtures("without_gradients")

PROMPT, NEGATIVE = "a red circle moving left", "blue &amp; green  dog"
HEIGHT, WIDTH = 32, 48
ORACLES = {
    "t2v": CogVideoXPipeline,
    "i2v": CogVideoXImageToVideoPipeline,
    "v2v": CogVideoXVideoToVideoPipeline,
}


def picture(seed: int = 0) -> np.ndarray:
    """Smooth colours, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.stack([np.roll(picture(seed), 3 * i, axis=1) for i in range(frames)])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def media(data: bytes) -> Media:
    return Media("", hashlib.sha256(data).hexdigest(), data)


def zipped(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i, frame in enumerate(frames):
            archive.writestr(f"{i:04}.png", png(frame))
    return file.getvalue()


def oracle(folder: Path, task: str, **options: Any) -> Any:
    return opened(ORACLES[task], folder, **options)


def theirs(pipe: Any, request: Request, **options: Any) -> Any:
    if request.task == "v2v":
        given: dict[str, Any] = {"strength": request.param("strength")}
        given["video"] = [Image.fromarray(frame) for frame in clip(request.num_frames, request.seed)]
    else:
        given = {"num_frames": request.num_frames}
        given |= {"image": Image.fromarray(picture(request.seed))} if request.task == "i2v" else {}
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        use_dynamic_cfg=request.param("use_dynamic_cfg"),
        generator=torch.Generator().manual_seed(request.seed),
        **given,
        **{"output_type": "np", **options},
    ).frames[0]


def request(loaded: engine.Engine, **changes: Any) -> Request:
    """Its picture or video follows from its seed."""
    values: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 9, "negative_prompt": NEGATIVE}
    values |= {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 7, "prompt": PROMPT} | changes
    params = {"strength": 0.5 if loaded.task == "v2v" else None, "use_dynamic_cfg": False}
    values["params"] = params | values.get("params", {})
    if loaded.task == "i2v":
        values["image"] = media(png(picture(values["seed"])))
    if loaded.task == "v2v":
        values["video"] = media(zipped(clip(values["num_frames"], values["seed"])))
    return loaded.request(values.pop("prompt"), **values)


KINDS = {
    "2b": ("t2v", "2b", {}),
    "5b": ("t2v", "5b", {"num_frames": 17}),
    "1.5": ("t2v", "1.5", {}),
    "2b one frame": ("t2v", "2b", {"num_frames": 1}),
    "1.5 one frame": ("t2v", "1.5", {"num_frames": 1}),
    "5b-i2v": ("i2v", "5b-i2v", {}),
    "1.5-i2v": ("i2v", "1.5-i2v", {}),
    "2b v2v": ("v2v", "2b", {}),
    "5b v2v": ("v2v", "5b", {"params": {"strength": 1.0}}),
    "1.5 v2v": ("v2v", "1.5", {"num_frames": 8, "params": {"strength": 0.8}}),
}


@pytest.mark.parametrize("dpm", [False, True], ids=["ddim", "dpm"])
@pytest.mark.parametrize(("task", "kind", "changes"), KINDS.values(), ids=KINDS)
def test_a_whole_video_is_the_oracles(build: Build, task: str, kind: str, changes: dict[str, Any], dpm: bool) -> None:
    folder = build(kind, dpm=dpm)
    loaded = engine.load(str(folder), task=task)
    made = request(loaded, **changes)
    assert made.sampler == ("dpm" if dpm else "ddim")
    assert_same_frames(ours(loaded, made)[0], theirs(oracle(folder, task), made))


@pytest.mark.parametrize("task", ["t2v", "v2v"])
@pytest.mark.parametrize("changes", [{"guidance_scale": 1.0}, {"params": {"use_dynamic_cfg": True}}])
def test_guidance_is_the_oracles(build: Build, task: str, changes: dict[str, Any]) -> None:
    folder = build("5b")
    loaded = engine.load(str(folder), task=task)
    made = request(loaded, num_inference_steps=6, **changes)
    assert_same_frames(ours(loaded, made)[0], theirs(oracle(folder, task), made))


def test_dynamic_guidance_is_a_scale_for_each_step(build: Build) -> None:
    loaded = engine.load(str(build("5b")))
    made = request(loaded, num_inference_steps=50, guidance_scale=6.0, params={"use_dynamic_cfg": True})
    pipeline = native(loaded)
    schedule = pipeline.schedule(made)
    scales = [pipeline.guidance(made, schedule, i).scale for i in range(50)]
    assert all(1 <= scale <= 7 for scale in scales) and len(set(scales)) > 40
    plain = request(loaded, num_inference_steps=50, guidance_scale=6.0)
    assert {pipeline.guidance(plain, schedule, i).scale for i in range(50)} == {6.0}


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_requests_sampler_wins_over_the_checkpoints(build: Build, sampler: str, steps: int) -> None:
    folder = build(dpm=sampler == "ddim")
    pipe = oracle(folder, "t2v")
    kind = CogVideoXDPMScheduler if sampler == "dpm" else CogVideoXDDIMScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    loaded = engine.load(str(folder))
    made = request(loaded, sampler=sampler, num_inference_steps=steps)
    assert_same_frames(ours(loaded, made)[0], theirs(pipe, made))


@pytest.mark.parametrize("strength", [0.26, 0.5, 0.99, 1])
def test_strength_leaves_the_last_steps_as_the_oracle_does(build: Build, strength: float) -> None:
    folder = build("5b", dpm=True)
    loaded = engine.load(str(folder), task="v2v")
    made = request(loaded, params={"strength": strength}, num_inference_steps=5)
    assert native(loaded).schedule(made).steps == int(5 * strength)
    assert_same_frames(ours(loaded, made)[0], theirs(oracle(folder, "v2v"), made))


def test_explicit_timesteps_of_a_request_are_its_schedule(build: Build) -> None:
    loaded = engine.load(str(build()))
    spaced = request(loaded, num_inference_steps=4)
    given = request(loaded, num_inference_steps=4, timesteps=(999, 749, 499, 249))
    assert native(loaded).schedule(given) == native(loaded).schedule(spaced)
    assert np.array_equal(ours(loaded, given)[0], ours(loaded, spaced)[0])
    other = request(loaded, num_inference_steps=3, timesteps=(999, 600, 20))
    assert native(loaded).schedule(other).timesteps == (999.0, 600.0, 20.0)


def test_text_is_the_oracles_padding_included_and_prompts_are_not_cleaned(build: Build) -> None:
    folder = build()
    loaded = native(engine.load(str(folder)))
    pipe = oracle(folder, "t2v")
    for prompt in (PROMPT, NEGATIVE, ""):
        expected, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False)
        text = loaded.encode_text([Prompt(prompt)])[0]
        assert text.embedding.shape == (226, 16)
        assert float((expected[0] - text.embedding).abs().max()) < STAGE
        assert float(expected[0, text.tokens :].abs().max()) > 0.1, "padding is encoded too"


@pytest.mark.parametrize(("task", "kind"), [("t2v", "2b"), ("i2v", "5b-i2v"), ("i2v", "1.5-i2v"), ("v2v", "5b")])
def test_states_are_the_oracles_step_by_step_in_its_own_layout(build: Build, task: str, kind: str) -> None:
    folder = build(kind, dpm=True)
    loaded = engine.load(str(folder), task=task)
    made = request(loaded)
    states: list[Any] = []
    next(iter(loaded.generate([made], Hooks(save=states.append))))
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, i: int, t: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(given["latents"])
        return given

    theirs(oracle(folder, task), made, output_type="latent", callback_on_step_end=keep)
    assert len(states) == len(seen) > 1
    for state, expected in zip(states, seen, strict=True):
        assert state.latents.shape == expected.shape and state.latents.dtype == torch.float32
        assert all(len(value) == 1 and value.dtype == torch.float32 for value in state.history.values())
        assert float((state.latents - expected).abs().max()) < WHOLE


@pytest.mark.parametrize(("task", "kind"), [("i2v", "5b-i2v"), ("i2v", "1.5-i2v"), ("v2v", "2b")])
def test_the_start_and_the_image_are_the_oracles_drawn_in_its_order(build: Build, task: str, kind: str) -> None:
    folder = build(kind)
    loaded = engine.load(str(folder), task=task)
    made, pipeline, pipe = request(loaded), native(loaded), oracle(folder, task)
    schedule, generator = pipeline.schedule(made), torch.Generator().manual_seed(made.seed)
    given = Conditioning(picture(7)) if task == "i2v" else Conditioning(video=clip(9, 7))
    texts = {"conditional": pipeline.encode_text([Prompt(PROMPT)])}
    draws = Draws([made.seed])
    start = pipeline.begin([made], [given], texts, schedule, draws)
    sizes = {"height": HEIGHT, "width": WIDTH, "num_channels_latents": 4, "dtype": torch.float32, "device": "cpu"}
    if task == "i2v":
        frames = 13 if kind == "1.5-i2v" else 9
        pixels = pipe.video_processor.preprocess(Image.fromarray(picture(7)), HEIGHT, WIDTH)
        noise, image = pipe.prepare_latents(pixels, num_frames=frames, generator=generator, **sizes)
        found = start.conditioning["conditional"].image
        assert found.shape == image.shape and float((found - image).abs().max()) < STAGE
        assert not found[:, 1:].any() and float(found[:, 0].std()) > 0.1
    else:
        pixels = pipe.video_processor.preprocess_video([Image.fromarray(f) for f in clip(9, 7)], HEIGHT, WIDTH)
        timestep = torch.tensor([int(schedule.timesteps[0])])
        noise = pipe.prepare_latents(video=pixels, timestep=timestep, generator=generator, **sizes)
    assert start.latents.shape == noise.shape and float((start.latents - noise).abs().max()) < STAGE
    assert torch.equal(draws.generators[0].get_state(), generator.get_state())


def test_decoding_is_the_oracles(build: Build) -> None:
    folder = build("1.5")
    loaded, pipe = engine.load(str(folder)), oracle(folder, "t2v")
    latents = torch.randn((1, 4, 4, 4, 6), generator=torch.Generator().manual_seed(1))
    found = torch.cat(list(native(loaded).decode(latents, request(loaded), Draws([0]))))
    # The first latent frame fills the patch and is dropped.
    video = pipe.decode_latents(latents[:, 1:])
    expected = pipe.video_processor.postprocess_video(video, output_type="np")[0]
    assert found.shape == (9, HEIGHT, WIDTH, 3)
    assert np.abs(found.numpy() - expected).max() < STAGE


@pytest.mark.parametrize(("task", "kind"), [("t2v", "2b"), ("v2v", "2b"), ("i2v", "1.5-i2v")])
def test_tiles_are_the_oracles_for_encoding_and_decoding(build: Build, task: str, kind: str) -> None:
    folder = build(kind)
    loaded, pipe = engine.load(str(folder), task=task), oracle(folder, task)
    made = request(loaded, tiling=(16, 32, 8, 24))
    pipe.vae.enable_tiling(16, 32, 0.5, 0.25)
    tiled = ours(loaded, made)[0]
    assert_same_frames(tiled, theirs(pipe, made))
    assert np.abs(tiled.astype(int) - ours(loaded, request(loaded))[0].astype(int)).max() > 1


@pytest.mark.parametrize(("task", "kind"), [("t2v", "2b"), ("i2v", "1.5-i2v"), ("v2v", "5b")])
def test_a_batch_is_its_items_alone(build: Build, task: str, kind: str) -> None:
    folder = build(kind, dpm=True)
    loaded, pipe = engine.load(str(folder), task=task), oracle(folder, task)
    first = request(loaded, seed=1)
    second = request(loaded, seed=2, guidance_scale=2.0, prompt="cat", negative_prompt="")
    frames = ours(loaded, first, second)
    assert_same_frames(frames[0], theirs(pipe, first))
    assert_same_frames(frames[1], theirs(pipe, second))


def test_a_step_that_was_saved_goes_on_with_the_same_bits(build: Build) -> None:
    loaded = engine.load(str(build("5b", dpm=True)))
    made = request(loaded)
    states: list[Any] = []
    whole = np.concatenate(list(next(iter(loaded.generate([made], Hooks(save=states.append)))).chunks))
    saved = type(states[0]).from_bytes(states[1].to_bytes())
    again = np.concatenate(list(next(iter(loaded.generate([made], Hooks(resume=lambda requests: saved)))).chunks))
    assert np.array_equal(whole, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_as_near_to_fp32_as_the_oracle(build: Build, dtype: torch.dtype) -> None:
    folder = build(dtype=dtype)
    exact = theirs(oracle(folder, "t2v", torch_dtype=torch.float32), request(engine.load(str(folder))))
    loaded = engine.load(str(folder))
    assert set(native(loaded).dtypes.values()) == {dtype}
    assert loaded.params.dtypes[0] == ("transformer", str(dtype)[6:])
    # The oracle would draw in half precision, which gives other noise.
    noise = torch.randn((1, 3, 4, 4, 6), generator=torch.Generator().manual_seed(7)).to(dtype)
    half = theirs(oracle(folder, "t2v", torch_dtype=dtype), request(loaded), latents=noise)
    distance = np.abs(ours(loaded, request(loaded))[0] / 255.0 - exact).mean()
    # Rounding is random: equal on average, so 1.5 leaves room; uint8 adds 1/1020 on average.
    assert 0 < distance <= 1.5 * np.abs(half - exact).mean() + 1 / 1020


def test_the_text_encoder_in_fp16_keeps_in_fp32_what_transformers_keeps(build: Build) -> None:
    folder = build(dtype=torch.float16)
    loaded = native(engine.load(str(folder)))
    reference = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float16)
    own = {name: weight.dtype for name, weight in loaded.text_encoder.model.named_parameters()}
    assert own == {name: weight.dtype for name, weight in reference.named_parameters()}
    assert torch.float32 in own.values()
    text = loaded.encode_text([Prompt(PROMPT)])[0]
    ids = torch.tensor([loaded.text_encoder.token_ids(PROMPT) + [0] * (226 - text.tokens)])
    assert torch.equal(text.embedding, reference(ids).last_hidden_state[0].half())


def test_timesteps_stay_fp32(build: Build) -> None:
    loaded = engine.load(str(build()), dtype="bfloat16")
    seen: list[torch.Tensor] = []
    native(loaded).transformer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    made = request(loaded)
    ours(loaded, made)
    assert {t.dtype for t in seen} == {torch.float32}
    assert [float(t[0]) for t in seen[::2]] == list(native(loaded).schedule(made).timesteps)


def test_a_task_that_a_checkpoint_does_not_have_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="'i2v' is not a task of this checkpoint of cogvideox; allowed: t2v, v2v"):
        engine.load(str(build("5b")), task="i2v")
    with pytest.raises(ConfigError, match="allowed: i2v"):
        engine.load(str(build("5b-i2v")), task="t2v")


def test_a_checkpoints_own_recipe_replaces_the_published_one(build: Build, tmp_path: Path) -> None:
    folder = tiny_checkpoint.build(tmp_path, "2b")
    (folder / "vidgen.json").write_text(json.dumps({"defaults": {"num_inference_steps": 3, "sampler": "dpm"}}))
    made = engine.load(str(folder)).request(PROMPT)
    assert (made.num_inference_steps, made.sampler, made.height, made.width) == (3, "dpm", HEIGHT, WIDTH)
