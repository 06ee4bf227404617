"""The Wan transformer against diffusers' WanTransformer3DModel with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel as Oracle
from torch import Tensor

from vidgen.models.wan.spec import transformer_params
from vidgen.models.wan.transformer import Context, WanTransformer3DModel

# The same fp32 products and sums; observed 0. The tolerance is that of every stage.
STAGE = 1e-4
# Matrix products of a batch of two are blocked differently; observed 1e-6.
BATCH = 1e-5

SMALL: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "cross_attn_norm": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "one_layer": {"num_layers": 1},
    "three_heads": {"num_attention_heads": 3, "attention_head_dim": 20, "num_layers": 3},
    "no_cross_attention_norm": {"cross_attn_norm": False},
    "patch_of_one": {"patch_size": (1, 1, 1)},
    "patch_in_time": {"patch_size": (2, 2, 2)},
    "coarse_norms": {"eps": 1e-2},
}
IMAGES: dict[str, dict[str, Any]] = {
    "one_image": {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 32},
    "two_images": {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 32, "pos_embed_seq_len": 10},
}
"""Wan 2.1 image-to-video, and first and last frame."""
FULL_SIZE: dict[str, dict[str, Any]] = {
    "2.1 1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "2.1 14B, 2.2 T2V A14B": {},
    "2.1 I2V 14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "2.1 FLF2V 14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
    "2.2 I2V A14B": {"in_channels": 36},
    "2.2 TI2V 5B": {
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
}
"""What the published transformer/config.json files say; the rest is the same in all."""
ALL_SIZES: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}


def pair(name: str) -> tuple[Oracle, WanTransformer3DModel]:
    """diffusers' transformer with random weights (norms and biases too), and ours with the same."""
    torch.manual_seed(0)
    oracle = Oracle(**{**SMALL, **(CONFIGS | IMAGES)[name]}).eval()
    with torch.no_grad():
        for weight in oracle.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    native = WanTransformer3DModel(transformer_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle.requires_grad_(False), native.requires_grad_(False)


def latents(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 4, 6, 8, generator=torch.Generator().manual_seed(1))


def prompt(batch: int = 2) -> Tensor:
    text = torch.randn(batch, 7, 12, generator=torch.Generator().manual_seed(2))
    text[:, 5:] = 0.0  # as the pipeline pads it
    return text


TIMESTEP = torch.tensor([988.49, 13.0])


@pytest.mark.parametrize("name", CONFIGS)
def test_one_forward_equals_diffusers(name: str) -> None:
    oracle, native = pair(name)
    expected = oracle(latents(), TIMESTEP, prompt(), return_dict=False)[0]
    velocity = native(latents(), TIMESTEP, native.text_context(prompt()))
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity, expected, rtol=0, atol=STAGE)


@pytest.mark.parametrize("name", IMAGES)
def test_one_forward_that_looks_at_images_equals_diffusers(name: str) -> None:
    oracle, native = pair(name)
    # The oracle takes what comes before the last 512 tokens for those of the image.
    text = torch.cat([prompt(), torch.zeros(2, 505, 12)], dim=1)
    x = torch.randn(2, 12, 4, 6, 8, generator=torch.Generator().manual_seed(4))
    images = 2 if name == "two_images" else 1
    seen = torch.randn(2 * images, 5, 20, generator=torch.Generator().manual_seed(5))
    expected = oracle(x, TIMESTEP, text, seen, return_dict=False)[0]
    context, shown = native.text_context(text), native.image_context(seen.view(2, -1, 20))
    velocity = native(x, TIMESTEP, context, shown)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=STAGE)
    assert (native(x, TIMESTEP, context) - velocity).abs().max() > 100 * STAGE, "the image must matter"


def test_a_timestep_a_frame_equals_diffusers_with_one_a_token() -> None:
    oracle, native = pair("three_heads")
    times = torch.tensor([[0.0, 988.49, 988.49, 13.0], [0.0, 1.0, 500.0, 999.0]])
    expected = oracle(latents(), times.repeat_interleave(3 * 4, dim=1), prompt(), return_dict=False)[0]
    context = native.text_context(prompt())
    velocity = native(latents(), times, context)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=STAGE)
    same = native(latents(), TIMESTEP[:, None].repeat(1, 4), context)
    torch.testing.assert_close(same, native(latents(), TIMESTEP, context), rtol=0, atol=BATCH)
    with pytest.raises(ValueError, match="3 timesteps a clip; allowed: one, or one for each of 4 frames"):
        native(latents(), times[:, :3], context)


def test_a_batch_of_two_equals_two_single_forwards() -> None:
    _, native = pair("three_heads")
    both = native(latents(), TIMESTEP, native.text_context(prompt()))
    contexts = [native.text_context(text) for text in prompt().split(1)]
    for i, context in enumerate(contexts):
        one = native(latents()[i : i + 1], TIMESTEP[i : i + 1], context)
        torch.testing.assert_close(one[0], both[i], rtol=0, atol=BATCH)
    joined = native(latents(), TIMESTEP, Context.join(contexts))
    torch.testing.assert_close(joined, both, rtol=0, atol=BATCH)


def test_a_forward_reads_the_prompt_from_its_context_alone() -> None:
    _, native = pair("three_heads")
    context = native.text_context(prompt())
    expected = native(latents(), TIMESTEP, context)
    with torch.no_grad():
        for name, weight in native.named_parameters():
            if "text_embedder" in name or "attn2.to_k" in name or "attn2.to_v" in name:
                weight.fill_(float("nan"))
    assert torch.equal(native(latents(), TIMESTEP, context), expected)


def test_bfloat16_is_as_close_to_fp32_as_diffusers_is() -> None:
    oracle, native = pair("three_heads")
    exact = native(latents(), TIMESTEP, native.text_context(prompt()))
    oracle, native = oracle.to(torch.bfloat16), native.to(torch.bfloat16)
    theirs = oracle(latents().bfloat16(), TIMESTEP, prompt().bfloat16(), return_dict=False)[0].float()
    ours = native(latents(), TIMESTEP, native.text_context(prompt()))
    assert ours.dtype == torch.bfloat16
    # Both round differently; a second rounding or a time embedding in bfloat16 would cost more than a tenth.
    assert (ours.float() - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


def test_timesteps_that_bfloat16_cannot_tell_apart_give_different_velocities() -> None:
    _, native = pair("one_layer")
    native = native.to(torch.bfloat16)
    modulations = native.condition_embedder.time(torch.tensor([988.49, 987.17]))[1]
    assert modulations.dtype == torch.float32
    assert not torch.equal(modulations[0], modulations[1])


def test_latents_that_the_patch_does_not_divide_are_refused_with_their_size() -> None:
    _, native = pair("one_layer")
    with pytest.raises(ValueError, match=r"\(4, 5, 8\).*\(1, 2, 2\)"):
        native(torch.zeros(1, 4, 4, 5, 8), TIMESTEP[:1], native.text_context(prompt(1)))


@pytest.mark.parametrize("size", FULL_SIZE)
def test_keys_and_shapes_of_the_full_size_transformer_equal_diffusers(size: str) -> None:
    with torch.device("meta"):
        oracle = Oracle(**{**ALL_SIZES, **FULL_SIZE[size]})
        native = WanTransformer3DModel(transformer_params(oracle.config))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}


def test_parts_kept_in_fp32_are_those_diffusers_keeps() -> None:
    assert {*WanTransformer3DModel.KEEP_FP32, "rope"} == set(Oracle._keep_in_fp32_modules)
