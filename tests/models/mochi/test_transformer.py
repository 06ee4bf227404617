"""The Mochi transformer against diffusers' MochiTransformer3DModel with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel as Oracle
from torch import Tensor

from tests.models.mochi.published import TRANSFORMER
from tests.models.offline import randomise
from vidgen.models.mochi.params import transformer_params
from vidgen.models.mochi.transformer import MochiTransformer3DModel, TextContext

# The oracle names an autocast that the CPU does not have.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

# The same fp32 products, the sums of rope and pooling in another order; observed 2e-6. The tolerance is that of every
# stage.
STAGE = 1e-4
# Matrix products of a batch of two are blocked differently; observed 1e-6.
BATCH = 1e-5

SMALL: dict[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "pooled_projection_dim": 12,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 10,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "three_layers": {},
    "last_layer_only": {"num_layers": 1},
    "three_heads": {"num_attention_heads": 3, "attention_head_dim": 10, "num_layers": 2},
    "wide_text": {"pooled_projection_dim": 28, "text_embed_dim": 24},
    "patch_of_one": {"patch_size": 1},
    "other_channels_out": {"out_channels": 5},
}
LENGTH = 7
TIMESTEP = torch.tensor([11.51, 987.25])


def pair(name: str) -> tuple[Oracle, MochiTransformer3DModel]:
    """diffusers' transformer with random weights (norms, biases and frequencies too), and ours with the same."""
    torch.manual_seed(0)
    oracle = randomise(Oracle(**{**SMALL, **CONFIGS[name]}))
    native = MochiTransformer3DModel(transformer_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle.requires_grad_(False), native.requires_grad_(False)


def latents(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 3, 6, 8, generator=torch.Generator().manual_seed(1))


def prompts(oracle: Oracle, batch: int = 2) -> Tensor:
    size = (batch, LENGTH, oracle.config.text_embed_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def context(native: MochiTransformer3DModel, text: Tensor, lengths: tuple[int, ...]) -> TextContext:
    """Of each prompt only its own tokens."""
    rows = zip(text.split(1), lengths, strict=True)
    return TextContext.join([native.text_context(row[:, :length]) for row, length in rows])


def theirs(oracle: Oracle, x: Tensor, timestep: Tensor, text: Tensor, lengths: tuple[int, ...]) -> Tensor:
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    return oracle(x, text, timestep, mask, return_dict=False)[0]


@pytest.mark.parametrize("lengths", [(7, 7), (5, 2), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_forward_equals_diffusers_for_prompts_of_every_length(name: str, lengths: tuple[int, int]) -> None:
    oracle, native = pair(name)
    expected = theirs(oracle, latents(), TIMESTEP, prompts(oracle), lengths)
    found = native(latents(), TIMESTEP, context(native, prompts(oracle), lengths))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=STAGE)


@pytest.mark.parametrize("size", [(1, 2, 12), (5, 4, 4)], ids=str)
def test_positions_follow_the_size_of_the_picture_as_diffusers_does(size: tuple[int, int, int]) -> None:
    oracle, native = pair("three_layers")
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(5))
    text = prompts(oracle, 1)
    expected = theirs(oracle, x, TIMESTEP[:1], text, (7,))
    torch.testing.assert_close(native(x, TIMESTEP[:1], context(native, text, (7,))), expected, rtol=0, atol=STAGE)
    still = MochiTransformer3DModel(native.params).eval()
    still.load_state_dict(native.state_dict() | {"pos_frequencies": torch.zeros_like(native.pos_frequencies)})
    with torch.no_grad():
        unplaced = still(x, TIMESTEP[:1], context(native, text, (7,)))
    assert (unplaced - expected).abs().max() > 10 * STAGE, "positions change nothing"


def test_a_batch_of_prompts_of_different_lengths_equals_single_forwards() -> None:
    oracle, native = pair("three_heads")
    text = prompts(oracle)
    both = native(latents(), TIMESTEP, context(native, text, (6, 2)))
    for i, length in enumerate((6, 2)):
        one = native(latents()[i : i + 1], TIMESTEP[i : i + 1], context(native, text[i : i + 1], (length,)))
        torch.testing.assert_close(one[0], both[i], rtol=0, atol=BATCH)


def test_every_token_of_a_prompt_counts_and_its_padding_does_not() -> None:
    oracle, native = pair("three_layers")
    text = prompts(oracle, 1)
    four, five = (native(latents(1), TIMESTEP[:1], context(native, text, (n,))) for n in (4, 5))
    assert (four - five).abs().max() > 10 * STAGE
    made = context(native, text, (4,))
    padded = TextContext(made.pooled, torch.nn.functional.pad(made.caption, (0, 0, 0, 3)), made.lengths)
    torch.testing.assert_close(native(latents(1), TIMESTEP[:1], padded), four, rtol=0, atol=BATCH)


def test_a_forward_reads_the_prompt_from_its_context_alone() -> None:
    oracle, native = pair("three_heads")
    made = context(native, prompts(oracle), (6, 2))
    expected = native(latents(), TIMESTEP, made)
    with torch.no_grad():
        for name, weight in native.named_parameters():
            if "pooler" in name or "caption_proj" in name:
                weight.fill_(float("nan"))
    assert torch.equal(native(latents(), TIMESTEP, made), expected)


def test_bfloat16_is_as_close_to_fp32_as_diffusers_is() -> None:
    oracle, native = pair("three_layers")
    text = prompts(oracle)
    exact = native(latents(), TIMESTEP, context(native, text, (6, 2)))
    oracle, native = oracle.to(torch.bfloat16), native.to(torch.bfloat16)
    reference = theirs(oracle, latents().bfloat16(), TIMESTEP, text.bfloat16(), (6, 2)).float()
    found = native(latents(), TIMESTEP, context(native, text, (6, 2)))
    assert found.dtype == torch.bfloat16
    # Both round differently; a norm or a gate in bfloat16 would cost more than a tenth.
    assert (found.float() - exact).abs().mean() < 1.1 * (reference - exact).abs().mean()


def test_timesteps_that_bfloat16_cannot_tell_apart_give_different_directions() -> None:
    _, native = pair("last_layer_only")
    native = native.to(torch.bfloat16)
    times = native.time_embed.time(torch.tensor([988.49, 987.17]))
    assert not torch.equal(times[0], times[1])


def test_latents_that_the_patch_does_not_divide_are_refused_with_their_size() -> None:
    oracle, native = pair("three_layers")
    with pytest.raises(ValueError, match=r"5 x 8.*patch 2"):
        native(torch.zeros(1, 4, 4, 5, 8), TIMESTEP[:1], context(native, prompts(oracle, 1), (7,)))


def test_keys_and_shapes_of_the_published_transformer_equal_diffusers() -> None:
    with torch.device("meta"):
        oracle = Oracle.from_config(TRANSFORMER)
        native = MochiTransformer3DModel(transformer_params(TRANSFORMER))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}


def test_parts_kept_in_fp32_are_keys_of_the_checkpoint() -> None:
    _, native = pair("three_layers")
    parts = {part for key in native.state_dict() for part in key.split(".")}
    assert set(MochiTransformer3DModel.KEEP_FP32) <= parts
