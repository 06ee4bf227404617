"""What spec.py reads, refuses, limits and counts, checked against the modules it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from tests.models.ltx import tiny_checkpoint
from tests.models.ltx.published import TRANSFORMERS, VAES
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.ltx import spec
from vidgen.models.ltx.transformer import LTXVideoTransformer3DModel
from vidgen.types import Media, Request

pytestmark = pytest.mark.usefixtures("without_gradients")

Configs = dict[str, dict[str, Any]]
FILES = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
COMPONENTS = ("model_index", "transformer", "vae", "text_encoder", "scheduler")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    built = {}
    for version, pipeline in (
        ("0.9.0", "LTXPipeline"),
        ("0.9.1", "LTXImageToVideoPipeline"),
        ("0.9.5", "LTXConditionPipeline"),
    ):
        folder = tmp_path_factory.mktemp("ltx")
        built[version] = tiny_checkpoint.build(folder, version=version, pipeline=pipeline)
    return built


def configs(folder: Path) -> Configs:
    return {name: json.loads((folder / FILES.get(name, f"{name}/config.json")).read_text()) for name in COMPONENTS}


def changed(folder: Path, component: str, **values: Any) -> Configs:
    found = configs(folder)
    found[component] = {**found.get(component, {}), **values}
    return found


def request(checkpoint: spec.Params, kind: str = "t2v", /, **changes: Any) -> Request:
    values = (
        {"task": kind}
        | spec.defaults(kind, checkpoint)
        | {"prompt": "a cat", "seed": 3, "height": 64, "width": 96, "num_frames": 17}
    )
    values["params"] = tuple(sorted(values["params"].items()))
    if kind == "i2v":
        values["image"] = Media("file:///a.png", "0" * 64)
    return Request(**values | changes)


def test_it_imports_nothing_but_the_standard_library() -> None:
    code = "import sys, vidgen.models.ltx.spec as s; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_what_a_checkpoint_says_of_itself_is_read(folders: dict[str, Path]) -> None:
    old, mid, new = (spec.read(configs(folders[version])) for version in ("0.9.0", "0.9.1", "0.9.5"))
    assert (old.condition, mid.condition, new.condition) == (False, False, True)
    assert (old.max_tokens, mid.max_tokens, new.max_tokens) == (128, 128, 256)
    assert (old.plain_levels, new.plain_levels) == (False, True)
    assert old.scheduler.use_dynamic_shifting and old.scheduler.shift_terminal == 0.1
    for params in (old, mid, new):
        assert (params.vae.spatial_factor, params.vae.temporal_factor) == (32, 8)


def test_defaults_are_the_published_ones_of_each_kind_of_checkpoint(folders: dict[str, Path]) -> None:
    old, mid, new = (spec.read(configs(folders[version])) for version in ("0.9.0", "0.9.1", "0.9.5"))
    found = spec.defaults("t2v", old)
    assert (found["height"], found["width"], found["num_frames"], found["fps"]) == (512, 704, 161, 24.0)
    assert (found["sampler"], found["shift"], found["sigmas"], found["timesteps"]) == ("euler", None, None, None)
    assert found["params"] == {
        "decode_timestep": 0.0,
        "decode_noise_scale": None,
        "guidance_rescale": 0.0,
    }
    assert spec.defaults("i2v", mid)["params"]["decode_timestep"] == 0.05
    assert spec.defaults("t2v", new)["params"]["image_cond_noise_scale"] == 0.0
    assert spec.defaults("i2v", new)["params"]["image_cond_noise_scale"] == 0.15
    for params in (old, mid, new):
        for task in spec.TASKS:
            own = set(spec.PARAMS) if params.condition else set(spec.PARAMS) - {"image_cond_noise_scale"}
            assert set(spec.defaults(task, params)["params"]) == own
            assert spec.problems(request(params, task), params, {}) == []
    with pytest.raises(ConfigError, match=r"v2v.*t2v, i2v"):
        spec.defaults("v2v", old)


def test_a_recipe_of_the_checkpoint_replaces_the_published_defaults(folders: dict[str, Path]) -> None:
    own = changed(folders["0.9.0"], "vidgen", defaults={"height": 256, "shift": 2.0}, dtype="bfloat16")
    params = spec.read(own)
    assert (spec.defaults("t2v", params)["height"], spec.defaults("t2v", params)["shift"]) == (256, 2.0)
    assert set(dict(params.dtypes).values()) == {"bfloat16"}


def test_files_of_the_first_release_leave_out_what_came_later(folders: dict[str, Path]) -> None:
    late = ("down_block_types", "downsample_type", "upsample_residual", "upsample_factor", "timestep_conditioning")
    found = configs(folders["0.9.0"])
    for name in (*late, "decoder_inject_noise", "spatial_compression_ratio", "temporal_compression_ratio"):
        del found["vae"][name]
    for name in ("time_shift_type", "stochastic_sampling"):
        del found["scheduler"][name]
    assert spec.read(found) == spec.read(configs(folders["0.9.0"]))


@pytest.mark.parametrize(
    ("version", "component", "change", "message"),
    [
        ("0.9.0", "model_index", {"_class_name": "LTX2Pipeline"}, "_class_name.*LTX2Pipeline.*LTXConditionPipeline"),
        ("0.9.0", "model_index", {"vae": ["diffusers", "AutoencoderKLLTX2Video"]}, "vae.*AutoencoderKLLTX2Video"),
        ("0.9.0", "model_index", {"latent_upsampler": ["x", "LTXLatentUpsamplerModel"]}, "latent_upsampler"),
        ("0.9.0", "transformer", {"patch_size": 2}, "transformer/config.json: patch_size is 2; allowed: 1"),
        ("0.9.0", "transformer", {"patch_size_t": 2}, "patch_size_t is 2"),
        ("0.9.0", "transformer", {"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm'"),
        ("0.9.0", "transformer", {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ("0.9.0", "transformer", {"norm_elementwise_affine": True}, "norm_elementwise_affine is True"),
        ("0.9.0", "transformer", {"attention_bias": False}, "attention_bias is False"),
        ("0.9.0", "transformer", {"attention_out_bias": False}, "attention_out_bias is False"),
        ("0.9.0", "transformer", {"cross_attention_dim": 48}, "cross_attention_dim is 48; allowed: 32"),
        ("0.9.0", "transformer", {"in_channels": 8}, "in_channels is 8; the VAE's latent_channels is 4"),
        ("0.9.0", "transformer", {"out_channels": 8}, "out_channels is 8"),
        ("0.9.0", "transformer", {"caption_channels": 8}, "caption_channels is 8; the text encoder's d_model is 16"),
        ("0.9.0", "transformer", {"num_layers": None}, "num_layers is missing"),
        ("0.9.0", "transformer", {"audio_channels": 3}, "audio_channels is 3, which is not known"),
        ("0.9.0", "scheduler", {"invert_sigmas": True}, "invert_sigmas is True"),
        ("0.9.0", "scheduler", {"stochastic_sampling": True}, "stochastic_sampling is True"),
        ("0.9.0", "scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ("0.9.0", "scheduler", {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler.*FlowMatchEuler"),
        ("0.9.5", "scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting is True; allowed: False"),
        ("0.9.5", "scheduler", {"shift": 3.0}, "shift is 3.0; allowed: 1.0"),
        ("0.9.5", "scheduler", {"shift_terminal": 0.1}, "shift_terminal is 0.1"),
        ("0.9.0", "vae", {"patch_size_t": 2}, "patch_size_t is 2"),
        ("0.9.0", "vae", {"scaling_factor": 0.5}, "scaling_factor is 0.5"),
        ("0.9.0", "vae", {"encoder_causal": False}, "encoder_causal is False"),
        ("0.9.0", "vae", {"down_block_types": ["LTX2VideoDownBlock3D"] * 4}, "down_block_types.*LTX2VideoDownBlock3D"),
        ("0.9.0", "vae", {"downsample_type": ["spatial"] * 4}, "downsample_type is 'spatial'; allowed: conv"),
        ("0.9.5", "vae", {"downsample_type": ["conv"] * 4}, "downsample_type is 'conv'; allowed: spatial"),
        ("0.9.0", "vae", {"decoder_layers_per_block": [1]}, "decoder_layers_per_block has 1 entries; it needs 5"),
        ("0.9.0", "vae", {"decoder_inject_noise": [False] * 4}, "decoder_inject_noise has 4 entries; it needs 5"),
        ("0.9.0", "vae", {"timestep_conditioning": True}, "timestep_conditioning with a decoder block of 16 to 12"),
        ("0.9.0", "vae", {"decoder_inject_noise": [True] * 5}, "decoder_inject_noise with a decoder block of 16 to 12"),
        ("0.9.1", "vae", {"upsample_factor": [2, 2, 1]}, "timestep_conditioning with a decoder block of 32 to 8"),
        ("0.9.1", "vae", {"decoder_spatio_temporal_scaling": [False] * 3}, "upsample_factor 2 does not fit"),
        ("0.9.0", "vae", {"spatio_temporal_scaling": [True, True, False, False]}, "spatial factor is 16.*32"),
        ("0.9.5", "vae", {"spatial_compression_ratio": 64}, "spatial_compression_ratio is 64; the layers make it 32"),
        ("0.9.0", "vae", {"dropout": 0.1}, "dropout is 0.1, which is not known"),
        ("0.9.0", "text_encoder", {"model_type": "llama"}, "model_type is 'llama'"),
        ("0.9.0", "vidgen", {"defaults": {"width": "wide"}}, "defaults.width"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    folders: dict[str, Path], version: str, component: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec.read(changed(folders[version], component, **change))


def test_a_missing_file_is_named(folders: dict[str, Path]) -> None:
    for name in COMPONENTS:
        found = configs(folders["0.9.0"])
        del found[name]
        with pytest.raises(CheckpointError, match=FILES.get(name, f"{name}/config.json")):
            spec.read(found)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("t2v", {"task": "v2v"}, "task is 'v2v'; allowed: t2v, i2v"),
        ("t2v", {"image": Media("a", "b")}, "image is given; t2v takes none"),
        ("i2v", {"image": None}, "image is missing; i2v needs one"),
        ("i2v", {"last_image": Media("a", "b")}, "last_image is given; i2v takes image"),
        ("t2v", {"height": 480 + 16}, "height is 496; allowed: positive multiples of 32"),
        ("t2v", {"width": 0}, "width is 0; allowed: positive multiples of 32"),
        ("t2v", {"num_frames": 160}, "num_frames is 160; allowed: 1 + k x 8"),
        ("i2v", {"num_frames": 1}, "num_frames is 1; allowed: 9 + k x 8"),
        ("t2v", {"fps": 0.0}, "fps is 0.0"),
        ("t2v", {"seed": -1}, "seed is -1"),
        ("t2v", {"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ("t2v", {"sampler": "unipc"}, "sampler is 'unipc'; allowed: euler"),
        ("t2v", {"shift": 0.0}, "shift is 0.0; allowed: more than 0"),
        ("t2v", {"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 1000"),
        ("t2v", {"num_inference_steps": 1}, "num_inference_steps is 1; allowed: 2 or more"),
        ("t2v", {"num_inference_steps": 2, "timesteps": (9.0, 3.0)}, "timesteps is given; this family takes sigmas"),
        ("t2v", {"num_inference_steps": 3, "sigmas": (0.9, 0.3)}, "sigmas has 2 values; num_inference_steps is 3"),
        ("t2v", {"tiling": (512, 512, 500, 448)}, "448); allowed: positive multiples of 32"),
        ("t2v", {"params": (("strength", 1.0),)}, "params.strength is not a parameter"),
        ("t2v", {"params": (("guidance_rescale", "much"),)}, "params.guidance_rescale is 'much'; it must be float"),
        ("t2v", {"params": (("guidance_rescale", 1.5),)}, "params.guidance_rescale is 1.5; allowed: 0 to 1"),
        (
            "t2v",
            {"params": (("decode_timestep", 0.05),)},
            "params.decode_timestep is 0.05; allowed: 0, this decoder",
        ),
        ("t2v", {"params": (("decode_noise_scale", -0.1),)}, "params.decode_noise_scale is -0.1; allowed: 0, this"),
        (
            "i2v",
            {"params": (("image_cond_noise_scale", 0.1),)},
            "params.image_cond_noise_scale is 0.1; allowed: 0, but",
        ),
    ],
)
def test_each_limit_rejects_with_its_reason(
    folders: dict[str, Path], task: str, change: dict[str, Any], message: str
) -> None:
    params = spec.read(configs(folders["0.9.0"]))
    found = spec.problems(request(params, task, **change), params, {})
    assert len(found) == 1
    assert message in found[0]


def test_limits_of_a_condition_pipeline_are_its_own(folders: dict[str, Path]) -> None:
    params = spec.read(configs(folders["0.9.5"]))
    times = {"num_inference_steps": 3, "timesteps": (1000.0, 725.0, 0.03)}
    assert spec.problems(request(params, **times), params, {}) == []
    assert spec.problems(request(params, num_inference_steps=1), params, {}) == []
    (found,) = spec.problems(request(params, shift=3.0, **times), params, {})
    assert "shift is 3.0; allowed beside timesteps: null" in found
    for task, value in (("i2v", -0.5), ("t2v", 0.5)):
        (found,) = spec.problems(request(params, task, params=(("image_cond_noise_scale", value),)), params, {})
        assert f"image_cond_noise_scale is {value}; allowed: 0" in found


def test_only_what_may_share_a_batch_has_one_key(folders: dict[str, Path]) -> None:
    params = spec.read(configs(folders["0.9.1"]))
    key = spec.batch_key(request(params), params)
    same = request(params, prompt="other words", seed=9, guidance_scale=7.0, negative_prompt="x")
    assert spec.batch_key(same, params) == key
    for change in ({"fps": 8.0}, {"width": 64}, {"guidance_scale": 1.0}, {"params": (("decode_timestep", 0.1),)}):
        assert spec.batch_key(request(params, **change), params) != key


def test_tiles_depend_on_the_shape_alone(folders: dict[str, Path]) -> None:
    params = spec.read(configs(folders["0.9.0"]))
    small, default = request(params), request(params, height=512, width=704)
    large = request(params, height=1088, width=1920)
    assert [spec.tiling("on", r, params) is None for r in (small, default, large)] == [True, False, False]
    assert [spec.tiling("auto", r, params) is None for r in (small, default, large)] == [True, True, False]
    assert [spec.tiling("off", r, params) for r in (small, default, large)] == [None] * 3
    tiled = replace(large, tiling=spec.tiling("auto", large, params))
    assert spec.problems(tiled, params, {}) == []


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_flops_are_those_of_the_forwards(folders: dict[str, Path], task: str, guidance: float) -> None:
    params = spec.read(configs(folders["0.9.0"]))
    asked = request(params, task, guidance_scale=guidance, num_inference_steps=3)
    n = spec.tokens(asked, params)
    assert n == 3 * 2 * 3
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel(params.transformer)
        text = model.text_context(torch.empty(1, params.max_tokens, 16))
        clean = torch.empty(1, n, 1, dtype=torch.bool) if task == "i2v" else None
        rope = model.rope(torch.empty(n, 3))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, n, 4), torch.empty(1), rope, text, clean)
    forwards = 3 * (2 if guidance > 1 else 1)
    # Both count 2 per multiply-add and nothing elementwise, so nothing but a term left out could differ.
    assert spec.flops(asked, params) == pytest.approx(forwards * counter.get_total_flops(), rel=1e-9)


def test_flops_of_the_2b_model_are_the_known_ones(folders: dict[str, Path]) -> None:
    params = replace(spec.read(configs(folders["0.9.0"])), transformer=_full("2B"))
    asked = request(params, height=512, width=768, num_frames=161, num_inference_steps=1, guidance_scale=1.0)
    assert spec.tokens(asked, params) == 8064
    # 42 TFLOP a forward, with the keys and values of the text that are not made in one.
    assert spec.flops(asked, params) / 1e12 == pytest.approx(42, rel=0.03)


def _full(size: str) -> spec.TransformerParams:
    from diffusers import LTXVideoTransformer3DModel as Oracle

    from vidgen.models.ltx.params import transformer_params

    with torch.device("meta"):
        return transformer_params(Oracle(**TRANSFORMERS[size]).config)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
def test_weight_bytes_are_those_of_the_files(folders: dict[str, Path], version: str) -> None:
    total = 0
    for component in ("transformer", "vae", "text_encoder"):
        for path in (folders[version] / component).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys()) - {"encoder.embed_tokens.weight"}
                total += sum(file.get_tensor(key).nbytes for key in keys)
    assert spec.weight_bytes(spec.read(configs(folders[version]))) == total


@pytest.mark.parametrize(("size", "billions"), [("2B", 1.923), ("13B", 13.04)])
def test_published_transformers_have_the_known_number_of_weights(size: str, billions: float) -> None:
    from diffusers import LTXVideoTransformer3DModel as Oracle

    with torch.device("meta"):
        counted = sum(weight.numel() for weight in Oracle(**TRANSFORMERS[size]).parameters())
    assert spec.transformer_weights(_full(size)) == counted
    assert counted / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("version", VAES)
def test_weights_of_the_published_autoencoders_are_counted_right(version: str) -> None:
    from diffusers import AutoencoderKLLTXVideo

    from vidgen.models.ltx.params import vae_params

    with torch.device("meta"):
        oracle = AutoencoderKLLTXVideo(**VAES[version])
    counted = sum(weight.numel() for weight in oracle.state_dict().values())
    assert spec.vae_weights(vae_params(oracle.config)) == counted


def test_a_prompt_may_have_as_many_tokens_as_the_pipeline_encodes(folders: dict[str, Path]) -> None:
    assert spec.text_limit(spec.read(configs(folders["0.9.0"]))) == ("tokenizer", 128)
    assert spec.text_limit(spec.read(configs(folders["0.9.5"]))) == ("tokenizer", 256)
