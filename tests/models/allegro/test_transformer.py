"""The Allegro transformer against diffusers' AllegroTransformer3DModel with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AllegroPipeline, AutoencoderKLAllegro
from diffusers import AllegroTransformer3DModel as Oracle
from torch import Tensor

from tests.models.allegro.published import TRANSFORMERS
from tests.models.offline import randomise
from vidgen.models.allegro.params import transformer_params
from vidgen.models.allegro.transformer import AllegroTransformer3DModel

pytestmark = pytest.mark.usefixtures("without_gradients")

# The same fp32 products and sums, but for angles in float64 here and in float32 there; observed 2e-6.
STAGE = 1e-4
# Matrix products of a batch of two are blocked differently; observed 1e-6.
BATCH = 1e-5

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 16,
    "sample_height": 6,
    "sample_width": 8,
    "sample_frames": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "published": {},
    "360p": {"interpolation_scale_t": 1.0, "interpolation_scale_h": 1.0, "interpolation_scale_w": 1.0},
    "uneven_scales": {"interpolation_scale_t": 0.7, "interpolation_scale_h": 3.0, "interpolation_scale_w": 1.3},
    "three_heads": {"num_attention_heads": 3, "attention_head_dim": 18, "cross_attention_dim": 54, "num_layers": 3},
    "patch_of_one": {"patch_size": 1},
    "coarse_norms": {"norm_eps": 1e-2},
}
TIMESTEP = torch.tensor([988.49, 13.0])


def pair(name: str) -> tuple[Oracle, AllegroTransformer3DModel]:
    """diffusers' transformer with random weights (biases and tables too), and ours with the same."""
    torch.manual_seed(0)
    oracle = randomise(Oracle(**{**SMALL, **CONFIGS[name]}))
    native = AllegroTransformer3DModel(transformer_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, native


def latents(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 4, 6, 8, generator=torch.Generator().manual_seed(1))


def prompt(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Embeddings of 7 and 5 tokens, and which they are; what stands in the padding is noise, which nothing may see."""
    text = torch.randn(batch, 7, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[1:, 5:] = False
    return text, mask


def theirs(oracle: Oracle, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """As AllegroPipeline calls it, with its positions."""
    vae = AutoencoderKLAllegro(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1)
    pipe = AllegroPipeline(None, None, vae, oracle, None)
    frames, height, width = x.shape[2:]
    rope = pipe._prepare_rotary_positional_embeddings(len(x), 8 * height, 8 * width, frames, torch.device("cpu"))
    return oracle(
        x,
        text.unsqueeze(1),
        timestep,
        encoder_attention_mask=mask.long(),
        image_rotary_emb=rope,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_forward_equals_diffusers(name: str) -> None:
    oracle, native = pair(name)
    text, mask = prompt()
    expected = theirs(oracle, latents(), TIMESTEP, text, mask)
    found = native(latents(), TIMESTEP, native.text_context(text, mask))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=STAGE)


def test_a_shape_that_nobody_trained_on_equals_diffusers_too() -> None:
    oracle, native = pair("published")
    text, mask = prompt(1)
    x = torch.randn(1, 4, 11, 10, 4, generator=torch.Generator().manual_seed(5))
    expected = theirs(oracle, x, TIMESTEP[:1], text, mask)
    torch.testing.assert_close(native(x, TIMESTEP[:1], native.text_context(text)), expected, rtol=0, atol=STAGE)


def test_a_batch_of_prompts_of_different_length_equals_single_forwards_without_a_mask() -> None:
    _, native = pair("three_heads")
    text, mask = prompt()
    both = native(latents(), TIMESTEP, native.text_context(text, mask))
    for i, own in enumerate(mask):
        context = native.text_context(text[i : i + 1, own])
        one = native(latents()[i : i + 1], TIMESTEP[i : i + 1], context)
        torch.testing.assert_close(one[0], both[i], rtol=0, atol=BATCH)


def test_a_forward_reads_the_prompt_from_its_context_alone() -> None:
    _, native = pair("three_heads")
    context = native.text_context(*prompt())
    expected = native(latents(), TIMESTEP, context)
    for name, weight in native.named_parameters():
        if "caption_projection" in name or "attn2.to_k" in name or "attn2.to_v" in name:
            weight.fill_(float("nan"))
    assert torch.equal(native(latents(), TIMESTEP, context), expected)


def test_bfloat16_is_as_close_to_fp32_as_diffusers_is() -> None:
    oracle, native = pair("three_heads")
    text, mask = prompt()
    exact = native(latents(), TIMESTEP, native.text_context(text, mask))
    oracle, native = oracle.to(torch.bfloat16), native.to(torch.bfloat16)
    half = theirs(oracle, latents().bfloat16(), TIMESTEP, text.bfloat16(), mask).float()
    ours = native(latents(), TIMESTEP, native.text_context(text, mask))
    assert ours.dtype == torch.bfloat16
    # Theirs rounds norms, modulation and the timestep's embedding, too.
    assert (ours.float() - exact).abs().mean() < (half - exact).abs().mean()


def test_timesteps_that_bfloat16_cannot_tell_apart_give_different_modulations() -> None:
    _, native = pair("published")
    modulations = native.to(torch.bfloat16).adaln_single(torch.tensor([988.49, 987.17]))[1]
    assert modulations.dtype == torch.float32
    assert not torch.equal(modulations[0], modulations[1])


def test_latents_that_the_patch_does_not_divide_are_refused_with_their_size() -> None:
    _, native = pair("published")
    with pytest.raises(ValueError, match=r"5 x 8 .*the patch, 2"):
        native(torch.zeros(1, 4, 4, 5, 8), TIMESTEP[:1], native.text_context(prompt(1)[0]))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_keys_and_shapes_of_the_published_transformers_equal_diffusers(name: str) -> None:
    config = TRANSFORMERS[name]
    with torch.device("meta"):
        oracle = Oracle.from_config(config)
        native = AllegroTransformer3DModel(transformer_params(config))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
