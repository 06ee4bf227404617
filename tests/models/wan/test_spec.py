"""Tasks, defaults, limits and batches of each kind of Wan checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.models.wan.configurations import of_kind, request, tiny, with_change
from vidgen.errors import ConfigError
from vidgen.models.wan import spec
from vidgen.types import Media

PARAMS = spec.read(tiny())


def test_defaults_are_the_published_recipe() -> None:
    values = spec.defaults("t2v", PARAMS)
    assert (values["height"], values["width"], values["num_frames"], values["fps"]) == (480, 832, 81, 16)
    assert (values["num_inference_steps"], values["guidance_scale"]) == (50, 5.0)
    assert values["negative_prompt"].startswith("Bright tones, overexposed")
    assert (values["sampler"], values["shift"], values["params"]) == ("unipc", 3.0, {})
    with pytest.raises(ConfigError, match=r"'i2v' is not a task of this checkpoint of wan; allowed: t2v, v2v"):
        spec.defaults("i2v", PARAMS)
    with pytest.raises(ConfigError, match=r"'s2v' is not a task of wan; allowed: t2v, i2v, v2v"):
        spec.defaults("s2v", PARAMS)


@pytest.mark.parametrize(
    ("kind", "task", "size", "steps", "scales"),
    [
        ("text", "t2v", (480, 832, 81, 16), 50, (5.0, None)),
        ("text", "v2v", (480, 832, 81, 16), 50, (5.0, None)),
        ("image", "i2v", (480, 832, 81, 16), 50, (5.0, None)),
        ("first_and_last", "i2v", (720, 1280, 81, 16), 50, (5.5, None)),
        ("experts", "t2v", (720, 1280, 81, 16), 40, (4.0, 3.0)),
        ("image_experts", "i2v", (480, 832, 81, 16), 40, (3.5, 3.5)),
        ("dense", "t2v", (704, 1280, 121, 24), 50, (5.0, None)),
        ("dense", "i2v", (704, 1280, 121, 24), 50, (5.0, None)),
    ],
)
def test_each_kind_has_the_recipe_of_its_model_card(
    kind: str, task: str, size: tuple[int, ...], steps: int, scales: tuple[float, float | None]
) -> None:
    values = spec.defaults(task, spec.read(of_kind(kind)))
    assert (values["height"], values["width"], values["num_frames"], values["fps"]) == size
    assert values["num_inference_steps"] == steps
    assert (values["guidance_scale"], values["params"].get("guidance_scale_2")) == scales
    assert values["params"].get("strength") == (0.8 if task == "v2v" else None)
    assert ("色调艳丽" in values["negative_prompt"]) == (kind in ("experts", "image_experts", "dense"))
    assert set(values["params"]) <= set(spec.PARAMS)


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        ("text", {"t2v": {}, "v2v": {"video": True}}),
        ("image", {"i2v": {"image": True}}),
        ("first_and_last", {"i2v": {"image": True, "last_image": True}}),
        ("experts", {"t2v": {}}),
        ("image_experts", {"i2v": {"image": True, "last_image": False}}),
        ("dense", {"t2v": {}, "i2v": {"image": True}}),
    ],
)
def test_what_a_checkpoint_can_do_follows_from_its_sizes(kind: str, tasks: dict[str, dict[str, bool]]) -> None:
    assert spec.tasks_of(spec.read(of_kind(kind))) == tasks


def test_a_checkpoint_brings_its_own_recipe_text_limit_and_dtype() -> None:
    own = {"height": 64, "width": 64, "num_frames": 17, "fps": 8, "num_inference_steps": 20, "guidance_scale": 4}
    configs = with_change("vidgen", defaults={**own, "negative_prompt": ""}, max_text_tokens=32, dtype="bfloat16")
    params = spec.read(configs)
    assert spec.defaults("t2v", params) == {**spec.defaults("t2v", PARAMS), **own, "negative_prompt": ""}
    assert spec.text_limit(params) == ("tokenizer", 32)
    assert spec.text_limit(PARAMS) == ("tokenizer", 512)
    assert 2 * spec.weight_bytes(params) == spec.weight_bytes(PARAMS)


def test_sampler_and_shift_default_to_the_checkpoints_scheduler() -> None:
    configs = tiny()
    configs["scheduler"] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    values = spec.defaults("t2v", spec.read(configs))
    assert (values["sampler"], values["shift"]) == ("euler", 5.0)


def test_a_good_request_has_no_problems() -> None:
    assert spec.problems(request(), PARAMS, {}) == []
    explicit = request(sampler="euler", sigmas=(1.0, 0.7, 0.4, 0.1), timesteps=(1000.0, 700.0, 400.0, 100.0))
    assert spec.problems(explicit, PARAMS, {}) == []
    assert spec.problems(request(num_frames=1, guidance_scale=1.0, num_inference_steps=1), PARAMS, {}) == []


MEDIA = Media(url="x.png", digest="")


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("image", {"image": None}, "image is missing; i2v needs one"),
        ("image", {"last_image": MEDIA}, "last_image is given; i2v takes image"),
        ("image", {"task": "t2v", "image": None}, "task is 't2v'; allowed: i2v"),
        ("first_and_last", {"last_image": None}, "last_image is missing; i2v needs one"),
        ("first_and_last", {"num_frames": 1}, "last_image is given and num_frames is 1"),
        ("image_experts", {"params": (("guidance_scale_2", 0.5),)}, "guidance_scale_2 is 0.5; allowed: 1"),
        ("image_experts", {"params": (("guidance_scale_2", "3"),)}, "guidance_scale_2 is '3'; it must be float"),
        ("image", {"params": (("guidance_scale_2", 3.0),)}, "only a checkpoint with transformer_2"),
        ("image", {"params": (("strength", 0.5),)}, "only v2v has a strength"),
        ("dense", {"last_image": MEDIA}, "last_image is given; i2v takes image"),
        ("dense", {"height": 48}, "height is 48; allowed: positive multiples of 32"),
        ("text", {"video": None}, "video is missing; v2v needs one"),
        ("text", {"params": ()}, "params.strength is missing"),
        ("text", {"params": (("strength", 0.0),)}, "strength is 0.0; allowed: more than 0, at most 1"),
        ("text", {"params": (("strength", 1.5),)}, "strength is 1.5"),
        ("text", {"params": (("strength", 0.2),)}, "of 4 steps it leaves none, allowed: at least 0.25"),
        ("text", {"params": (("strength", "a"),)}, "strength is 'a'; it must be float"),
    ],
)
def test_each_kind_rejects_what_it_cannot_do(kind: str, change: dict[str, Any], reason: str) -> None:
    params = spec.read(of_kind(kind))
    task = "v2v" if kind == "text" else "i2v"
    good = {
        "text": {"video": MEDIA, "params": (("strength", 0.5),)},
        "first_and_last": {"image": MEDIA, "last_image": MEDIA},
    }.get(kind, {"image": MEDIA})
    asked = request(task=task, height=64, width=64, **good)
    assert spec.problems(asked, params, {}) == []
    found = spec.problems(replace(asked, **change), params, {})
    assert len(found) == 1 and reason in found[0], found


def test_a_second_scale_and_two_given_frames_are_optional_for_two_experts() -> None:
    params = spec.read(of_kind("image_experts"))
    asked = request(task="i2v", image=MEDIA)
    for change in ({"params": (("guidance_scale_2", 1.0),)}, {"last_image": MEDIA}, {"params": (("strength", None),)}):
        assert spec.problems(replace(asked, **change), params, {}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "i2v"}, "task is 'i2v'; allowed: t2v, v2v"),
        ({"image": MEDIA}, "image is given"),
        ({"last_image": MEDIA}, "last_image is given"),
        ({"video": MEDIA}, "video is given"),
        ({"params": (("cfg_rescale", 0.5),)}, "params.cfg_rescale is not a parameter"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**48}, "seed is 281474976710656"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; allowed: 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_frames": 10}, "num_frames is 10; allowed: 1 + k x 4"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": -3}, "num_frames is -3"),
        ({"num_frames": 257}, "num_frames is 257; allowed: at most 253"),
        ({"height": 40}, "height is 40; allowed: positive multiples of 16"),
        ({"height": 0}, "height is 0"),
        ({"width": 24}, "width is 24; allowed: positive multiples of 16"),
        ({"width": -16}, "width is -16"),
        ({"height": 1040}, "height is 1040; allowed: at most 1024"),
        ({"width": 1040}, "width is 1040; allowed: at most 1024"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; allowed: unipc, euler"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"sigmas": (1.0, 0.5)}, "sigmas has 2 values; num_inference_steps is 4"),
        ({"sigmas": (1.0, 0.5, 0.5, 0.1)}, "sigmas is [1.0, 0.5, 0.5, 0.1]; allowed: strictly falling"),
        ({"sigmas": (1.1, 0.5, 0.4, 0.1)}, "at most 1"),
        ({"sigmas": (1.0, 0.5, 0.4, 0.0)}, "more than 0"),
        ({"sigmas": (1.0, float("nan"), 0.4, 0.1)}, "sigmas is"),
        ({"sampler": "euler", "timesteps": (900.0, 800.0)}, "timesteps has 2 values"),
        ({"sampler": "euler", "timesteps": (1e4, 800.0, 3.0, 2.0)}, "at most 1000"),
        ({"timesteps": (900.0, 800.0, 3.0, 2.0)}, "timesteps is given; sampler 'unipc'"),
        ({"tiling": (256, 256, 200, 190)}, "tiling is (256, 256, 200, 190)"),
        ({"tiling": (64, 64, 72, 64)}, "stride at most the tile"),
    ],
)
def test_each_limit_rejects_with_the_value_and_the_allowed_ones(change: dict[str, Any], reason: str) -> None:
    found = spec.problems(request(**change), PARAMS, {})
    assert len(found) == 1 and reason in found[0], found


def test_all_broken_rules_are_reported_at_once() -> None:
    assert len(spec.problems(request(height=33, num_frames=10, seed=-1, sampler="x"), PARAMS, {})) == 4


def test_frame_counts_follow_the_checkpoints_own_temporal_factor() -> None:
    configs = with_change("vae", temperal_downsample=[False, False, True])
    two = spec.read(configs)
    assert spec.problems(request(num_frames=7), two, {}) == []
    assert spec.problems(request(num_frames=8), two, {}) == ["num_frames is 8; allowed: 1 + k x 2"]
    configs["transformer"]["patch_size"] = [2, 2, 2]
    pairs = spec.read(configs)
    assert [n for n in range(-2, 14) if not spec.problems(request(num_frames=n), pairs, {})] == [3, 7, 11]


def test_tiles_depend_on_the_shape_and_the_mode_alone() -> None:
    small, hd, large = request(height=256, width=256), request(height=720, width=1280), request(height=736, width=1280)
    tiles = (256, 256, 192, 192)
    assert [spec.tiling("auto", r, PARAMS) for r in (small, hd, large)] == [None, None, tiles]
    assert [spec.tiling("on", r, PARAMS) for r in (small, hd, large)] == [None, tiles, tiles]
    assert [spec.tiling("off", r, PARAMS) for r in (small, hd, large)] == [None, None, None]
    with pytest.raises(ConfigError, match="'yes'"):
        spec.tiling("yes", small, PARAMS)


def test_default_tiles_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    assert (
        vae.tile_sample_min_height,
        vae.tile_sample_min_width,
        vae.tile_sample_stride_height,
        vae.tile_sample_stride_width,
    ) == spec.DEFAULT_TILES


def test_items_share_a_batch_when_only_words_seed_and_guidance_strength_differ() -> None:
    key = spec.batch_key(request(), PARAMS)
    same: list[dict[str, Any]] = [{"prompt": "b"}, {"negative_prompt": "b"}, {"seed": 8}, {"guidance_scale": 3.0}]
    assert {spec.batch_key(request(**change), PARAMS) for change in same} == {key}
    other: list[dict[str, Any]] = [
        {"height": 64},
        {"width": 32},
        {"num_frames": 5},
        {"num_inference_steps": 5},
        {"sampler": "euler"},
        {"shift": 5.0},
        {"sigmas": (1.0, 0.7, 0.4, 0.1)},
        {"timesteps": (1000.0, 700.0, 400.0, 100.0)},
        {"guidance_scale": 1.0},
        {"tiling": (16, 16, 8, 8)},
        {"task": "v2v", "params": (("strength", 0.5),)},
        {"task": "v2v", "params": (("strength", 0.75),)},
    ]
    assert len({spec.batch_key(request(**change), PARAMS) for change in other} | {key}) == len(other) + 1
