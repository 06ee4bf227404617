"""The CogVideoX transformer against diffusers' on tiny random weights, and its keys against the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel as OracleTransformer
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from tests.models.cogvideox.published import CHECKPOINTS
from tests.models.cogvideox.tiny_checkpoint import KINDS, build_transformer
from vidgen.models.cogvideox.params import transformer_params
from vidgen.models.cogvideox.transformer import CogVideoXTransformer3DModel

pytestmark = pytest.mark.usefixtures("without_gradients")

CLOSE = 1e-4
"""fp32 on both sides; text and video tokens are summed in another order."""
TEXT = 226


def both(kind: str, **changes: Any) -> tuple[OracleTransformer, CogVideoXTransformer3DModel]:
    oracle = build_transformer(kind, **changes)
    own = CogVideoXTransformer3DModel(transformer_params(dict(oracle.config)))
    own.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, own


def rope(oracle: OracleTransformer, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As the pipelines prepare it."""
    c = oracle.config
    if not c.use_rotary_positional_embeddings:
        return None
    frames, grid = latents.shape[1], (latents.shape[3] // c.patch_size, latents.shape[4] // c.patch_size)
    base = (c.sample_height // c.patch_size, c.sample_width // c.patch_size)
    if c.patch_size_t is None:
        box = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(c.attention_head_dim, box, grid, frames)
    deep = (frames + c.patch_size_t - 1) // c.patch_size_t
    return get_3d_rotary_pos_embed(c.attention_head_dim, None, grid, deep, grid_type="slice", max_size=base)


def inputs(oracle: OracleTransformer, size: tuple[int, int, int], batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    frames, height, width = size
    latents = torch.randn(batch, frames, oracle.config.in_channels, height, width, generator=generator)
    text = torch.randn(batch, TEXT, oracle.config.text_embed_dim, generator=generator)
    return latents, torch.tensor([999.0, 41.0][:batch]), text


def distance(oracle: OracleTransformer, own: CogVideoXTransformer3DModel, size: tuple[int, int, int]) -> float:
    latents, timestep, text = inputs(oracle, size)
    ofs = None if oracle.config.ofs_embed_dim is None else latents.new_full((1,), 2.0)
    expected = oracle(latents, text, timestep, ofs=ofs, image_rotary_emb=rope(oracle, latents), return_dict=False)[0]
    found = own(latents, timestep, own.text_tokens(text))
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.1
    return float((found - expected).abs().max())


SIZES = {
    "2b": [(3, 4, 6), (3, 8, 12), (1, 8, 12), (2, 4, 6), (5, 10, 4)],
    "5b": [(3, 4, 6), (3, 8, 12), (1, 4, 6), (3, 12, 8), (2, 6, 16), (2, 14, 14)],
    "5b-i2v": [(3, 4, 6)],
    "1.5": [(4, 8, 12), (2, 20, 20), (6, 4, 6)],
    "1.5-i2v": [(4, 8, 12), (2, 12, 8)],
}


@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind, sizes in SIZES.items() for size in sizes])
def test_a_forward_is_the_oracles(kind: str, size: tuple[int, int, int]) -> None:
    assert distance(*both(kind), size) < CLOSE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("2b", {"attention_bias": False}),
        ("5b", {"patch_bias": False}),
        ("2b", {"spatial_interpolation_scale": 1.0, "temporal_interpolation_scale": 2.0}),
        ("2b", {"norm_eps": 1e-2}),
        ("5b", {"attention_head_dim": 32, "num_attention_heads": 1}),
    ],
)
def test_a_switch_of_the_config_does_what_the_oracle_does(kind: str, changes: dict[str, Any]) -> None:
    assert distance(*both(kind, **changes), (3, 8, 12)) < CLOSE
    assert distance(*both(kind, **changes), (2, 6, 4)) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_does_not_depend_on_its_batch(kind: str) -> None:
    oracle, own = both(kind)
    latents, timestep, text = inputs(oracle, SIZES[kind][0])
    together = own(latents, timestep, own.text_tokens(text))
    for b in range(2):
        one = slice(b, b + 1)
        alone = own(latents[one], timestep[one], own.text_tokens(text[one]))
        assert float((together[one] - alone).abs().max()) < CLOSE


def test_timesteps_a_hundredth_apart_differ_in_half_precision() -> None:
    _, own = both("2b")
    own = own.to(torch.bfloat16)
    numbers = torch.tensor([500.25, 500.5, 500.75], dtype=torch.float32)
    assert len(own.time_embedding(numbers).unique(dim=0)) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-i2v"])
def test_half_precision_is_as_near_to_fp32_as_the_oracles(kind: str, dtype: torch.dtype) -> None:
    oracle, own = both(kind)
    latents, timestep, text = inputs(oracle, SIZES[kind][0])
    exact = own(latents, timestep, own.text_tokens(text))
    turned, own, oracle = rope(oracle, latents), own.to(dtype), oracle.to(dtype)
    found = own(latents, timestep, own.text_tokens(text))
    assert found.dtype == dtype
    ofs = None if oracle.config.ofs_embed_dim is None else latents.new_full((1,), 2.0)
    theirs = oracle(latents.to(dtype), text.to(dtype), timestep, ofs=ofs, image_rotary_emb=turned, return_dict=False)[0]
    # The same operations in the same dtype: only the order of sums in attention differs.
    assert float((found - exact).abs().mean()) <= 1.2 * float((theirs - exact).abs().mean())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_keys_and_shapes_are_the_published_checkpoints(name: str) -> None:
    config = {key: value for key, value in CHECKPOINTS[name]["transformer"].items() if not key.startswith("_")}
    small = config | {"num_layers": 2}  # One layer is like another.
    if not small.get("use_learned_positional_embeddings"):
        small |= {"sample_height": 8, "sample_width": 8}  # Else the oracle counts out positions that it does not store.
    with torch.device("meta"):
        oracle, own = OracleTransformer(**small), CogVideoXTransformer3DModel(transformer_params(small))
    expected = {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in own.state_dict().items()} == expected
    with torch.device("meta"):
        whole = CogVideoXTransformer3DModel(transformer_params(config))
    blocks = {key.split(".")[1] for key in whole.state_dict() if key.startswith("transformer_blocks.")}
    assert len(blocks) == config["num_layers"]


def test_latents_that_are_not_whole_patches_or_not_of_the_learned_size_are_refused() -> None:
    _, own = both("1.5")
    with pytest.raises(ValueError, match="multiples of the patch"):
        own(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1), torch.zeros(1, TEXT, 32))
    _, learned = both("5b-i2v")
    with pytest.raises(ValueError, match=r"learned positions are for \(3, 2, 3\)"):
        learned(torch.zeros(1, 3, 8, 8, 8), torch.zeros(1), torch.zeros(1, TEXT, 32))
