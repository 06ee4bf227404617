"""The LTX-Video autoencoder against diffusers with the same random weights, and against its own promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from tests.models.ltx import tiny_checkpoint
from tests.models.ltx.published import VAES
from vidgen.models.ltx.params import vae_params
from vidgen.models.ltx.vae import LTXVAE
from vidgen.sampling.step import Draws

pytestmark = pytest.mark.usefixtures("without_gradients")

# The same fp32 products in another order; observed 2e-6 on values of order 1.
STAGE = 1e-4
# Cut into pieces or whole: the same products, split over other calls. Observed 0 to 2e-6.
SPLIT = 1e-5
TIMESTEP = 0.05


def pair(version: str) -> tuple[AutoencoderKLLTXVideo, LTXVAE]:
    oracle = tiny_checkpoint.vae(version)
    native = LTXVAE(vae_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, native


def video(frames: int = 9, height: int = 64, width: int = 96, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames: int = 3, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(2))


def theirs(oracle: AutoencoderKLLTXVideo, z: Tensor, seed: int = 5) -> Tensor:
    """diffusers injects noise from the global generator, and leaves it to its pipelines to clamp."""
    torch.manual_seed(seed)
    timestep = torch.full((len(z),), TIMESTEP) if oracle.config.timestep_conditioning else None
    return oracle.decode(z, timestep).sample.clamp(-1, 1)


def ours(native: LTXVAE, z: Tensor, tiling: Any = None, seed: int = 5, **options: Any) -> Tensor:
    draws = Draws([seed] * len(z))
    return torch.cat(list(native.decode_chunks(z, tiling, TIMESTEP, draws, **options)), dim=2)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_encode_equals_diffusers(version: str, frames: int) -> None:
    oracle, native = pair(version)
    expected = oracle.encode(video(frames)).latent_dist
    mean, logvar = native.encode(video(frames))
    assert mean.shape == (1, 4, 1 + frames // 8, 2, 3)
    assert expected.mean.std() > 0.05
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)


@pytest.mark.parametrize("version", tiny_checkpoint.VAES)
@pytest.mark.parametrize("frames", [1, 4])
def test_decode_equals_diffusers(version: str, frames: int) -> None:
    oracle, native = pair(version)
    expected = theirs(oracle, latents(frames))
    assert expected.shape[2] == 8 * frames - 7
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(native, latents(frames)), expected, rtol=0, atol=STAGE)


def test_what_a_decoder_is_told_changes_its_frames() -> None:
    _, native = pair("0.9.1")
    whole = ours(native, latents())
    later = torch.cat(list(native.decode_chunks(latents(), None, 0.4, Draws([5]))), dim=2)
    silent = torch.cat(list(native.decode_chunks(latents(), None, TIMESTEP)), dim=2)
    assert (whole - later).abs().max() > 10 * STAGE, "the timestep did nothing"
    assert (whole - silent).abs().max() > 10 * STAGE, "no noise was injected"
    assert (whole - ours(native, latents(), seed=6)).abs().max() > 10 * STAGE


@pytest.mark.parametrize("version", tiny_checkpoint.VAES)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_decoding_in_pieces_equals_decoding_whole(version: str, chunk: int) -> None:
    oracle, native = pair(version)
    expected = theirs(oracle, latents(7))
    torch.testing.assert_close(ours(native, latents(7), chunk=chunk), expected, rtol=0, atol=STAGE)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_a_longer_clip_puts_no_more_frames_into_any_layer_at_once(version: str) -> None:
    _, native = pair(version)
    most: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            most[name] = max(most.get(name, 0), inputs[0].shape[2])

        return hook

    for name, module in native.decoder.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(watch(name))
    found = []
    for frames in (24, 48):
        most.clear()
        ours(native, latents(frames, 1, 1), chunk=2)
        found.append(dict(most))
    assert found[0] == found[1]
    assert found[0]["conv_out.conv"] <= 2 * 8 + 3, "a piece, two frames kept, and one after the end"


@pytest.mark.parametrize("version", tiny_checkpoint.VAES)
@pytest.mark.parametrize("tiling", [(64, 64, 32, 32), (32, 96, 32, 64)], ids=["overlap", "rows_without_overlap"])
def test_tiled_decode_equals_diffusers_tiled_decode(version: str, tiling: tuple[int, int, int, int]) -> None:
    oracle, native = pair(version)
    height, width, down, right = tiling
    oracle.enable_tiling(height, width, None, down, right)
    z = latents(2, 3, 4)
    frames = ours(native, z, tiling)
    torch.testing.assert_close(frames, theirs(oracle, z), rtol=0, atol=STAGE)
    assert (frames - ours(native, z)).abs().max() > 10 * STAGE, "the tiles did nothing"


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
def test_tiled_encode_equals_diffusers_tiled_encode(version: str) -> None:
    oracle, native = pair(version)
    oracle.enable_tiling(64, 64, None, 32, 32)
    clip = video(9, 96, 128)
    expected = oracle.encode(clip).latent_dist
    mean, logvar = native.encode(clip, (64, 64, 32, 32))
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)
    assert (mean - native.encode(clip)[0]).abs().max() > 10 * STAGE, "the tiles did nothing"


def test_a_picture_that_fits_one_tile_is_decoded_whole() -> None:
    _, native = pair("0.9.0")
    assert torch.equal(ours(native, latents(), (64, 96, 32, 32)), ours(native, latents()))


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
def test_a_later_frame_changes_no_earlier_latent(version: str) -> None:
    _, native = pair(version)
    clip = video(17)
    before, _ = native.encode(clip)
    clip[:, :, 9] = -clip[:, :, 9]
    after, _ = native.encode(clip)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_later_latent_frame_changes_earlier_frames_unless_the_decoder_is_causal() -> None:
    for version, causal in (("0.9.0", False), ("0.9.1", False), ("causal", True)):
        _, native = pair(version)
        z = latents(4)
        before = ours(native, z)
        z[:, :, 2] += 1.0
        after = ours(native, z)
        assert torch.equal(before[:, :, :9], after[:, :, :9]) is causal
        assert not torch.equal(before[:, :, 9], after[:, :, 9])


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_a_batch_of_two_equals_two_single_clips(version: str) -> None:
    _, native = pair(version)
    both = ours(native, latents(batch=2))
    each = [ours(native, one) for one in latents(batch=2).split(1)]
    torch.testing.assert_close(both, torch.cat(each), rtol=0, atol=SPLIT)


def test_statistics_are_applied_as_the_diffusers_pipeline_does() -> None:
    oracle, native = pair("0.9.0")
    mean, std = (x.view(1, 4, 1, 1, 1) for x in (oracle.latents_mean, oracle.latents_std))
    assert torch.equal(native.denormalise(latents()), latents() * std / 1.0 + mean)
    assert torch.equal(native.normalise(latents()), (latents() - mean) * 1.0 / std)


@pytest.mark.parametrize("version", VAES)
def test_keys_and_shapes_of_the_published_autoencoders_equal_diffusers(version: str) -> None:
    with torch.device("meta"):
        oracle = AutoencoderKLLTXVideo(**VAES[version])
        native = LTXVAE(vae_params(oracle.config))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert (native.params.spatial_factor, native.params.temporal_factor) == (32, 8)
