"""The LTX-Video transformer against diffusers' LTXVideoTransformer3DModel with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel as Oracle
from torch import Tensor

from tests.models.ltx.published import TRANSFORMERS
from tests.models.ltx.tiny_checkpoint import TRANSFORMER
from tests.models.offline import randomise
from vidgen.models.ltx.params import transformer_params
from vidgen.models.ltx.transformer import LTXVideoTransformer3DModel, TextContext

pytestmark = pytest.mark.usefixtures("without_gradients")

# The same fp32 products and sums; observed 1e-6.
STAGE = 1e-4
# Matrix products of a batch of two are blocked differently; observed 1e-6.
BATCH = 1e-5

CONFIGS: dict[str, dict[str, Any]] = {
    "one_layer": {"num_layers": 1},
    "three_heads": {"num_attention_heads": 3, "attention_head_dim": 14, "cross_attention_dim": 42, "num_layers": 3},
    "no_remainder_of_rope": {"attention_head_dim": 24, "cross_attention_dim": 48},
    "coarse_norms": {"norm_eps": 1e-2},
}
GRID = (3, 2, 3)
TOKENS = 18
TIMESTEP = torch.tensor([988.49, 13.0])
LENGTHS = (3, 5)


def pair(name: str) -> tuple[Oracle, LTXVideoTransformer3DModel]:
    """diffusers' transformer with random weights (norms and biases too), and ours with the same."""
    torch.manual_seed(0)
    oracle = randomise(Oracle(**TRANSFORMER | CONFIGS[name]))
    native = LTXVideoTransformer3DModel(transformer_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, native


def latents(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(1))


def prompts() -> Tensor:
    return torch.randn(2, max(LENGTHS), 16, generator=torch.Generator().manual_seed(2))


def contexts(native: LTXVideoTransformer3DModel) -> list[TextContext]:
    return [native.text_context(prompts()[b : b + 1, :length]) for b, length in enumerate(LENGTHS)]


def positions(fps: float = 25.0) -> Tensor:
    """Shares of 20 seconds, 2048 rows and 2048 columns, as the oracle has them for GRID."""
    frames, rows, columns = (torch.arange(size, dtype=torch.float32) for size in GRID)
    axes = torch.meshgrid(frames * (8 / fps) / 20, rows * 32 / 2048, columns * 32 / 2048, indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, 2)


def theirs(oracle: Oracle, x: Tensor, timestep: Tensor, fps: float = 25.0) -> Tensor:
    shown = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    frames, height, width = GRID
    return oracle(
        x,
        prompts()[: len(x)],
        timestep,
        shown[: len(x)],
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / fps, 32, 32),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fps", [25.0, 8.5])
def test_one_forward_equals_diffusers(name: str, fps: float) -> None:
    oracle, native = pair(name)
    expected = theirs(oracle, latents(), TIMESTEP, fps)
    found = native(latents(), TIMESTEP, native.rope(positions(fps)), TextContext.join(contexts(native)))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=STAGE)


def test_the_frame_rate_changes_the_prediction() -> None:
    _, native = pair("one_layer")
    text = TextContext.join(contexts(native))
    slow, fast = (native(latents(), TIMESTEP, native.rope(positions(fps)), text) for fps in (8.0, 25.0))
    assert (slow - fast).abs().max() > 10 * STAGE


def test_tokens_of_a_given_image_are_told_a_timestep_of_zero() -> None:
    oracle, native = pair("three_heads")
    clean = (torch.arange(TOKENS) < 6)[None, :, None]
    each = TIMESTEP[:, None] * (~clean[..., 0])
    text = TextContext.join(contexts(native))
    found = native(latents(), TIMESTEP, native.rope(positions()), text, clean)
    torch.testing.assert_close(found, theirs(oracle, latents(), each), rtol=0, atol=STAGE)
    assert (found - native(latents(), TIMESTEP, native.rope(positions()), text)).abs().max() > 10 * STAGE


def test_a_batch_of_prompts_of_two_lengths_equals_two_single_forwards() -> None:
    _, native = pair("three_heads")
    rope = native.rope(positions())
    both = native(latents(), TIMESTEP, rope, TextContext.join(contexts(native)))
    for b, context in enumerate(contexts(native)):
        one = native(latents()[b : b + 1], TIMESTEP[b : b + 1], rope, context)
        torch.testing.assert_close(one[0], both[b], rtol=0, atol=BATCH)


def test_prompts_of_one_length_need_no_mask() -> None:
    _, native = pair("one_layer")
    one, other = contexts(native)
    assert TextContext.join([other, other]).mask is None
    assert TextContext.join([one]).mask is None
    mask = TextContext.join([one, other]).mask
    assert mask is not None and mask.tolist() == [[True, True, True, False, False], [True] * 5]


def test_a_forward_reads_the_prompt_from_its_context_alone() -> None:
    _, native = pair("three_heads")
    text, rope = TextContext.join(contexts(native)), native.rope(positions())
    expected = native(latents(), TIMESTEP, rope, text)
    for name, weight in native.named_parameters():
        if "caption_projection" in name or "attn2.to_k" in name or "attn2.to_v" in name:
            weight.fill_(float("nan"))
    assert torch.equal(native(latents(), TIMESTEP, rope, text), expected)


def test_bfloat16_is_as_close_to_fp32_as_diffusers_is() -> None:
    oracle, native = pair("three_heads")
    exact = theirs(oracle, latents(), TIMESTEP)
    oracle, native = oracle.to(torch.bfloat16), native.to(torch.bfloat16)
    shown = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    frames, height, width = GRID
    half = oracle(
        latents().bfloat16(),
        prompts().bfloat16(),
        TIMESTEP,
        shown,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0].float()
    found = native(latents(), TIMESTEP, native.rope(positions()), TextContext.join(contexts(native)))
    assert found.dtype == torch.bfloat16
    # Both round at the same places, up to the order within one.
    assert (found.float() - exact).abs().mean() < 1.1 * (half - exact).abs().mean()


@pytest.mark.parametrize("size", TRANSFORMERS)
def test_keys_and_shapes_of_the_published_transformers_equal_diffusers(size: str) -> None:
    with torch.device("meta"):
        oracle = Oracle(**TRANSFORMERS[size])
        native = LTXVideoTransformer3DModel(transformer_params(oracle.config))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}


def test_diffusers_keeps_no_part_of_the_model_in_fp32_and_neither_do_we() -> None:
    assert not Oracle._keep_in_fp32_modules
