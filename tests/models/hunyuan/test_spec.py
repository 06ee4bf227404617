"""HunyuanVideo's sizes, limits, defaults and cost: of the published checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, CLIPTextModel, LlamaModel, LlavaForConditionalGeneration

from tests.models.hunyuan import tiny_checkpoint
from tests.models.hunyuan.published import TRANSFORMERS, configs
from vidgen import family
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError, ConfigError
from vidgen.models.hunyuan import spec
from vidgen.text import llama_clip
from vidgen.tokens import counter
from vidgen.types import Media, Request

T2V, REPLACE, CONCAT = TRANSFORMERS


def request(name: str = T2V, **changes: Any) -> Request:
    params = spec.read(configs(name))
    values = spec.defaults(params.task, params)
    values["params"] = tuple(sorted(values["params"].items()))
    image = Media("/an/image.png", "") if params.task == "i2v" else None
    own = {"task": params.task, "prompt": "a red cat", "seed": 1, "image": image}
    return Request(**own | values | changes)


def problems(asked: Request, name: str = T2V) -> list[str]:
    return spec.problems(asked, spec.read(configs(name)), {})


def with_param(asked: Request, **changes: Any) -> Request:
    return replace(asked, params=tuple(sorted((dict(asked.params) | changes).items())))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_published_checkpoints_are_read_and_their_defaults_break_no_rule(name: str) -> None:
    params = spec.read(configs(name))
    assert params.transformer.width == 3072 and params.llama.hidden_size == 4096 and params.clip.hidden_size == 768
    assert (params.vision is None) == (name == T2V)
    assert problems(request(name), name) == []
    asked = request(name)
    assert (asked.height, asked.width, asked.num_frames, asked.num_inference_steps) == (720, 1280, 129, 50)
    assert asked.shift == 7.0 and asked.sampler == "euler"
    assert asked.guidance_scale == (1.0 if name == CONCAT else 6.0)
    assert asked.param("true_cfg_scale") == 1.0
    assert asked.param("image_embed_interleave") == {T2V: None, REPLACE: 4, CONCAT: 2}[name]
    assert spec.frames_out(asked) == (125 if name == CONCAT else 129)


def test_only_the_image_beside_the_latents_costs_frames() -> None:
    assert [spec.frames_out(request(name, num_frames=21)) for name in (T2V, REPLACE, CONCAT)] == [21, 21, 17]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_checkpoint_does_its_own_task_alone(name: str) -> None:
    params = spec.read(configs(name))
    other = {"t2v": "i2v", "i2v": "t2v"}[params.task]
    with pytest.raises(ConfigError, match=f"{other!r} is not a task of this checkpoint of hunyuan"):
        spec.defaults(other, params)
    with pytest.raises(ConfigError, match="allowed: t2v, i2v"):
        spec.defaults("v2v", params)
    assert any(other in problem for problem in problems(request(name, task=other), name))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (T2V, {"height": 728}, "height is 728; allowed: positive multiples of 16"),
        (T2V, {"width": 24}, "width is 24; allowed: positive multiples of 16"),
        (T2V, {"num_frames": 128}, r"num_frames is 128; allowed: 1 \+ k x 4"),
        (CONCAT, {"num_frames": 1}, r"num_frames is 1; allowed: 5 \+ k x 4"),
        (T2V, {"guidance_scale": 0.5}, "guidance_scale is 0.5; allowed: 1"),
        (CONCAT, {"guidance_scale": 6.0}, "guidance_scale is 6.0; this checkpoint has no embedded guidance"),
        (T2V, {"sampler": "unipc"}, "sampler is 'unipc'; allowed: euler"),
        (T2V, {"tiling": (256, 256, 252, 192)}, "allowed: positive multiples of 8, stride at most the tile"),
        (T2V, {"image": Media("/an/image.png", "")}, "image is given; t2v takes none"),
        (REPLACE, {"image": None}, "image is missing; i2v needs one"),
        (REPLACE, {"last_image": Media("/an/image.png", "")}, "last_image is given"),
        (T2V, {"num_inference_steps": 0}, "num_inference_steps is 0"),
        (T2V, {"timesteps": (500.0, 900.0)}, "timesteps"),
    ],
)
def test_a_broken_limit_is_named_with_what_is_allowed(name: str, changes: dict[str, Any], message: str) -> None:
    found = problems(request(name, **changes), name)
    assert any(re.search(message, problem) for problem in found), found


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (T2V, {"true_cfg_scale": 0.5}, "params.true_cfg_scale is 0.5; allowed: 1"),
        (T2V, {"true_cfg_scale": "6"}, "params.true_cfg_scale is '6'; it must be float"),
        (T2V, {"image_embed_interleave": 2}, "params.image_embed_interleave is 2; allowed: None"),
        (REPLACE, {"image_embed_interleave": 2}, "params.image_embed_interleave is 2; allowed: 4"),
        (CONCAT, {"image_embed_interleave": None}, "params.image_embed_interleave is None; allowed: 2"),
        (T2V, {"strength": 0.5}, "params.strength is not a parameter of this family"),
    ],
)
def test_a_wrong_parameter_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    found = problems(with_param(request(name), **changes), name)
    assert any(message in problem for problem in found), found


def test_tiles_are_a_matter_of_the_picture_alone_and_auto_is_on() -> None:
    params = spec.read(configs(T2V))
    for mode in ("auto", "on"):
        assert spec.tiling(mode, request(), params) == (256, 256, 192, 192)
        assert spec.tiling(mode, request(height=256, width=256), params) is None
        assert spec.tiling(mode, request(height=256, width=272), params) == (256, 256, 192, 192)
    assert spec.tiling("off", request(), params) is None
    with pytest.raises(ConfigError, match="'sometimes'"):
        spec.tiling("sometimes", request(), params)


def test_items_share_a_batch_only_if_one_forward_can_serve_them() -> None:
    params = spec.read(configs(T2V))
    key = spec.batch_key(request(), params)
    assert spec.batch_key(replace(request(), prompt="another", seed=9, negative_prompt="no"), params) == key
    for changed in (request(height=704), request(num_frames=125), request(shift=5.0), request(tiling=(64, 64, 32, 32))):
        assert spec.batch_key(changed, params) != key
    assert spec.batch_key(with_param(request(), true_cfg_scale=3.0), params) != key


@pytest.mark.parametrize(
    ("size", "tokens", "teraflop"), [((720, 1280, 129), 118_800, 12_068), ((512, 768, 121), 47_616, 2_340)]
)
def test_a_forward_costs_what_is_known_of_the_published_model(
    size: tuple[int, int, int], tokens: int, teraflop: float
) -> None:
    params = spec.read(configs(T2V))
    asked = request(height=size[0], width=size[1], num_frames=size[2])
    assert spec.tokens(asked, params) == tokens
    # The known numbers are for a prompt of the greatest length.
    assert spec.flops(asked, params) / 50 / 1e12 == pytest.approx(teraflop, rel=0.01)
    guided = with_param(asked, true_cfg_scale=2.0)
    assert spec.flops(guided, params) == pytest.approx(2 * spec.flops(asked, params), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # 12.821 transformer, 0.246 VAE, 7.505 Llama without its head, 0.123 CLIP.
        (T2V, 12.821 + 0.246 + 7.505 + 0.123),
        # The head of Llama, the vision tower and the projector more.
        (REPLACE, 12.821 + 0.246 + 7.505 + 0.123 + 0.526 + 0.304 + 0.021),
        # Without embedded guidance, and with 17 channels more at the beginning.
        (CONCAT, 12.811 + 0.246 + 7.505 + 0.123 + 0.526 + 0.304 + 0.021),
    ],
)
def test_weights_are_those_of_the_published_models(name: str, billions: float) -> None:
    params = spec.read(configs(name))
    assert set(dict(params.dtypes).values()) == {"float16"}
    assert spec.weight_bytes(params) / 2e9 == pytest.approx(billions, abs=0.002)


def test_text_encoders_are_counted_as_transformers_builds_them(tmp_path: Path) -> None:
    plain, pictured = spec.read(configs(T2V)), spec.read(configs(REPLACE))
    llava = spec.llama_weights(pictured.llama) + spec.llava_weights(pictured.llama, pictured.vision)
    counted = (
        (LlamaModel, configs(T2V)["text_encoder"], spec.llama_weights(plain.llama)),
        (LlavaForConditionalGeneration, configs(REPLACE)["text_encoder"], llava),
        (CLIPTextModel, configs(T2V)["text_encoder_2"], spec.clip_weights(plain.clip)),
    )
    for model, config, numbers in counted:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            built = model(AutoConfig.from_pretrained(tmp_path, local_files_only=True))
        assert sum(weight.numel() for weight in built.parameters()) == numbers


def test_dtype_and_recipe_of_vidgen_json_win() -> None:
    own = {"dtype": "float32", "defaults": {"height": 320, "guidance_scale": 3.0}}
    params = spec.read({**configs(T2V), "vidgen": own})
    assert set(dict(params.dtypes).values()) == {"float32"}
    found = spec.defaults("t2v", params)
    assert (found["height"], found["guidance_scale"], found["width"]) == (320, 3.0, 1280)
    with pytest.raises(CheckpointError, match=r"defaults\.hight"):
        spec.read({**configs(T2V), "vidgen": {"defaults": {"hight": 320}}})


@pytest.mark.parametrize(
    ("pipeline", "shown"),
    [
        ("HunyuanSkyreelsImageToVideoPipeline", "SkyReels V1"),
        ("HunyuanVideoFramepackPipeline", "FramePack"),
        ("HunyuanVideo15Pipeline", r"HunyuanVideo 1\.5"),
        ("LTXPipeline", "allowed: 'HunyuanVideoPipeline', 'HunyuanVideoImageToVideoPipeline'"),
    ],
)
def test_relatives_are_refused_by_name(pipeline: str, shown: str) -> None:
    found = configs(T2V)
    found["model_index"]["_class_name"] = pipeline
    with pytest.raises(CheckpointError, match=shown):
        spec.read(found)


@pytest.mark.parametrize(
    ("name", "file", "changes", "shown"),
    [
        (T2V, "model_index", {"transformer": ["diffusers", "HunyuanVideoFramepackTransformer3DModel"]}, "Framepack"),
        (T2V, "model_index", {"text_encoder": ["transformers", "LlavaForConditionalGeneration"]}, "text_encoder is"),
        (REPLACE, "model_index", {"image_processor": None}, "image_processor is missing"),
        (T2V, "transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        (T2V, "transformer", {"patch_size_t": 2}, "patch_size_t is 2; allowed: 1"),
        (T2V, "transformer", {"image_condition_type": "pixel"}, "allowed: None, 'latent_concat', 'token_replace'"),
        (T2V, "transformer", {"image_condition_type": "token_replace"}, "HunyuanVideoPipeline allows: null"),
        (REPLACE, "transformer", {"image_condition_type": None}, "allows: latent_concat, token_replace"),
        (T2V, "transformer", {"in_channels": 32}, "SkyReels V1"),
        (CONCAT, "transformer", {"in_channels": 32}, "make it 33"),
        (T2V, "transformer", {"out_channels": 8}, "out_channels is 8; latent_channels of the VAE is 16"),
        (T2V, "transformer", {"text_embed_dim": 2048}, "hidden_size of text_encoder is 4096"),
        (T2V, "transformer", {"pooled_projection_dim": 1280}, "hidden_size of text_encoder_2 is 768"),
        (T2V, "transformer", {"rope_axes_dim": [16, 56, 54]}, "sum attention_head_dim, 128"),
        (T2V, "transformer", {"rope_axes_dim": [15, 57, 56]}, "three even numbers"),
        (T2V, "transformer", {"num_layers": None}, "num_layers is missing"),
        (T2V, "transformer", {"fancy_new_mode": True}, "fancy_new_mode"),
        (T2V, "vae", {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; allowed: 4"),
        (T2V, "vae", {"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        (T2V, "vae", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
        (T2V, "vae", {"spatial_compression_ratio": 32}, "do not fit block_out_channels"),
        (T2V, "vae", {"norm_num_groups": 48}, "norm_num_groups 48 must divide it"),
        (T2V, "vae", {"down_block_types": ["DownBlock"] * 4}, "down_block_types is"),
        (T2V, "text_encoder", {"model_type": "mistral"}, "model_type is 'mistral'"),
        (T2V, "text_encoder", {"attention_bias": True}, "attention_bias"),
        (T2V, "text_encoder", {"num_hidden_layers": 2}, "num_hidden_layers is 2; the last 2 are not run"),
        (REPLACE, "text_encoder", {"vision_feature_layer": -1}, "vision_feature_layer is -1"),
        (REPLACE, "text_encoder", {"vision_feature_select_strategy": "full"}, "'full'; allowed: 'default'"),
        (REPLACE, "text_encoder", {"image_token_index": None}, "image_token_index is missing"),
        (T2V, "text_encoder_2", {"model_type": "t5"}, "model_type is 't5'"),
        (T2V, "scheduler", {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        (T2V, "scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (T2V, "scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, file: str, changes: dict[str, Any], shown: str) -> None:
    found = copy.deepcopy(configs(name))
    found[file].update(changes)
    with pytest.raises(CheckpointError, match=shown):
        spec.read(found)


def test_a_picture_of_another_size_than_the_prompt_has_room_for_is_refused() -> None:
    found = copy.deepcopy(configs(REPLACE))
    found["text_encoder"]["vision_config"]["image_size"] = 224
    with pytest.raises(CheckpointError, match="make 256 tokens; the prompt has room for 576"):
        spec.read(found)


def test_a_missing_file_is_named() -> None:
    found = configs(T2V)
    del found["text_encoder_2"]
    with pytest.raises(CheckpointError, match=r"text_encoder_2/config\.json is missing"):
        spec.read(found)


@pytest.mark.parametrize(("kind", "words"), [("t2v", 255), ("replace", 251)])
def test_the_text_limit_is_where_a_prompt_begins_to_lose_words(kind: str, words: int, tmp_path: Path) -> None:
    """The longest prompt whose last word still changes the embedding has as many tokens as the limit says."""
    folder = open_checkpoint(str(tiny_checkpoint.build(tmp_path, kind)))
    params = family.spec("hunyuan").read(folder.configs())
    component, limit = spec.text_limit(params)
    count = counter(folder.files(component), folder.read, component)
    template, cut = (
        (llama_clip.TEMPLATE, llama_clip.CUT)
        if kind == "t2v"
        else (llama_clip.PICTURE_TEMPLATE, llama_clip.PICTURE_CUT)
    )
    words_of = tiny_checkpoint.llama_tokenizer()
    for given, fits in ((words, True), (words + 1, False)):
        text = " ".join(["cat"] * given)
        assert (count([text])[0] <= limit) == fits
        assert (len(words_of(template.format(text))["input_ids"]) <= cut + spec.TEXT_TOKENS) == fits
