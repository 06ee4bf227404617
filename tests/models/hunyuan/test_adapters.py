"""Module names of other people's HunyuanVideo adapters, against diffusers' conversion and our keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from tests.models.hunyuan import tiny_checkpoint
from vidgen import engine
from vidgen.models.hunyuan.adapters import DUAL, OUTSIDE, REFINER, SINGLE, module_name
from vidgen.models.hunyuan.params import transformer_params
from vidgen.models.hunyuan.transformer import HunyuanVideoTransformer3DModel
from vidgen.types import Lora

ROUNDING = 1e-6
"""The product of the low-rank factors, in one order here and in another there."""
BLOCKS = {"double_blocks": DUAL, "single_blocks": SINGLE, "txt_in.individual_token_refiner.blocks": REFINER}
ORIGINALS = [*(f"{blocks}.1.{part}" for blocks, parts in BLOCKS.items() for part in parts), *OUTSIDE]
PREFIXES = ("", "transformer.", "diffusion_model.", "base_model.model.")


def transformer() -> HunyuanVideoTransformer3DModel:
    config = tiny_checkpoint.transformer("t2v").config
    with torch.device("meta"):
        return HunyuanVideoTransformer3DModel(transformer_params(config))


def named(original: str) -> tuple[str, ...]:
    found = module_name(original)
    assert found is not None, original
    return (found,) if isinstance(found, str) else found


@pytest.mark.parametrize("original", ORIGINALS)
def test_every_name_means_modules_that_there_are_however_it_is_written(original: str) -> None:
    keys = transformer().state_dict()
    ours = named(original)
    assert all(f"{name}.weight" in keys for name in ours)
    for prefix in PREFIXES:
        assert named(prefix + original) == ours
    assert named("lora_unet_" + original.replace(".", "_")) == ours
    for name in ours:
        assert named(name) == (name,) == named("lora_unet_" + name.replace(".", "_")) == named(f"transformer.{name}")


def test_what_is_not_hunyuans_or_has_its_rows_in_another_order_has_no_name() -> None:
    for path in ("blocks.0.attn1.to_q", "double_blocks.0.img_attn.v", "final_layer.adaLN_modulation.1", ""):
        assert module_name(path) is None


def test_every_linear_layer_of_ours_is_some_originals_but_the_last_modulation() -> None:
    linear = {key.removesuffix(".weight") for key, value in transformer().state_dict().items() if value.ndim > 1}
    reached = {name for original in ORIGINALS for name in named(original)}
    in_blocks = {name.replace(".1.", ".0.", 1) for name in reached if "blocks.1." in name}
    assert linear - reached - in_blocks == {"norm_out.linear"}


def test_rows_of_fused_matrices_go_where_diffusers_puts_them(tmp_path: Path) -> None:
    """An adapter in the original's names, fused by us at load, against diffusers' conversion of the same tensors.

    Single blocks are left out of the comparison: that conversion takes 3072 for granted as their width.
    """
    folder = tiny_checkpoint.build(tmp_path / "checkpoint")
    plain = weights(str(folder))
    draw = torch.Generator().manual_seed(0)
    adapter: dict[str, Tensor] = {}
    modules = ["double_blocks.0.img_attn_qkv", "double_blocks.1.txt_attn_qkv", "double_blocks.0.img_mlp.fc1"]
    for module in [*modules, "txt_in.individual_token_refiner.blocks.0.self_attn.proj", "vector_in.in_layer"]:
        shapes = [plain[f"{name}.weight"].shape for name in named(module)]
        adapter[f"{module}.lora_A.weight"] = torch.randn(2, shapes[0][1], generator=draw)
        adapter[f"{module}.lora_B.weight"] = torch.randn(sum(shape[0] for shape in shapes), 2, generator=draw)
    place = tmp_path / "adapter.safetensors"
    save_file(adapter, place)
    fused = weights(str(folder), Lora(str(place), 0.5))

    theirs = _convert_hunyuan_video_lora_to_diffusers(
        {key.replace("self_attn.proj", "self_attn_proj"): value for key, value in adapter.items()}
    )
    changed = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in theirs if "lora_A" in key}
    for key, before in plain.items():
        module = key.removesuffix(".weight")
        if module in changed:
            up, down = (theirs[f"transformer.{module}.lora_{part}.weight"] for part in "BA")
            before = before + 0.5 * up @ down
        torch.testing.assert_close(fused[key], before, rtol=0, atol=10 * ROUNDING)
    assert len(changed) == 9


def test_rows_of_a_single_blocks_first_matrix_are_queries_keys_values_and_the_feed_forward(tmp_path: Path) -> None:
    folder = tiny_checkpoint.build(tmp_path / "checkpoint")
    plain = weights(str(folder))
    names = named("single_blocks.0.linear1")
    sizes = [plain[f"{name}.weight"].shape[0] for name in names]
    rows = torch.cat([torch.full((size, 1), float(i + 1)) for i, size in enumerate(sizes)])
    place = tmp_path / "adapter.safetensors"
    save_file(
        {
            "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(1, plain[f"{names[0]}.weight"].shape[1]),
            "lora_unet_single_blocks_0_linear1.lora_up.weight": rows,
        },
        place,
    )
    fused = weights(str(folder), Lora(str(place)))
    for i, name in enumerate(names):
        key = f"single_transformer_blocks.0.{name.split('.0.', 1)[1]}.weight"
        torch.testing.assert_close(fused[key], plain[key] + i + 1, rtol=0, atol=ROUNDING * 10)


def weights(folder: str, *loras: Lora) -> dict[str, Tensor]:
    loaded = engine.load(folder, loras=loras)
    return loaded.backend.pipeline.transformer.state_dict()  # type: ignore[attr-defined]
