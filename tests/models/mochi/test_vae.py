"""The Mochi autoencoder against diffusers with the same random weights, and against its own promises."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMochi
from torch import Tensor

from tests.models.mochi.published import VAE
from tests.models.offline import randomise
from vidgen.models.mochi import vae as module
from vidgen.models.mochi.params import vae_params
from vidgen.models.mochi.vae import MochiVAE, fourier

# Both sum the same fp32 products in another order; observed 4e-6 on values of order 1.
STAGE = 1e-4
# One frame at a time or all at once: the same products, split over other calls. Observed 0 to 4e-6.
SPLIT = 1e-5

SMALL: dict[str, Any] = {
    "encoder_block_out_channels": (32, 32, 64, 32),
    "decoder_block_out_channels": (32, 32, 32, 64),
    "layers_per_block": (1, 1, 2, 1, 1),
    "scaling_factor": 1.25,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mochi": {},
    "attention_elsewhere": {"add_attention_block": (True, False, True, False, False), "act_fn": "swish"},
    "other_levels": {
        "encoder_block_out_channels": (32, 64),
        "decoder_block_out_channels": (64, 32),
        "layers_per_block": (2, 1, 1),
        "temporal_expansions": (2,),
        "spatial_expansions": (4,),
        "add_attention_block": (False, True, True),
    },
}


@functools.lru_cache
def pair(name: str) -> tuple[AutoencoderKLMochi, MochiVAE]:
    """diffusers' autoencoder with random weights (norms and biases too), and ours with the same."""
    torch.manual_seed(0)
    oracle = randomise(AutoencoderKLMochi(**{**SMALL, **CONFIGS[name]}), scale=0.02)
    native = MochiVAE(vae_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle.requires_grad_(False), native.requires_grad_(False)


@pytest.fixture(autouse=True)
def untiled() -> None:
    for name in CONFIGS:
        pair(name)[0].use_tiling = False


def video(frames: int = 13, height: int = 32, width: int = 16, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames: int = 3, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    return torch.randn(batch, 12, frames, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("frames", [13, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_equals_diffusers(name: str, frames: int) -> None:
    oracle, native = pair(name)
    expected = oracle.encode(video(frames)).latent_dist
    mean, logvar = native.encode(video(frames))
    assert expected.mean.std() > 0.1
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)


@pytest.mark.parametrize("frames", [3, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_equals_diffusers(name: str, frames: int) -> None:
    oracle, native = pair(name)
    expected = oracle.decode(latents(frames)).sample
    found, _ = native.decode(latents(frames))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=STAGE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 2])
def test_decoding_chunk_after_chunk_equals_decoding_whole(name: str, chunk: int) -> None:
    _, native = pair(name)
    whole, _ = native.decode(latents(frames=4))
    parts = list(native.decode_chunks(latents(frames=4), chunk=chunk))
    factor = native.params.temporal_factor
    assert [part.shape[2] for part in parts] == [1 + (chunk - 1) * factor] + [chunk * factor] * (4 // chunk - 1)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=SPLIT)


def test_what_is_kept_between_chunks_does_not_grow() -> None:
    _, native = pair("mochi")
    _, cache = native.decode(latents(frames=1))
    sizes = [past.shape for past in cache]
    _, cache = native.decode(latents(frames=3), cache)
    assert [past.shape for past in cache] == sizes
    assert all(past.untyped_storage().nbytes() == past.nbytes for past in cache)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tiling", [(32, 16, 24, 8), (16, 32, 16, 24)], ids=["overlap", "rows_without_overlap"])
def test_tiled_decode_equals_diffusers_tiled_decode(name: str, tiling: tuple[int, int, int, int]) -> None:
    oracle, native = pair(name)
    oracle.enable_tiling(*tiling)
    z = latents(frames=2, height=6, width=5)
    frames = torch.cat(list(native.decode_chunks(z, tiling)), dim=2)
    torch.testing.assert_close(frames, oracle.decode(z).sample, rtol=0, atol=STAGE)
    assert (frames - native.decode(z)[0]).abs().max() > 10 * STAGE, "the tiles did nothing"


def test_tiled_encode_equals_diffusers_tiled_encode() -> None:
    oracle, native = pair("mochi")
    oracle.enable_tiling(32, 16, 24, 8)
    clip = video(frames=7, height=56, width=40)
    expected = oracle.encode(clip).latent_dist
    mean, logvar = native.encode(clip, (32, 16, 24, 8))
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)
    assert (mean - native.encode(clip)[0]).abs().max() > 10 * STAGE, "the tiles did nothing"


def test_a_picture_that_fits_one_tile_is_decoded_whole() -> None:
    _, native = pair("mochi")
    frames = torch.cat(list(native.decode_chunks(latents(), (16, 24, 8, 8))), dim=2)
    torch.testing.assert_close(frames, native.decode(latents())[0], rtol=0, atol=SPLIT)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_latent_frame_changes_no_earlier_frame(name: str) -> None:
    _, native = pair(name)
    z = latents(frames=4)
    before, _ = native.decode(z)
    z[:, :, 2] += 1.0
    after, _ = native.decode(z)
    first = 1 + native.params.temporal_factor
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


def test_a_later_frame_changes_no_earlier_latent() -> None:
    _, native = pair("mochi")
    clip = video()
    before, _ = native.encode(clip)
    clip[:, :, 7] = -clip[:, :, 7]
    after, _ = native.encode(clip)
    # Attention over more or fewer masked frames may be blocked differently.
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], rtol=0, atol=1e-6)
    assert (before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-3


def test_a_batch_of_two_equals_two_single_clips() -> None:
    _, native = pair("mochi")
    both, _ = native.decode(latents(batch=2))
    torch.testing.assert_close(both, torch.cat([native.decode(one)[0] for one in latents(batch=2).split(1)]))
    mean, _ = native.encode(video(batch=2))
    each = torch.cat([native.encode(one)[0] for one in video(batch=2).split(1)])
    torch.testing.assert_close(mean, each, rtol=0, atol=SPLIT)


def test_pixels_attend_alike_however_many_go_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, native = pair("mochi")
    expected, _ = native.encode(video())
    monkeypatch.setattr(module, "SEQUENCES", 7)
    torch.testing.assert_close(native.encode(video())[0], expected, rtol=0, atol=SPLIT)


def changed(part: str, factor: float) -> tuple[AutoencoderKLMochi, MochiVAE]:
    """Both autoencoders with every weight whose name has `part` multiplied."""
    oracle, native = (copy.deepcopy(vae) for vae in pair("mochi"))
    for vae in (oracle, native):
        for name, weight in vae.named_parameters():
            weight.mul_(factor if part in name else 1.0)
    return oracle, native


def test_queries_too_short_to_have_a_direction_stay_as_short_as_the_oracles() -> None:
    oracle, native = changed("to_q", 1e-7)
    mean, _ = native.encode(video())
    torch.testing.assert_close(mean, oracle.encode(video()).latent_dist.mean, rtol=0, atol=STAGE)
    assert (mean - pair("mochi")[1].encode(video())[0]).abs().max() > 10 * STAGE


def test_log_variances_are_clamped_as_the_oracle_clamps_them() -> None:
    oracle, native = changed("encoder.proj_out", 1e3)
    _, logvar = native.encode(video())
    torch.testing.assert_close(logvar, oracle.encode(video()).latent_dist.logvar, rtol=0, atol=1e3 * STAGE)
    assert (logvar.min(), logvar.max()) == (-30.0, 20.0)


def test_fourier_features_are_the_oracles_bit_for_bit() -> None:
    oracle, _ = pair("mochi")
    assert torch.equal(fourier(video()), oracle.encoder.fourier_features(video()))


def test_denormalising_gives_the_bits_that_the_diffusers_pipeline_computes() -> None:
    oracle, native = pair("mochi")
    z = latents()
    mean = torch.tensor(oracle.config.latents_mean).view(1, 12, 1, 1, 1)
    std = torch.tensor(oracle.config.latents_std).view(1, 12, 1, 1, 1)
    assert torch.equal(native.denormalise(z), z * std / oracle.config.scaling_factor + mean)
    # Three roundings each way.
    torch.testing.assert_close(native.normalise(native.denormalise(z)), z, rtol=0, atol=2e-6)


def test_keys_and_shapes_of_the_published_autoencoder_equal_diffusers() -> None:
    with torch.device("meta"):
        oracle = AutoencoderKLMochi.from_config(VAE)
        native = MochiVAE(vae_params(VAE))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
