"""What spec.py reads, refuses, limits and counts, checked against the modules it counts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from tests.models.allegro import published, tiny_checkpoint
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.allegro import spec
from vidgen.models.allegro.params import scheduler_params, transformer_params, vae_params
from vidgen.models.allegro.transformer import AllegroTransformer3DModel as Native
from vidgen.types import Media, Request

pytestmark = pytest.mark.usefixtures("without_gradients")

PARAMS = spec.read(published.configs())
RAW = (("clean_caption", False),)
MEDIA = Media(url="x.png", digest="")


def changed(component: str, **values: Any) -> dict[str, dict[str, Any]]:
    configs = published.configs()
    configs[component] = {**configs.get(component, {}), **values}
    return configs


def request(**values: Any) -> Request:
    base = Request(
        task="t2v",
        prompt="a red circle",
        negative_prompt="",
        seed=7,
        height=720,
        width=1280,
        num_frames=88,
        fps=15.0,
        num_inference_steps=4,
        guidance_scale=7.5,
        sampler="euler_ancestral",
        params=RAW,
    )
    return replace(base, **values)


def test_sizes_are_those_of_the_config_files() -> None:
    assert (PARAMS.transformer.width, PARAMS.transformer.num_layers) == (2304, 32)
    assert (PARAMS.vae.temporal_factor, PARAMS.vae.spatial_factor) == (4, 8)
    assert (PARAMS.vae.tile, PARAMS.vae.stride) == ((24, 320, 320), (16, 200, 240))
    assert (PARAMS.scheduler.sampler, PARAMS.scheduler.timestep_spacing) == ("euler_ancestral", "linspace")
    assert dict(PARAMS.dtypes) == {"transformer": "bfloat16", "vae": "float32", "text_encoder": "float32"}
    assert hash(PARAMS) == hash(spec.read(published.configs()))


def test_every_config_that_diffusers_writes_is_read() -> None:
    with torch.device("meta"):
        transformer, vae = AllegroTransformer3DModel().config, AutoencoderKLAllegro().config
    assert transformer_params(transformer) == PARAMS.transformer
    assert vae_params(vae) == PARAMS.vae
    for cls in (EulerAncestralDiscreteScheduler, EulerDiscreteScheduler):
        read = scheduler_params({**cls().config, "_class_name": cls.__name__})
        assert replace(read, sampler="euler_ancestral") == PARAMS.scheduler


def test_reading_and_counting_import_no_torch() -> None:
    code = "import sys, vidgen.models.allegro.spec; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("component", "option", "value"),
    [
        ("model_index", "transformer", ["diffusers", "AllegroTransformerTI2V3DModel"]),
        ("model_index", "vae", ["diffusers", "AutoencoderKLMochi"]),
        ("transformer", "patch_size_t", 2),
        ("transformer", "activation_fn", "geglu"),
        ("transformer", "attention_bias", False),
        ("transformer", "norm_elementwise_affine", True),
        ("transformer", "norm_type", "layer_norm"),
        ("transformer", "attention_head_dim", 100),
        ("transformer", "cross_attention_dim", 1024),
        ("transformer", "interpolation_scale_t", None),
        ("transformer", "in_channels", 9),
        ("transformer", "out_channels", 8),
        ("transformer", "caption_channels", 1024),
        ("transformer", "num_layers", None),
        ("transformer", "an_option_of_tomorrow", "on"),
        ("vae", "act_fn", "gelu"),
        ("vae", "down_block_types", ["DownBlock3D"] * 4),
        ("vae", "up_block_types", ["AllegroUpBlock3D"] * 3),
        ("vae", "temporal_downsample_blocks", [True]),
        ("vae", "temporal_upsample_blocks", [False, False, True, False]),
        ("vae", "temporal_downsample_blocks", [True, True, True, True]),
        ("vae", "temporal_compression_ratio", 8),
        ("vae", "norm_num_groups", 48),
        ("vae", "sample_size", 120),
        ("vae", "sample_size", 324),
        ("vae", "scaling_factor", None),
        ("vae", "chunk_len", 16),
        ("vae", "tile_overlap", [80, 80]),
        ("vae", "an_option_of_tomorrow", "on"),
        ("scheduler", "_class_name", "DDIMScheduler"),
        ("scheduler", "prediction_type", "sample"),
        ("scheduler", "beta_schedule", "laplace"),
        ("scheduler", "timestep_spacing", "karras"),
        ("scheduler", "trained_betas", [0.1]),
        ("text_encoder", "model_type", "llama"),
        ("vidgen", "defaults", {"heigth": 64}),
        ("vidgen", "dtype", "int3"),
    ],
)
def test_an_option_we_do_not_support_is_refused_by_name(component: str, option: str, value: Any) -> None:
    named = {"transformer": "transformer is AllegroTransformerTI2V3DModel", "defaults": "heigth"}.get(option, option)
    if option.startswith("temporal_") and value == [True] * 4:
        named = "temporal_upsample_blocks"
    with pytest.raises(CheckpointError, match=named):
        spec.read(changed(component, **{option: value}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("final_sigmas_type", "sigma_min"),
    ],
)
def test_a_euler_schedule_we_do_not_sample_with_is_refused_by_name(option: str, value: Any) -> None:
    euler = {"_class_name": "EulerDiscreteScheduler", option: value}
    with pytest.raises(CheckpointError, match=option):
        scheduler_params(euler)
    # What an ancestral scheduler has never heard of, it does not do.
    assert scheduler_params({**euler, "_class_name": "EulerAncestralDiscreteScheduler"}) == PARAMS.scheduler


def test_frames_a_latent_that_do_not_divide_a_tile_are_refused() -> None:
    configs = changed("vae", temporal_downsample_blocks=[True] * 4, temporal_upsample_blocks=[True] * 4)
    with pytest.raises(CheckpointError, match=r"16 frames a latent frame; tiles are 24 frames"):
        spec.read({**configs, "vae": {**configs["vae"], "temporal_compression_ratio": 16}})


@pytest.mark.parametrize("component", ["model_index", "transformer", "vae", "text_encoder", "scheduler"])
def test_a_missing_component_is_named(component: str) -> None:
    configs = published.configs()
    del configs[component]
    with pytest.raises(CheckpointError, match=component):
        spec.read(configs)


def test_tiles_that_the_first_release_named_are_read() -> None:
    named = changed("vae", chunk_len=24, t_over=8, tile_overlap=[120, 80])
    assert spec.read(named) == PARAMS


def test_defaults_are_the_published_recipe_at_the_size_of_the_checkpoint() -> None:
    values = spec.defaults("t2v", PARAMS)
    assert (values["height"], values["width"], values["num_frames"], values["fps"]) == (720, 1280, 88, 15)
    assert (values["num_inference_steps"], values["guidance_scale"], values["negative_prompt"]) == (100, 7.5, "")
    assert (values["sampler"], values["shift"], values["params"]) == ("euler_ancestral", None, {"clean_caption": True})
    low = spec.defaults("t2v", spec.read(published.configs("Allegro-T2V-40x360P")))
    assert (low["height"], low["width"], low["num_frames"]) == (368, 640, 40)
    with pytest.raises(ConfigError, match=r"'i2v'.*t2v"):
        spec.defaults("i2v", PARAMS)


def test_a_checkpoint_brings_its_own_recipe_text_limit_and_dtype() -> None:
    own = {"height": 320, "width": 560, "num_frames": 24, "num_inference_steps": 20, "negative_prompt": "blurred"}
    params = spec.read(changed("vidgen", defaults=own, max_text_tokens=32, dtype="bfloat16"))
    assert spec.defaults("t2v", params) == {**spec.defaults("t2v", PARAMS), **own}
    assert spec.text_limit(params) == ("tokenizer", 32)
    assert spec.text_limit(PARAMS) == ("tokenizer", 512)
    assert set(dict(params.dtypes).values()) == {"bfloat16"}


def test_a_good_request_has_no_problems() -> None:
    assert spec.problems(request(), PARAMS, {}) == []
    assert spec.problems(request(timesteps=(999.0, 700.5, 400.0, 100.0), sampler="euler"), PARAMS, {}) == []
    assert spec.problems(request(height=320, width=560, num_frames=24, tiling=PARAMS.vae.tiling), PARAMS, {}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "i2v"}, "task is 'i2v'; allowed: t2v"),
        ({"image": MEDIA}, "image is given"),
        ({"video": MEDIA}, "video is given"),
        ({"params": (("clean_caption", 1),)}, "params.clean_caption is 1; it must be bool"),
        ({"params": (("strength", 0.5),)}, "params.strength is not a parameter"),
        ({"seed": 2**48}, "seed is 281474976710656"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"num_frames": 87}, "num_frames is 87; allowed: 24, 40, 56, 72, ... (24 + k x 16"),
        ({"num_frames": 8}, "num_frames is 8"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": -8}, "num_frames is -8"),
        ({"height": 368}, "height is 368; allowed: 320, 720, 1120, 1520, ... (320 + k x 200, multiples of 16)"),
        ({"height": 520}, "height is 520; allowed: 320, 720"),
        ({"height": 0}, "height is 0"),
        ({"height": 120}, "height is 120"),
        ({"width": 640}, "width is 640; allowed: 320, 560, 800, 1040, ... (320 + k x 240, multiples of 16)"),
        ({"width": -320}, "width is -320"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; allowed: euler_ancestral, euler"),
        ({"shift": 3.0}, "shift is 3.0; Allegro's schedule has none"),
        ({"sigmas": (1.0, 0.7, 0.4, 0.1)}, "sigmas is given; this family takes timesteps"),
        ({"timesteps": (900.0, 800.0)}, "timesteps has 2 values"),
        ({"timesteps": (1000.0, 700.0, 400.0, 100.0)}, "allowed: at most 999"),
        ({"timesteps": (900.0, 950.0, 400.0, 100.0)}, "strictly falling"),
        (
            {"tiling": (256, 256, 192, 192)},
            "tiling is (256, 256, 192, 192); the autoencoder works by tiles of 24 x 320",
        ),
    ],
)
def test_each_limit_rejects_with_the_value_and_the_allowed_ones(change: dict[str, Any], reason: str) -> None:
    found = spec.problems(request(**change), PARAMS, {})
    assert len(found) == 1 and reason in found[0], found


def test_the_reason_says_what_would_become_of_the_rest() -> None:
    (found,) = spec.problems(request(height=736), PARAMS, {})
    assert "tiles of 24 x 320 x 320 (frames x height x width) every 16 x 200 x 240" in found
    assert found.endswith("what they do not cover stays grey")


def test_allowed_shapes_follow_the_checkpoints_own_tiles_and_patch() -> None:
    heights = [n for n in range(2000) if not spec.problems(request(height=n), PARAMS, {})]
    assert heights == [320, 720, 1120, 1520, 1920], "of 320 + k x 200 those of which the patch divides the latents"
    widths = [n for n in range(1400) if not spec.problems(request(width=n), PARAMS, {})]
    assert widths == [320, 560, 800, 1040, 1280]
    frames = [n for n in range(120) if not spec.problems(request(num_frames=n), PARAMS, {})]
    assert frames == [24, 40, 56, 72, 88, 104]
    tiny = spec.read(changed("vae", sample_size=128))
    assert tiny.vae.tiling == (128, 128, 8, 48)
    heights = [n for n in range(200) if not spec.problems(request(height=n, width=128), tiny, {})]
    assert heights == [128, 144, 160, 176, 192]


def test_all_broken_rules_are_reported_at_once() -> None:
    assert len(spec.problems(request(height=33, num_frames=10, seed=-1, sampler="x"), PARAMS, {})) == 4


def test_cleaning_is_refused_where_it_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(params=(("clean_caption", True),))
    monkeypatch.setitem(sys.modules, "bs4", None)
    (found,) = spec.problems(asked, PARAMS, {})
    assert "beautifulsoup4" in found and "vidgen[allegro]" in found and found.endswith("allowed: false")
    assert spec.problems(request(), PARAMS, {}) == []


def test_tiles_are_always_the_checkpoints() -> None:
    for shape in ({}, {"height": 320, "width": 320, "num_frames": 24}):
        assert [spec.tiling(mode, request(**shape), PARAMS) for mode in ("auto", "on")] == [(320, 320, 200, 240)] * 2
    with pytest.raises(ConfigError, match=r"'off' is not possible, the autoencoder works by tiles.*allowed: auto, on"):
        spec.tiling("off", request(), PARAMS)
    with pytest.raises(ConfigError, match="'yes'"):
        spec.tiling("yes", request(), PARAMS)


def test_items_share_a_batch_when_only_words_seed_and_guidance_strength_differ() -> None:
    key = spec.batch_key(request(), PARAMS)
    same: list[dict[str, Any]] = [{"prompt": "b"}, {"negative_prompt": "b"}, {"seed": 8}, {"guidance_scale": 3.0}]
    assert {spec.batch_key(request(**change), PARAMS) for change in same} == {key}
    other: list[dict[str, Any]] = [
        {"height": 320},
        {"width": 320},
        {"num_frames": 24},
        {"num_inference_steps": 5},
        {"sampler": "euler"},
        {"timesteps": (900.0, 700.0, 400.0, 100.0)},
        {"guidance_scale": 1.0},
    ]
    assert len({spec.batch_key(request(**change), PARAMS) for change in other} | {key}) == len(other) + 1


@pytest.mark.parametrize("change", [{}, {"patch_size": 1}, {"num_layers": 5}], ids=str)
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_flops_are_what_torch_counts_in_a_forward_times_forwards(change: dict[str, Any], scale: float) -> None:
    params = replace(PARAMS, transformer=tiny_transformer(**change))
    asked = request(guidance_scale=scale, height=320, width=320, num_frames=24)
    with torch.device("meta"):
        model = Native(params.transformer)
        text = model.text_context(torch.empty(1, 20, params.transformer.caption_channels))
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 4, 6, 40, 40, device="meta"), torch.empty(1, device="meta"), text)
    forwards = asked.num_inference_steps * (2 if scale > 1 else 1)
    # Looking at the 20 tokens of the prompt is left out.
    assert spec.flops(asked, params) == pytest.approx(counter.get_total_flops() * forwards, rel=0.01)
    assert spec.tokens(asked, params) == 6 * 40 * 40 // params.transformer.patch_size**2


def tiny_transformer(**change: Any) -> spec.TransformerParams:
    return transformer_params({**published.TRANSFORMER, **tiny_checkpoint.TRANSFORMER, **change})


def test_cost_of_the_published_model() -> None:
    asked = request(num_inference_steps=1, guidance_scale=1.0)
    assert spec.tokens(asked, PARAMS) == 79200
    # The reference number counts 2 x parameters x tokens, of which keys and values of the text are few tokens' alone.
    assert spec.flops(asked, PARAMS) / 1e12 == pytest.approx(2239, rel=0.02)


def numbers(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_weight_bytes_equal_the_parameters_of_the_published_model() -> None:
    configs = published.configs()
    with torch.device("meta"):
        transformer = numbers(AllegroTransformer3DModel.from_config(configs["transformer"]))
        vae = numbers(AutoencoderKLAllegro.from_config(configs["vae"]))
        text = numbers(T5EncoderModel(T5Config(**configs["text_encoder"])))
    assert spec.transformer_weights(PARAMS.transformer) == transformer
    assert spec.vae_weights(PARAMS.vae) == vae
    assert spec.weight_bytes(PARAMS) == 2 * transformer + 4 * vae + 4 * text
    # The files on the hub: 5.54 GB and 700 MB.
    assert 2 * transformer / 1e9 == pytest.approx(5.54, abs=0.01) and 4 * vae / 1e6 == pytest.approx(700, abs=1)


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 3, "block_out_channels": [8, 12, 16, 20], "norm_num_groups": 4, "sample_size": 128},
        {
            "temporal_downsample_blocks": [False, True, False, True],
            "temporal_upsample_blocks": [True, False, False, True],
        },
        {"latent_channels": 6, "in_channels": 2, "out_channels": 5},
    ],
    ids=["widths", "times", "channels"],
)
def test_weights_of_every_variant_are_counted(change: dict[str, Any]) -> None:
    config = {**published.VAE, **change}
    with torch.device("meta"):
        assert spec.vae_weights(vae_params(config)) == numbers(AutoencoderKLAllegro.from_config(config))
