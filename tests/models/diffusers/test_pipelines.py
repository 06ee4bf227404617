"""The pipelines that have a recipe of their own, end to end: each against its class called as its model card does.

Sizes are tiny, the calls are the published ones. The library's own call is the oracle, with `torch.manual_seed(seed)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    I2VGenXLPipeline,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoZeroPipeline,
)
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import CrossFrameAttnProcessor
from PIL import Image
from safetensors.torch import load_file

from tests.models.diffusers.conftest import Checkpoint, clip, frames, load, picture, png, same, written
from tests.models.diffusers.tiny_checkpoint import motion_lora
from vidgen import media
from vidgen.models.diffusers.recipes.canny import edges
from vidgen.types import Lora

PROMPT, NEGATIVE = "a red circle moving left", "blue dog"
DDIM = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "linspace", "steps_offset": 1}
NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("name", "length"), [("svd", 14), ("svd_xt", 25)])
def test_stable_video_diffusion_is_the_librarys_own(
    checkpoint: Checkpoint, tmp_path: Path, name: str, length: int
) -> None:
    folder = checkpoint(name)
    loaded = load(folder, task="i2v")
    image = picture(16, 24)
    params = {"motion_bucket_id": 90, "noise_aug_strength": 0.1, "decode_chunk_size": 9, "max_guidance_scale": 2.5}
    made = loaded.request(
        "only carried", image=png(image), height=16, width=24, fps=6.0, num_inference_steps=2, seed=7, params=params
    )
    assert made.num_frames == length
    done = written(loaded, made, tmp_path / "out.zip", "png")
    assert (done.frames, done.fps, done.height, done.width) == (length, 6.0, 16, 24)
    pipe = quiet(StableVideoDiffusionPipeline.from_pretrained(folder))
    call: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 2, "fps": 6, **params}
    expected = pipe(image, generator=torch.manual_seed(7), output_type="np", **call).frames[0]
    same(media.read_frames(done.path), expected)


@pytest.mark.parametrize(
    "change",
    [{"motion_bucket_id": 20}, {"noise_aug_strength": 0.5}, {"min_guidance_scale": 2.9}, {"max_guidance_scale": 8.0}],
)
def test_each_knob_of_stable_video_diffusion_moves_the_picture(checkpoint: Checkpoint, change: dict[str, Any]) -> None:
    loaded = load(checkpoint("svd"), task="i2v")
    common: dict[str, Any] = {"image": png(picture(16, 16)), "height": 16, "width": 16, "num_frames": 3, "seed": 1}
    plain = loaded.request("", num_inference_steps=2, **common)
    turned = loaded.request("", num_inference_steps=2, params=change, **common)
    assert (frames(loaded, plain)[0] != frames(loaded, turned)[0]).any()


def animatediff(checkpoint: Checkpoint, **settings: Any) -> Any:
    options = {
        "components": {"motion_adapter": str(checkpoint("motion_adapter"))},
        "scheduler": {"class": "DDIMScheduler", **DDIM},
    }
    return load(checkpoint("sd"), pipeline="AnimateDiffPipeline", options=options, **settings)


def library_animatediff(checkpoint: Checkpoint) -> Any:
    adapter = MotionAdapter.from_pretrained(checkpoint("motion_adapter"))
    pipe = quiet(AnimateDiffPipeline.from_pretrained(checkpoint("sd"), motion_adapter=adapter))
    pipe.scheduler = DDIMScheduler.from_pretrained(checkpoint("sd"), subfolder="scheduler", **DDIM)
    return pipe


SMALL: dict[str, Any] = {"height": 16, "width": 24, "num_frames": 6, "num_inference_steps": 3}


def test_animatediff_is_the_librarys_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    loaded = animatediff(checkpoint)
    made = loaded.request(
        PROMPT, sampler="DDIMScheduler", negative_prompt=NEGATIVE, seed=3, guidance_scale=6.0, **SMALL
    )
    assert made.fps == 8.0 and dict(made.params)["decode_chunk_size"] == 16
    pipe = library_animatediff(checkpoint)
    call = {"negative_prompt": NEGATIVE, "guidance_scale": 6.0, "generator": torch.Generator().manual_seed(3), **SMALL}
    same(frames(loaded, made)[0], pipe(PROMPT, output_type="np", **call).frames[0])
    gif = written(loaded, made, tmp_path / "out.gif", "gif")
    assert (gif.frames, gif.codec) == (6, "gif") and not gif.constant


def test_a_motion_lora_is_added_as_its_file_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapter = checkpoint("motion_adapter")
    folder = motion_lora(tmp_path / "lora", adapter)
    loaded = animatediff(checkpoint, loras=(Lora(str(folder), 0.5),))
    made = loaded.request(PROMPT, seed=3, **SMALL)
    plain = animatediff(checkpoint)
    assert (frames(loaded, made)[0] != frames(plain, made)[0]).any()

    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    pipe = library_animatediff(checkpoint)
    state = pipe.unet.state_dict()
    for key in [key for key in tensors if key.endswith(".down.weight")]:
        module, _, short = key.removesuffix("_lora.down.weight").rpartition(".processor.to_")
        target = f"{module.removeprefix('unet.')}.to_{'out.0' if short == 'out' else short}.weight"
        state[target] += 0.5 * tensors[key.replace(".down.weight", ".up.weight")] @ tensors[key]
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="np", **SMALL).frames[0]
    same(frames(loaded, made)[0], expected, 1e-4)  # sums in another order


def test_i2vgen_xl_draws_everything_from_the_rows_seed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("i2vgen_xl")
    loaded = load(folder, task="i2v")
    image = picture(16, 24)
    sizes: dict[str, Any] = {"height": 16, "width": 24, "num_frames": 4, "num_inference_steps": 2}
    made = loaded.request(PROMPT, image=png(image), negative_prompt=NEGATIVE, seed=5, **sizes)
    assert (made.fps, dict(made.params)["clip_skip"]) == (16.0, 1)
    first = frames(loaded, made)[0]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert (frames(loaded, made)[0] == first).all()
    assert torch.equal(torch.get_rng_state(), before), "the process's own generator is left alone"

    pipe = quiet(I2VGenXLPipeline.from_pretrained(folder))
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)  # where transformers 4 had it
    call = {"negative_prompt": NEGATIVE, "generator": torch.manual_seed(5), "output_type": "np", **sizes}
    same(first, pipe(PROMPT, image=image, **call).frames[0])
    other = loaded.request(PROMPT, image=png(image), negative_prompt=NEGATIVE, seed=6, **sizes)
    assert (frames(loaded, other)[0] != first).any()
    assert written(loaded, made, tmp_path / "out.gif", "gif").frames == 4


def test_clip_skip_skips_the_last_layer_as_it_did(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("i2vgen_xl"), task="i2v")
    pipe: Any = loaded.backend.pipe  # type: ignore[attr-defined]
    pipe._guidance_scale = 1.0
    skipped, _ = pipe.encode_prompt(PROMPT, "cpu", 1, clip_skip=1)
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=12, return_tensors="pt").input_ids
    hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    assert torch.equal(skipped, pipe.text_encoder.final_layer_norm(hidden[-2]))
    assert not any(name.startswith("text_model") for name in pipe.text_encoder.state_dict())


def test_text2video_zero_is_the_librarys_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("sd")
    loaded = load(folder, pipeline="TextToVideoZeroPipeline")
    params = {"motion_field_strength_x": 9.0, "motion_field_strength_y": -5.0, "t0": 3, "t1": 5}
    sizes: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 8}
    made = loaded.request(PROMPT, sampler="DDIMScheduler", seed=4, num_frames=5, params=params, **sizes)
    assert made.fps == 4.0
    pipe = quiet(TextToVideoZeroPipeline.from_pretrained(folder, **NO_CHECKER))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    call = {**sizes, **params, "video_length": 5, "generator": torch.manual_seed(4), "output_type": "np"}
    expected = pipe(PROMPT, **call).images
    first = frames(loaded, made)[0]
    same(first, expected)
    assert (frames(loaded, made)[0] == first).all(), "the scheduler that the pipeline swaps leaves nothing behind"
    assert (first[0] != first[1]).any()
    assert written(loaded, made, tmp_path / "out.mp4").fps == 4.0


def library_controlnet(checkpoint: Checkpoint) -> Any:
    network = ControlNetModel.from_pretrained(checkpoint("controlnet"))
    pipe = quiet(StableDiffusionControlNetPipeline.from_pretrained(checkpoint("sd"), controlnet=network, **NO_CHECKER))
    pipe.unet.set_attn_processor(CrossFrameAttnProcessor(batch_size=2))
    pipe.controlnet.set_attn_processor(CrossFrameAttnProcessor(batch_size=2))
    return pipe


@pytest.mark.parametrize("control", ["canny", "given"])
def test_controlled_text2video_zero_is_the_published_recipe(
    checkpoint: Checkpoint, tmp_path: Path, control: str
) -> None:
    options = {"components": {"controlnet": str(checkpoint("controlnet"))}}
    loaded = load(checkpoint("sd"), pipeline="Text2VideoZeroControlNet", task="v2v", options=options)
    pictures, data = clip(4, 16, 24)
    made = loaded.request(
        PROMPT,
        video=data,
        height=16,
        width=24,
        num_frames=4,
        num_inference_steps=3,
        negative_prompt=NEGATIVE,
        seed=8,
        params={"control": control},
    )
    shown = pictures if control == "given" else [Image.fromarray(edges(np.asarray(image))) for image in pictures]
    latents = torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(8)).repeat(4, 1, 1, 1)
    expected = library_controlnet(checkpoint)(
        prompt=[PROMPT] * 4,
        negative_prompt=[NEGATIVE] * 4,
        image=shown,
        latents=latents,
        num_inference_steps=3,
        output_type="np",
    ).images
    first = frames(loaded, made)[0]
    same(first, expected, 1e-4)  # the documentation's processor is the one without fused attention
    assert (frames(loaded, made)[0] == first).all()
    assert written(loaded, made, tmp_path / "out.gif", "gif").frames == 4


def test_instruct_pix2pix_edits_a_video_as_published(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("ip2p")
    loaded = load(folder, pipeline="Text2VideoZeroInstructPix2Pix", task="v2v")
    pictures, data = clip(3, 16, 24)
    made = loaded.request(
        "a blue square",
        video=data,
        height=16,
        width=24,
        num_frames=3,
        num_inference_steps=3,
        seed=8,
        params={"image_guidance_scale": 1.3},
    )
    pipe = quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, **NO_CHECKER))
    pipe.unet.set_attn_processor(CrossFrameAttnProcessor(batch_size=3))
    call: dict[str, Any] = {"num_inference_steps": 3, "image_guidance_scale": 1.3, "output_type": "np"}
    expected = pipe(["a blue square"] * 3, image=pictures, generator=torch.manual_seed(8), **call).images
    same(frames(loaded, made)[0], expected, 1e-4)  # as above
    assert written(loaded, made, tmp_path / "out.gif", "gif").frames == 3


def test_frames_look_at_the_first_and_the_next_call_is_free_of_it(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("ip2p"), pipeline="Text2VideoZeroInstructPix2Pix", task="v2v")
    sizes: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 3, "num_inference_steps": 2, "seed": 1}
    pictures, data = clip(3, 16, 16)
    processors = {type(p).__name__ for p in loaded.backend.pipe.unet.attn_processors.values()}  # type: ignore[attr-defined]
    edited = frames(loaded, loaded.request("red", video=data, **sizes))[0]
    alone = quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(checkpoint("ip2p"), **NO_CHECKER))(
        ["red"] * 3, image=pictures, num_inference_steps=2, generator=torch.manual_seed(1), output_type="np"
    ).images
    same(edited[:1], alone[:1], 1e-4)
    assert np.abs(edited[1:] / 255.0 - alone[1:]).max() > 0.01
    assert processors == {type(p).__name__ for p in loaded.backend.pipe.unet.attn_processors.values()}  # type: ignore[attr-defined]
