"""Module names of other people's Wan adapters, against diffusers' own conversion and the keys of our transformer."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from torch import Tensor, nn

from vidgen.models.wan.adapters import IN_BLOCK, OUTSIDE, module_name
from vidgen.models.wan.params import TransformerParams
from vidgen.models.wan.transformer import WanTransformer3DModel

LINEAR_IN_BLOCK = [
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"),
]
LINEAR_OUTSIDE = [
    *(f"{name}.{n}" for name in ("text_embedding", "time_embedding") for n in (0, 2)),
    *("time_projection.1", "head.head", "img_emb.proj.1", "img_emb.proj.3"),
]
ORIGINALS = [f"blocks.{i}.{name}" for i in range(2) for name in LINEAR_IN_BLOCK] + LINEAR_OUTSIDE


def transformer() -> WanTransformer3DModel:
    params = TransformerParams(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        eps=1e-6,
        rope_max_seq_len=64,
        image_dim=20,
        added_kv_proj_dim=24,
        pos_embed_seq_len=10,
    )
    with torch.device("meta"):
        return WanTransformer3DModel(params)


def numbered(modules: list[str], parts: tuple[str, str], alpha: bool = False) -> dict[str, Tensor]:
    """An adapter in which each module's tensors hold a number of their own, so that a mix-up is seen."""
    found: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        for part in parts:
            found[f"{module}.{part}.weight"] = torch.full((2, 2), float(number))
        if alpha:
            found[f"{module}.alpha"] = torch.tensor(2.0)
    return found


def named_by_diffusers(converted: dict[str, Tensor]) -> dict[int, str]:
    ends = ".lora_A.weight"
    return {
        int(value[0, 0]): key.removeprefix("transformer.").removesuffix(ends)
        for key, value in converted.items()
        if key.endswith(ends)
    }


@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_down", "lora_up")], ids=str)
def test_original_names_mean_what_diffusers_makes_of_them(parts: tuple[str, str]) -> None:
    modules = [f"diffusion_model.{name}" for name in ORIGINALS]
    theirs = named_by_diffusers(_convert_non_diffusers_wan_lora_to_diffusers(numbered(modules, parts)))
    assert theirs == {number: module_name(name) for number, name in enumerate(modules)}


def test_kohya_names_mean_what_diffusers_makes_of_them() -> None:
    modules = [f"lora_unet_{name.replace('.', '_')}" for name in ORIGINALS if name.startswith("blocks.")]
    theirs = named_by_diffusers(
        _convert_musubi_wan_lora_to_diffusers(numbered(modules, ("lora_down", "lora_up"), alpha=True))
    )
    assert theirs == {number: module_name(name) for number, name in enumerate(modules)}


@pytest.mark.parametrize("prefix", ["", "transformer.", "transformer_2.", "base_model.model.", "lora_unet_"])
def test_our_own_names_are_themselves_with_any_prefix(prefix: str) -> None:
    for name, module in transformer().named_modules():
        if isinstance(module, nn.Linear):
            written = name.replace(".", "_") if prefix.endswith("unet_") else name
            assert module_name(prefix + written) == name


def test_every_linear_has_an_original_name() -> None:
    reached = {module_name(name) for name in ORIGINALS}
    assert reached == {name for name, module in transformer().named_modules() if isinstance(module, nn.Linear)}
    assert {module_name(f"lora_unet_{name.replace('.', '_')}") for name in ORIGINALS} == reached


def test_full_differences_reach_norms_convolution_and_tables() -> None:
    """What only `.diff` and `.diff_b` change: modules and parameters that are not linear."""
    model = transformer()
    there = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    for name in (*(f"blocks.1.{part}" for part in IN_BLOCK), *OUTSIDE):
        assert module_name(f"diffusion_model.{name}") in there, name
    assert module_name("diffusion_model.blocks.1.norm3") == "blocks.1.norm2"
    assert module_name("diffusion_model.blocks.1.cross_attn.norm_k_img") == "blocks.1.attn2.norm_added_k"
    assert module_name("diffusion_model.head.modulation") == "scale_shift_table"


@pytest.mark.parametrize(
    "foreign",
    [
        "diffusion_model.double_blocks.0.img_attn.proj",
        "diffusion_model.blocks.0.self_attn.x",
        "diffusion_model.blocks.a.self_attn.q",
        "transformer.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q",
        "",
    ],
)
def test_a_name_that_is_not_wans_is_none(foreign: str) -> None:
    assert module_name(foreign) is None
