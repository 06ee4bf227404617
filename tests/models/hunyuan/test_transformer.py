"""The HunyuanVideo transformer against diffusers' with the same random weights, which pads and masks its text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel as Oracle
from torch import Tensor

from tests.models.hunyuan import published, tiny_checkpoint
from vidgen.models.hunyuan.params import transformer_params
from vidgen.models.hunyuan.transformer import HunyuanVideoTransformer3DModel, TextContext

pytestmark = pytest.mark.usefixtures("without_gradients")

# Sums in another order, and rope angles in float64; observed 1e-6.
STAGE = 1e-4
# Matrix products of a batch of two are blocked differently; observed 1e-6.
BATCH = 1e-5

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t2v": ("t2v", {}),
    "no_guidance": ("t2v", {"guidance_embeds": False}),
    "three_heads": ("t2v", {"num_attention_heads": 3, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6)}),
    "patch_of_one": ("t2v", {"patch_size": 1, "num_layers": 1}),
    "narrow_and_wound_up": ("t2v", {"mlp_ratio": 2.5, "rope_theta": 16.0, "num_refiner_layers": 1}),
    "latent_concat": ("concat", {}),
    "token_replace": ("replace", {}),
}
LENGTHS = (9, 4)
TIMESTEP, GUIDANCE = torch.tensor([988.49, 13.0]), torch.tensor([6000.0, 3500.0])


def pair(name: str) -> tuple[Oracle, HunyuanVideoTransformer3DModel]:
    kind, changes = KINDS[name]
    oracle = tiny_checkpoint.transformer(kind, **changes)
    native = HunyuanVideoTransformer3DModel(transformer_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, native


def latents(native: HunyuanVideoTransformer3DModel, batch: int = 2) -> Tensor:
    return torch.randn(batch, native.params.in_channels, 3, 4, 6, generator=torch.Generator().manual_seed(1))


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [2, 9, 16] with noise where there is padding, its mask, and pooled vectors."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(2, max(LENGTHS), 16, generator=draw), mask.float(), torch.randn(2, 8, generator=draw)


def contexts(native: HunyuanVideoTransformer3DModel) -> list[TextContext]:
    text, _, pooled = prompts()
    return [native.text_context(text[i : i + 1, :length], pooled[i : i + 1]) for i, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", KINDS)
def test_one_forward_equals_diffusers_which_pads_and_masks(name: str) -> None:
    oracle, native = pair(name)
    text, mask, pooled = prompts()
    expected = oracle(latents(native), TIMESTEP, text, mask, pooled, GUIDANCE, return_dict=False)[0]
    velocity = native(latents(native), TIMESTEP, TextContext.join(contexts(native)), GUIDANCE)
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity, expected, rtol=0, atol=STAGE)


@pytest.mark.parametrize("name", ["t2v", "token_replace"])
def test_a_batch_of_two_prompts_of_different_length_equals_two_single_forwards(name: str) -> None:
    _, native = pair(name)
    parts = contexts(native)
    both = native(latents(native), TIMESTEP, TextContext.join(parts), GUIDANCE)
    for i, context in enumerate(parts):
        one = slice(i, i + 1)
        alone = native(latents(native)[one], TIMESTEP[one], context, GUIDANCE[one])
        torch.testing.assert_close(alone[0], both[i], rtol=0, atol=BATCH)


def test_prompts_of_one_length_need_no_mask_and_others_do() -> None:
    _, native = pair("t2v")
    long, short = contexts(native)
    assert TextContext.join([long, long]).mask() is None
    mask = TextContext.join([long, short]).mask()
    assert mask is not None and mask.sum(dim=1).tolist() == list(LENGTHS)


def test_a_forward_reads_what_no_timestep_changes_from_the_context_alone() -> None:
    _, native = pair("t2v")
    text = TextContext.join(contexts(native))
    expected = native(latents(native), TIMESTEP, text, GUIDANCE)
    for name, weight in native.named_parameters():
        if ".text_embedder." in name or ".proj_in." in name:
            weight.fill_(float("nan"))
    assert torch.equal(native(latents(native), TIMESTEP, text, GUIDANCE), expected)


def test_the_given_first_frame_is_told_that_no_noise_is_left_in_it() -> None:
    """Its own part of every modulation is that of timestep 0; another timestep reaches it through the others alone."""
    _, native = pair("token_replace")
    text = TextContext.join(contexts(native))
    modulations = []
    block = native.transformer_blocks[0]
    block.norm1.linear.register_forward_hook(lambda module, args, out: modulations.append(out))
    for timestep in (TIMESTEP, TIMESTEP / 2):
        native(latents(native), timestep, text, GUIDANCE)
    still, rows, other_still, other_rows = modulations
    assert torch.equal(still, other_still) and not torch.equal(rows, other_rows)


def test_bfloat16_is_as_close_to_fp32_as_diffusers_is() -> None:
    oracle, native = pair("three_heads")
    text, mask, pooled = prompts()
    exact = native(latents(native), TIMESTEP, TextContext.join(contexts(native)), GUIDANCE)
    oracle, native = oracle.to(torch.bfloat16), native.to(torch.bfloat16)
    half = [x.bfloat16() for x in (text, mask, pooled)]
    theirs = oracle(latents(native).bfloat16(), TIMESTEP, *half, GUIDANCE, return_dict=False)[0].float()
    ours = native(latents(native), TIMESTEP, TextContext.join(contexts(native)), GUIDANCE)
    assert ours.dtype == torch.bfloat16
    # Both round as often, at other places.
    assert (ours.float() - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_timesteps_that_bfloat16_cannot_tell_apart_give_different_velocities() -> None:
    _, native = pair("t2v")
    native = native.to(torch.bfloat16)
    waves = native.time_text_embed.timestep_embedder.wave(torch.tensor([988.49, 987.17]))
    assert not torch.equal(waves[0], waves[1])


def test_what_cannot_be_is_refused() -> None:
    _, native = pair("t2v")
    text = TextContext.join(contexts(native))
    with pytest.raises(ValueError, match="guidance scale"):
        native(latents(native), TIMESTEP, text)
    with pytest.raises(ValueError, match="5 x 6 are not multiples of the patch 2"):
        native(torch.zeros(2, 4, 3, 5, 6), TIMESTEP, text, GUIDANCE)


@pytest.mark.parametrize("name", published.TRANSFORMERS)
def test_full_size_keys_and_shapes_are_diffusers(name: str) -> None:
    config = published.TRANSFORMERS[name]
    with torch.device("meta"):
        oracle = Oracle(**{key: value for key, value in config.items() if not key.startswith("_")})
        native = HunyuanVideoTransformer3DModel(transformer_params(config))
    expected = {key: value.shape for key, value in oracle.state_dict().items()}
    assert {key: value.shape for key, value in native.state_dict().items()} == expected
