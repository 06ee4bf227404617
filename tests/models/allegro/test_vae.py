"""The Allegro autoencoder against diffusers with the same random weights, and against its own promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLAllegro
from torch import Tensor

from tests.models.allegro.published import VAE as PUBLISHED
from tests.models.offline import randomise
from vidgen.models.allegro.params import vae_params
from vidgen.models.allegro.spec import covered
from vidgen.models.allegro.vae import AllegroVAE, Tiling

pytestmark = pytest.mark.usefixtures("without_gradients")

# Both sum the same fp32 products; observed 1e-6.
STAGE = 1e-4
# A batch of two is convolved in other blocks, and norms over few channels multiply that; observed 2e-5.
SPLIT = 1e-4

SMALL: dict[str, Any] = {
    "block_out_channels": (4, 4, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "published": {},
    "two_layers": {"layers_per_block": 2, "block_out_channels": (4, 8, 8, 12), "norm_num_groups": 4},
    "other_levels_in_time": {
        "temporal_downsample_blocks": (False, True, False, True),
        "temporal_upsample_blocks": (True, False, False, True),
    },
    "four_by_four": {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("AllegroDownBlock3D",) * 3,
        "up_block_types": ("AllegroUpBlock3D",) * 3,
        "temporal_downsample_blocks": (True, False, False),
        "temporal_upsample_blocks": (False, True, False),
        "temporal_compression_ratio": 2,
    },
}
TILES: Tiling = (32, 32, 16, 24)
"""Far smaller than those that the config can name; both sides are told."""


def pair(name: str, tiles: Tiling = TILES) -> tuple[AutoencoderKLAllegro, AllegroVAE]:
    """diffusers' autoencoder with random weights (norm scales and biases too), and ours with the same."""
    torch.manual_seed(0)
    oracle = randomise(AutoencoderKLAllegro(**{**SMALL, **CONFIGS[name]}), scale=0.05)
    oracle.enable_tiling()
    native = AllegroVAE(vae_params(oracle.config)).eval()
    assert (oracle.kernel, oracle.stride) == (native.params.tile, native.params.stride)
    oracle.kernel, oracle.stride = (24, *tiles[:2]), (16, *tiles[2:])
    native.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, native


def video(frames: int = 24, height: int = 32, width: int = 32, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(native: AllegroVAE, frames: int = 24, height: int = 32, width: int = 32, batch: int = 1) -> Tensor:
    """Of a clip of so many frames and pixels."""
    time, space = native.params.temporal_factor, native.params.spatial_factor
    shape = (batch, 4, frames // time, height // space, width // space)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def decoded(native: AllegroVAE, z: Tensor, tiles: Tiling = TILES) -> Tensor:
    return torch.cat(list(native.decode_chunks(z, tiles)), dim=2)


def theirs(oracle: AutoencoderKLAllegro, z: Tensor) -> Tensor:
    """[B, 3, F, H, W]: the oracle puts frames before channels."""
    return oracle.decode(z).sample.transpose(1, 2)


SHAPES = {"one_tile": (24, 32, 32), "two_in_time": (40, 32, 32), "many": (40, 48, 56)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_equals_diffusers(name: str, shape: str) -> None:
    oracle, native = pair(name)
    z = latents(native, *SHAPES[shape])
    expected = theirs(oracle, z)
    assert expected.shape[2:] == SHAPES[shape] and expected.std() > 0.02
    torch.testing.assert_close(decoded(native, z), expected.clamp(-1, 1), rtol=0, atol=STAGE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_equals_diffusers(name: str, shape: str) -> None:
    oracle, native = pair(name)
    clip = video(*SHAPES[shape])
    expected = oracle.encode(clip).latent_dist
    mean, logvar = native.encode(clip, TILES)
    assert expected.mean.std() > 0.02
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=STAGE)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=STAGE)


def test_tiles_that_overlap_by_more_than_half_equal_diffusers() -> None:
    # The overlaps are fixed in pixels, so a small sample_size has such tiles.
    tiles = (32, 32, 8, 16)
    oracle, native = pair("published", tiles)
    z, clip = latents(native, 40, 56, 48), video(24, 56, 48)
    torch.testing.assert_close(decoded(native, z, tiles), theirs(oracle, z).clamp(-1, 1), rtol=0, atol=STAGE)
    torch.testing.assert_close(native.encode(clip, tiles)[0], oracle.encode(clip).latent_dist.mean, rtol=0, atol=STAGE)


def test_without_tiles_named_they_are_the_checkpoints_own() -> None:
    oracle, native = pair("four_by_four")
    oracle.kernel, oracle.stride = native.params.tile, native.params.stride
    assert native.params.tiling == (128, 128, 8, 48)
    z = latents(native, 24, 128, 128)
    found = torch.cat(list(native.decode_chunks(z)), dim=2)
    torch.testing.assert_close(found, theirs(oracle, z).clamp(-1, 1), rtol=0, atol=STAGE)


class White(torch.nn.Module):
    """A decoder whose every tile is white, so that whatever is not white at the end is not covered."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.ones(len(z), 3, 4 * z.shape[2], 8 * z.shape[3], 8 * z.shape[4])


def test_shapes_that_are_refused_are_exactly_those_that_diffusers_leaves_grey_or_cannot_do() -> None:
    oracle, native = pair("published")
    oracle.decoder = native.decoder = White()
    for axis, (tile, stride) in enumerate(((24, 16), (32, 16), (32, 24))):
        unit = 4 if axis == 0 else 8
        for size in range(tile - unit, tile + 3 * stride + 1, unit):
            shape = [24, 32, 32]
            shape[axis] = size
            z = torch.zeros(1, 4, shape[0] // 4, shape[1] // 8, shape[2] // 8)
            if covered(size, tile, stride):
                torch.testing.assert_close(theirs(oracle, z), torch.ones(1, 3, *shape))
                torch.testing.assert_close(decoded(native, z), torch.ones(1, 3, *shape))
                continue
            if size > tile:
                frames = theirs(oracle, z)
                assert float(frames.flatten()[-1]) == 0 and float(frames.flatten()[0]) == 1, "the end is grey"
            with pytest.raises(ValueError, match="not covered by tiles of"):
                decoded(native, z)
    assert [n for n in range(1500) if covered(n, 320, 200)][:6] == [320, 520, 720, 920, 1120, 1320]
    assert [n for n in range(1500) if covered(n, 320, 240)] == [320, 560, 800, 1040, 1280]
    assert [n for n in range(100) if covered(n, 24, 16)] == [24, 40, 56, 72, 88]


def test_a_clip_that_tiles_do_not_cover_is_not_encoded() -> None:
    _, native = pair("published")
    with pytest.raises(ValueError, match=r"\(24, 40, 32\).*not covered by tiles of \(24, 32, 32\)"):
        native.encode(video(24, 40, 32), TILES)


def test_frames_come_as_soon_as_no_later_tile_adds_to_them() -> None:
    _, native = pair("published")
    z = latents(native, 56)
    chunks = list(native.decode_chunks(z, TILES))
    assert [chunk.shape[2] for chunk in chunks] == [16, 16, 24]
    calls: list[int] = []
    native.decoder.register_forward_hook(lambda *_: calls.append(1))
    stream = native.decode_chunks(z, TILES)
    torch.testing.assert_close(next(stream), chunks[0], rtol=0, atol=0)
    assert len(calls) == 1, "the second tile is made when its frames are wanted"
    z[:, :, 7:] += 1  # of the third tile alone, and of the second
    later = list(native.decode_chunks(z, TILES))
    assert torch.equal(later[0][:, :, :16], chunks[0])
    assert not torch.equal(later[1], chunks[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_two_equals_two_single_clips(shape: str) -> None:
    _, native = pair("published")
    z, clip = latents(native, *SHAPES[shape], batch=2), video(*SHAPES[shape], batch=2)
    each = torch.cat([decoded(native, one) for one in z.split(1)])
    torch.testing.assert_close(decoded(native, z), each, rtol=0, atol=SPLIT)
    each = torch.cat([native.encode(one, TILES)[0] for one in clip.split(1)])
    torch.testing.assert_close(native.encode(clip, TILES)[0], each, rtol=0, atol=SPLIT)


def test_frames_are_clamped_and_so_is_the_log_variance() -> None:
    oracle, native = pair("published")
    for vae in (oracle, native):
        vae.decoder.conv_out.bias[0] = 10.0
        vae.quant_conv.bias[4], vae.quant_conv.bias[5] = 50.0, -50.0
    frames = decoded(native, latents(native))
    assert bool((frames[:, 0] == 1).all()) and float(theirs(oracle, latents(native))[:, 0].min()) > 1
    logvar = native.encode(video(), TILES)[1]
    assert bool((logvar[:, 0] == 20).all()) and bool((logvar[:, 1] == -30).all())
    torch.testing.assert_close(logvar, oracle.encode(video()).latent_dist.logvar, rtol=0, atol=STAGE)


def test_keys_and_shapes_of_the_published_autoencoder_equal_diffusers() -> None:
    with torch.device("meta"):
        oracle = AutoencoderKLAllegro.from_config(PUBLISHED)
        native = AllegroVAE(vae_params(PUBLISHED))
    shapes = {key: tuple(value.shape) for key, value in native.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert (oracle.kernel, oracle.stride) == (native.params.tile, native.params.stride)
    assert native.params.tiling == (320, 320, 200, 240)
