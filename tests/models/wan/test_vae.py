"""The Wan autoencoder against diffusers with the same random weights, and against its own promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vidgen.models.wan.spec import vae_params
from vidgen.models.wan.vae import WanVAE

# Both sum the same fp32 products in another order; observed 5e-6 on values of order 1.
STAGE = 1e-4
# One frame at a time or all at once: the same products, split over other calls. Observed 0 to 2e-6.
SPLIT = 1e-5

SMALL = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.5, 0.7, 1.0]}
CONFIGS = {
    "wan": {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True], "num_res_blocks": 1},
    "four_by_four": {"dim_mult": [1, 2, 4], "temperal_downsample": [True, True], "num_res_blocks": 1},
    "two_in_time": {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True], "num_res_blocks": 2},
    "still": {"dim_mult": [1, 2, 2], "temperal_downsample": [False, False], "num_res_blocks": 1},
    "patched": {
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
        "num_res_blocks": 1,
        "decoder_base_dim": 12,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
}
CONFIGS |= {
    "residual": {
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
        "num_res_blocks": 1,
        "decoder_base_dim": 12,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
    "residual_without_patches": {
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, False],
        "num_res_blocks": 2,
        "is_residual": True,
    },
}
FULL_SIZE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


def pair(name: str) -> tuple[AutoencoderKLWan, WanVAE]:
    """diffusers' autoencoder with random weights (norm scales and biases too), and ours with the same."""
    torch.manual_seed(0)
    config = {**SMALL, **CONFIGS[name]}
    space = 2 ** (len(config["dim_mult"]) - 1) * config.get("patch_size", 1)
    time = 2 ** sum(config["temperal_downsample"])
    oracle = AutoencoderKLWan(**config, scale_factor_spatial=space, scale_factor_temporal=time).eval()
    with torch.no_grad():
        for weight in oracle.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    native = WanVAE(vae_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle.requires_grad_(False), native.requires_grad_(False)


def video(frames: int = 9, height: int = 32, width: int = 48, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames: int = 3, height: int = 4, width: int = 6, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_equals_diffusers(name: str) -> None:
    oracle, native = pair(name)
    expected = oracle.encode(video()).latent_dist
    mean, logvar = native.encode(video())
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_equals_diffusers(name: str) -> None:
    oracle, native = pair(name)
    frames, _ = native.decode(latents())
    torch.testing.assert_close(frames, oracle.decode(latents()).sample, rtol=0, atol=STAGE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 2])
def test_decoding_chunk_after_chunk_equals_decoding_whole(name: str, chunk: int) -> None:
    _, native = pair(name)
    whole, _ = native.decode(latents(frames=4))
    cache, parts = None, []
    for part in latents(frames=4).split(chunk, dim=2):
        frames, cache = native.decode(part, cache)
        parts.append(frames)
    assert parts[0].shape[2] == 1 + (chunk - 1) * native.params.temporal_factor
    assert parts[-1].shape[2] == chunk * native.params.temporal_factor
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=SPLIT)
    torch.testing.assert_close(
        torch.cat(list(native.decode_chunks(latents(frames=4), chunk=chunk)), dim=2), whole, rtol=0, atol=SPLIT
    )


@pytest.mark.parametrize("name", ["wan", "four_by_four", "two_in_time", "still", "residual_without_patches"])
def test_encoding_chunk_after_chunk_equals_encoding_whole(name: str) -> None:
    _, native = pair(name)
    whole, _ = native.encode_chunk(video())
    cache, parts = None, []
    for part in video().split([1, 4, 4], dim=2):
        moments, cache = native.encode_chunk(part, cache)
        parts.append(moments)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=SPLIT)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tiling", [(32, 16, 24, 8), (16, 32, 16, 24)], ids=["overlap", "rows_without_overlap"])
def test_tiled_decode_equals_diffusers_tiled_decode(name: str, tiling: tuple[int, int, int, int]) -> None:
    oracle, native = pair(name)
    oracle.enable_tiling(*tiling)
    z = latents(height=10, width=9)
    frames = torch.cat(list(native.decode_chunks(z, tiling)), dim=2)
    torch.testing.assert_close(frames, oracle.decode(z).sample, rtol=0, atol=STAGE)
    assert (frames - native.decode(z)[0]).abs().max() > 10 * STAGE, "the tiles did nothing"


@pytest.mark.parametrize("name", CONFIGS)
def test_tiled_encode_equals_diffusers_tiled_encode(name: str) -> None:
    oracle, native = pair(name)
    oracle.enable_tiling(32, 16, 24, 8)
    clip = video(frames=5, height=80, width=48)
    expected = oracle.encode(clip).latent_dist
    mean, logvar = native.encode(clip, (32, 16, 24, 8))
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)
    assert (mean - native.encode(clip)[0]).abs().max() > 10 * STAGE, "the tiles did nothing"


@pytest.mark.parametrize("name", ["patched", "residual"])
def test_a_picture_whose_unshuffled_pixels_fit_one_tile_is_still_encoded_in_tiles(name: str) -> None:
    oracle, native = pair(name)
    oracle.enable_tiling(32, 32, 16, 16)
    clip = video(frames=5, height=32, width=48)  # 16 x 24 unshuffled
    mean, _ = native.encode(clip, (32, 32, 16, 16))
    torch.testing.assert_close(mean, oracle.encode(clip).latent_dist.mean, rtol=0, atol=STAGE)
    assert (mean - native.encode(clip)[0]).abs().max() > 10 * STAGE, "the tiles did nothing"


def test_encoding_takes_any_dtype_and_computes_in_that_of_its_weights() -> None:
    _, native = pair("wan")
    native.decoder.bfloat16()
    mean, _ = native.encode(video().bfloat16())
    assert mean.dtype == torch.float32
    assert torch.equal(mean, native.encode(video().bfloat16().float())[0])


def test_a_picture_that_fits_one_tile_is_decoded_whole() -> None:
    oracle, native = pair("four_by_four")
    oracle.enable_tiling(32, 32, 16, 16)
    z = latents(height=8, width=8)
    frames = torch.cat(list(native.decode_chunks(z, (32, 32, 16, 16))), dim=2)
    torch.testing.assert_close(frames, native.decode(z)[0], rtol=0, atol=SPLIT)
    torch.testing.assert_close(frames, oracle.decode(z).sample, rtol=0, atol=STAGE)


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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_frame_changes_no_earlier_latent(name: str) -> None:
    _, native = pair(name)
    clip = video()
    before, _ = native.encode(clip)
    clip[:, :, 5] = -clip[:, :, 5]
    after, _ = native.encode(clip)
    touched = 1 + 4 // native.params.temporal_factor
    assert torch.equal(before[:, :, :touched], after[:, :, :touched])
    assert not torch.equal(before[:, :, touched], after[:, :, touched])


@pytest.mark.parametrize("name", ["wan", "patched"])
def test_a_batch_of_two_equals_two_single_clips(name: str) -> None:
    _, native = pair(name)
    both, _ = native.decode(latents(batch=2))
    each = [native.decode(one)[0] for one in latents(batch=2).split(1)]
    torch.testing.assert_close(both, torch.cat(each), rtol=0, atol=SPLIT)
    mean, _ = native.encode(video(batch=2))
    each = [native.encode(one)[0] for one in video(batch=2).split(1)]
    torch.testing.assert_close(mean, torch.cat(each), rtol=0, atol=SPLIT)


def test_denormalising_gives_the_bits_that_the_diffusers_pipeline_computes() -> None:
    oracle, native = pair("wan")
    z = latents()
    mean = torch.tensor(oracle.config.latents_mean).view(1, 4, 1, 1, 1)
    inverse = 1.0 / torch.tensor(oracle.config.latents_std).view(1, 4, 1, 1, 1)
    assert torch.equal(native.denormalise(z), z / inverse + mean)
    # Two roundings each way.
    torch.testing.assert_close(native.normalise(native.denormalise(z)), z, rtol=0, atol=1e-6)


def test_every_weight_learns_from_a_whole_clip_under_bfloat16_autocast() -> None:
    _, native = pair("four_by_four")
    native.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, logvar = native.encode(video(frames=9, height=16, width=16))
        frames, _ = native.decode(mean + 0.1 * logvar, clamp=False)
    (frames.float() - video(frames=9, height=16, width=16)).square().mean().backward()
    for name, weight in native.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name


def test_frames_are_clamped_unless_training_asks_otherwise() -> None:
    _, native = pair("wan")
    free, _ = native.decode(latents() * 10, clamp=False)
    clamped, _ = native.decode(latents() * 10)
    assert free.abs().max() > 1
    assert torch.equal(clamped, free.clamp(-1, 1))


@pytest.mark.parametrize(
    "config",
    [
        {**FULL_SIZE, "temperal_downsample": [False, True, True]},
        {**FULL_SIZE, "temperal_downsample": [False, True, True], "attn_scales": [0.5, 0.25], "decoder_base_dim": 32},
        {
            **FULL_SIZE,
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "temperal_downsample": [False, True, True],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ],
    ids=["wan_2_1", "with_attention_scales", "wan_2_2_5b"],
)
def test_keys_and_shapes_of_the_full_size_autoencoder_equal_diffusers(config: dict[str, object]) -> None:
    with torch.device("meta"):
        oracle = AutoencoderKLWan(**config)
        native = WanVAE(vae_params(oracle.config))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}


def test_attention_at_a_scale_of_the_encoder_runs() -> None:
    # diffusers 0.42.1 builds these layers but raises TypeError when it runs them, so there is nothing to compare with.
    torch.manual_seed(0)
    _, native = pair("four_by_four")
    scaled = WanVAE(replace(native.params, attn_scales=(0.5,))).eval()
    with torch.no_grad():
        mean, _ = scaled.encode(video(frames=5, height=16, width=16))
    assert mean.shape == (1, 4, 2, 4, 4) and mean.isfinite().all()
