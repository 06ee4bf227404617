"""What is read from the config.json files of a Wan checkpoint, and what is refused by its name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from diffusers import WanTransformer3DModel as OracleTransformer

from tests.models.wan.configurations import of_kind, tiny, with_change
from vidgen.errors import CheckpointError
from vidgen.models.wan import spec

PARAMS = spec.read(tiny())


def test_sizes_are_those_of_the_config_files() -> None:
    assert PARAMS.transformer.width == 32
    assert PARAMS.transformer.patch_size == (1, 2, 2)
    assert (PARAMS.vae.temporal_factor, PARAMS.vae.spatial_factor) == (4, 8)
    assert PARAMS.vae.patch_size == 1 and PARAMS.vae.in_channels == 3 and PARAMS.vae.decoder_base_dim == 8
    assert PARAMS.scheduler == spec.scheduler_params(tiny()["scheduler"])
    assert (PARAMS.scheduler.sampler, PARAMS.scheduler.shift, PARAMS.scheduler.solver_order) == ("unipc", 3.0, 2)
    assert hash(PARAMS) == hash(spec.read(tiny()))


def test_every_config_that_diffusers_writes_is_read() -> None:
    with torch.device("meta"):
        transformer, vae = OracleTransformer().config, AutoencoderKLWan().config
    scheduler = {**FlowMatchEulerDiscreteScheduler().config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert spec.transformer_params(dict(transformer)).num_layers == transformer["num_layers"]
    assert spec.vae_params(dict(vae)).z_dim == vae["z_dim"]
    assert spec.scheduler_params(scheduler).sampler == "euler"


def test_reading_and_counting_import_no_torch() -> None:
    code = "import sys, vidgen.models.wan.spec; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("component", "option", "value"),
    [
        ("model_index", "boundary_ratio", 0.875),
        ("model_index", "transformer_2", ["diffusers", "WanTransformer3DModel"]),
        ("model_index", "image_encoder", ["transformers", "CLIPVisionModel"]),
        ("model_index", "image_processor", ["transformers", "CLIPImageProcessor"]),
        ("model_index", "transformer", ["diffusers", "WanVACETransformer3DModel"]),
        ("model_index", "vae", ["diffusers", "AutoencoderKLMochi"]),
        ("transformer", "image_dim", 1280),
        ("transformer", "added_kv_proj_dim", 5120),
        ("transformer", "pos_embed_seq_len", 514),
        ("transformer", "qk_norm", None),
        ("transformer", "qk_norm", "layer_norm"),
        ("transformer", "in_channels", 36),
        ("transformer", "out_channels", 5),
        ("transformer", "text_dim", 25),
        ("transformer", "num_layers", None),
        ("transformer", "attention_head_dim", 15),
        ("transformer", "quantization_config", {"quant_method": "torchao"}),
        ("vae", "base_dim", None),
        ("vae", "temperal_downsample", [True]),
        ("vae", "latents_mean", [0.0] * 3),
        ("vae", "latents_std", [1.0] * 5),
        ("vae", "scale_factor_spatial", 16),
        ("vae", "scale_factor_temporal", 8),
        ("vae", "an_option_of_tomorrow", "on"),
        ("scheduler", "_class_name", "DDIMScheduler"),
        ("scheduler", "prediction_type", "epsilon"),
        ("scheduler", "use_flow_sigmas", False),
        ("scheduler", "predict_x0", False),
        ("scheduler", "use_karras_sigmas", True),
        ("scheduler", "use_exponential_sigmas", True),
        ("scheduler", "use_beta_sigmas", True),
        ("scheduler", "use_dynamic_shifting", True),
        ("scheduler", "thresholding", True),
        ("scheduler", "solver_p", {"_class_name": "DDIMScheduler"}),
        ("scheduler", "solver_order", 4),
        ("scheduler", "solver_type", "heun"),
        ("scheduler", "final_sigmas_type", "last"),
        ("scheduler", "lower_order_final", False),
        ("text_encoder", "model_type", "llama"),
        ("text_encoder", "d_ff", None),
        ("vidgen", "defaults", {"heigth": 64}),
        ("vidgen", "defaults", {"height": "64"}),
        ("vidgen", "dtype", "int3"),
    ],
)
def test_an_option_we_do_not_support_is_refused_by_name(component: str, option: str, value: Any) -> None:
    named = next(iter(value)) if option == "defaults" else option
    with pytest.raises(CheckpointError, match=named):
        spec.read(with_change(component, **{option: value}))


@pytest.mark.parametrize(
    ("kind", "component", "option", "value"),
    [
        ("image", "model_index", "image_encoder", [None, None]),
        ("image", "model_index", "image_processor", [None, None]),
        ("image", "image_encoder", "model_type", "siglip_vision_model"),
        ("image", "image_encoder", "hidden_size", 24),
        ("image", "image_encoder", "image_size", None),
        ("image", "transformer", "added_kv_proj_dim", None),
        ("image", "transformer", "added_kv_proj_dim", 20),
        ("image", "transformer", "in_channels", 4),
        ("image", "transformer", "in_channels", 9),
        ("image", "model_index", "expand_timesteps", True),
        ("first_and_last", "transformer", "pos_embed_seq_len", 11),
        ("experts", "model_index", "boundary_ratio", None),
        ("experts", "model_index", "boundary_ratio", 1.5),
        ("experts", "model_index", "boundary_ratio", True),
        ("experts", "model_index", "transformer_2", [None, None]),
        ("experts", "model_index", "transformer_2", ["diffusers", "WanVACETransformer3DModel"]),
        ("experts", "model_index", "expand_timesteps", True),
        ("experts", "transformer_2", "num_layers", 3),
        ("experts", "transformer_2", "qk_norm", None),
        ("image_experts", "transformer_2", "in_channels", 4),
        ("dense", "transformer", "in_channels", 12),
        ("dense", "transformer", "patch_size", [2, 2, 2]),
        ("dense", "vae", "attn_scales", [1.0]),
        ("dense", "vae", "dim_mult", [1, 2, 3, 5]),
    ],
)
def test_an_option_that_contradicts_the_kind_is_refused_by_name(
    kind: str, component: str, option: str, value: Any
) -> None:
    spec.read(of_kind(kind))
    # Of two options that contradict each other, which is wrong cannot be known; either is named.
    named = {"in_channels": "in_channels|image_dim", "expand_timesteps": "expand_timesteps|in_channels"}
    with pytest.raises(CheckpointError, match=named.get(option, option)):
        spec.read(of_kind(kind, component, **{option: value}))


@pytest.mark.parametrize(("kind", "component"), [("experts", "transformer_2"), ("image", "image_encoder")])
def test_a_component_that_the_index_lists_must_be_there(kind: str, component: str) -> None:
    configs = of_kind(kind)
    del configs[component]
    with pytest.raises(CheckpointError, match=component):
        spec.read(configs)


@pytest.mark.parametrize("component", ["model_index", "transformer", "vae", "text_encoder", "scheduler"])
def test_a_missing_component_is_named(component: str) -> None:
    configs = tiny()
    del configs[component]
    with pytest.raises(CheckpointError, match=component):
        spec.read(configs)
