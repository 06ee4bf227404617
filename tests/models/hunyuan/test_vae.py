"""The HunyuanVideo autoencoder against diffusers' with the same random weights; both tile in time unasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo as Oracle
from torch import Tensor

from tests.models.hunyuan import published, tiny_checkpoint
from vidgen.models.hunyuan.params import vae_params
from vidgen.models.hunyuan.vae import HunyuanVAE

pytestmark = pytest.mark.usefixtures("without_gradients")

# Attention frame by frame and seams in one product sum in another order; observed 5e-6.
STAGE = 1e-4

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "two_layers": {"layers_per_block": 2, "latent_channels": 3, "norm_num_groups": 2},
    "three_levels": {
        "block_out_channels": (8, 12, 16),
        "spatial_compression_ratio": 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
    },
}
TILES = (32, 32, 16, 24)


def pair(name: str = "tiny") -> tuple[Oracle, HunyuanVAE]:
    oracle = tiny_checkpoint.vae(**CONFIGS[name])
    native = HunyuanVAE(vae_params(oracle.config)).eval()
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, native


def tile(oracle: Oracle) -> None:
    oracle.enable_tiling(TILES[0], TILES[1], None, TILES[2], TILES[3])


def latents(native: HunyuanVAE, frames: int, height: int = 6, width: int = 8) -> Tensor:
    shape = (1, native.params.latent_channels, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(frames))


def clip(frames: int, height: int = 48, width: int = 64) -> Tensor:
    return torch.randn((2, 3, frames, height, width), generator=torch.Generator().manual_seed(frames)).clamp(-1, 1)


def decoded(native: HunyuanVAE, z: Tensor, tiling: Any = None) -> Tensor:
    return torch.cat(list(native.decode_chunks(z, tiling)), dim=2)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("frames", [1, 2, 4, 5, 6, 7, 8])
def test_decoding_equals_diffusers_whatever_is_left_for_the_last_tile_in_time(frames: int, tiled: bool) -> None:
    oracle, native = pair()
    if tiled:
        tile(oracle)
    z = latents(native, frames)
    expected = oracle.decode(z).sample.clamp(-1, 1)
    found = decoded(native, z, TILES if tiled else None)
    assert found.shape == (1, 3, 1 + 4 * (frames - 1), 48, 64) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=STAGE)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("frames", [1, 13, 17, 21, 29])
def test_encoding_equals_diffusers(frames: int, tiled: bool) -> None:
    oracle, native = pair()
    if tiled:
        tile(oracle)
    expected = oracle.encode(clip(frames)).latent_dist
    mean, logvar = native.encode(clip(frames), TILES if tiled else None)
    assert mean.shape[2] == 1 + (frames - 1) // 4 and expected.mean.std() > 0.1
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)


@pytest.mark.parametrize("name", CONFIGS)
def test_other_sizes_equal_diffusers_too(name: str) -> None:
    oracle, native = pair(name)
    z = latents(native, 5, 4, 3)
    ratio = native.params.spatial_compression_ratio
    torch.testing.assert_close(decoded(native, z), oracle.decode(z).sample.clamp(-1, 1), rtol=0, atol=STAGE)
    video = clip(5, 4 * ratio, 3 * ratio)
    torch.testing.assert_close(native.encode(video)[0], oracle.encode(video).latent_dist.mean, rtol=0, atol=STAGE)


def test_a_picture_that_fits_one_tile_is_not_cut() -> None:
    _, native = pair()
    z = latents(native, 2, 4, 4)
    assert torch.equal(decoded(native, z, TILES), decoded(native, z))
    assert not torch.equal(decoded(native, latents(native, 2), TILES), decoded(native, latents(native, 2)))


def test_frames_come_as_their_tile_in_time_is_done_and_no_tile_is_longer_than_17() -> None:
    _, native = pair()
    seen: list[int] = []
    native.decoder.register_forward_hook(lambda module, args, out: seen.append(out.shape[2]))
    chunks = native.decode_chunks(latents(native, 11))
    lengths = []
    for done, chunk in enumerate(chunks, start=1):
        lengths.append(chunk.shape[2])
        assert len(seen) == done
    assert lengths == [13, 12, 12, 4]
    assert max(seen) == 17


def test_a_tile_in_time_depends_on_later_ones_in_nothing() -> None:
    """Within a tile group norms do mix frames; what a tile contributes is fixed once it is decoded."""
    _, native = pair()
    z = latents(native, 9)
    before = decoded(native, z)
    z[:, :, 5:] += 1
    after = decoded(native, z)
    assert torch.equal(before[:, :, :13], after[:, :, :13])
    assert not torch.equal(before[:, :, 13:], after[:, :, 13:])


def test_attention_looks_at_no_later_frame() -> None:
    _, native = pair()
    block = native.decoder.mid_block.attentions[0]
    block.group_norm = torch.nn.Identity()  # which alone looks at all of them
    x = torch.randn((1, 16, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    before = block(x)
    x[:, :, 2] += 1
    after = block(x)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_batch_of_two_clips_equals_two_single_ones() -> None:
    _, native = pair()
    both = native.encode(clip(5))[0]
    alone = torch.cat([native.encode(part)[0] for part in clip(5).split(1)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)  # convolutions of a batch are blocked differently


def test_full_size_keys_and_shapes_are_diffusers() -> None:
    config = {key: value for key, value in published.VAE.items() if not key.startswith("_")}
    with torch.device("meta"):
        oracle, native = Oracle(**config), HunyuanVAE(vae_params(published.VAE))
    expected = {key: value.shape for key, value in oracle.state_dict().items()}
    assert {key: value.shape for key, value in native.state_dict().items()} == expected
