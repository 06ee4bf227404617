"""The checkpoint that ships: small, honest about itself, and it does what its prompts say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from vidgen import engine
from vidgen.demo import data, publish
from vidgen.demo.measure import Result, measure, table

FOLDER = Path(engine.__file__).parent / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Every eighth trained and every fourth held-out combination: 9 + 6 clips, with seeds that nothing else uses."""
    asked = [*data.TRAINED[::8], *data.HELD_OUT[::4]]
    return list(measure(engine.load("demo"), asked, 7_000_000, tmp_path_factory.mktemp("clips")))


def test_the_checkpoint_is_at_most_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16_000_000


def test_the_checkpoint_is_stored_in_bf16_throughout() -> None:
    for path in FOLDER.rglob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}, path


def test_its_own_defaults_are_the_sizes_it_was_trained_for() -> None:
    request = engine.load("demo").request("a red circle moving left")
    assert (request.height, request.width, request.num_frames, request.fps) == (64, 64, 17, 8.0)
    assert (request.sampler, request.shift, request.negative_prompt) == ("unipc", publish.SHIFT, "")


def test_clips_show_the_colour_and_the_motion_that_was_asked_for(results: list[Result]) -> None:
    # The whole table (README.md of the checkpoint) is at 95 % or above; one miss of 15 is 93 %.
    colour, direction, _ = np.mean([r.right for r in results], axis=0)
    assert colour >= 0.93, table(results)
    assert direction >= 0.93, table(results)


def test_clips_show_the_shape_that_was_asked_for(results: list[Result]) -> None:
    assert np.mean([r.right[2] for r in results]) >= 0.8, table(results)


def test_clips_of_combinations_never_seen_in_training_are_right_too(results: list[Result]) -> None:
    held_out = [r for r in results if r.asked.held_out]
    assert len(held_out) == 6
    # The promise over all 24 is 90, 90 and 70 %; of six, that leaves room for one, one and two misses.
    assert (np.sum([r.right for r in held_out], axis=0) >= [5, 5, 4]).all(), table(results)


def test_another_seed_gives_another_clip_of_the_same_thing() -> None:
    loaded = engine.load("demo")
    requests = [loaded.request("a green square moving up", seed=seed) for seed in (1, 2)]
    first, second = (np.concatenate(list(video.chunks)) for video in loaded.generate(requests, batch=1))
    assert np.abs(first.astype(int) - second).mean() > 1


def test_diffusers_opens_the_folder_and_makes_the_same_video() -> None:
    loaded = engine.load("demo", device="cpu")
    request = loaded.request("a yellow triangle moving down", seed=11)
    (video,) = loaded.generate([request])
    ours = np.concatenate(list(video.chunks)).astype(float)

    pipe = WanPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=request.prompt,
        negative_prompt="",
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).frames[0]
    error = np.square(ours - theirs * 255).mean()
    # Rounding to 8 bits alone gives 1/12 squared levels, 59 dB; fp32 rounding over the loop adds next to nothing.
    assert 10 * np.log10(255**2 / error) > 50
    assert ours.max() > 150  # and it is not two black videos that agree
