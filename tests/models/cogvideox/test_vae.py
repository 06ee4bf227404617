"""The CogVideoX autoencoder against diffusers' on tiny random weights, its chunks, and its keys."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from tests.models.cogvideox.published import CHECKPOINTS
from tests.models.cogvideox.tiny_checkpoint import build_vae
from vidgen.models.cogvideox.params import vae_params
from vidgen.models.cogvideox.vae import CogVideoXVAE, chunks

pytestmark = pytest.mark.usefixtures("without_gradients")

CLOSE = 1e-4
"""fp32 on both sides; the decoder's norms are conditioned before latents are enlarged, not after."""


def both(**changes: Any) -> tuple[AutoencoderKLCogVideoX, CogVideoXVAE]:
    oracle = build_vae(**changes)
    own = CogVideoXVAE(vae_params(dict(oracle.config)))
    own.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, own


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def latents(frames: int, height: int = 2, width: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(frames))


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deeper": {"layers_per_block": 2, "norm_num_groups": 4},
    "eps": {"norm_eps": 1e-2},
    "five_levels": {
        "block_out_channels": (4, 8, 8, 8, 12),
        "down_block_types": ("CogVideoXDownBlock3D",) * 5,
        "up_block_types": ("CogVideoXUpBlock3D",) * 5,
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17])
def test_encoding_is_the_oracles(frames: int, changes: dict[str, Any]) -> None:
    oracle, own = both(**changes)
    video = clip(frames, batch=2)
    expected = oracle.encode(video).latent_dist
    mean, logvar = own.encode(video)
    assert mean.shape == expected.mean.shape
    assert float((mean - expected.mean).abs().max()) < CLOSE
    assert float((logvar - expected.logvar).abs().max()) < CLOSE


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6])
def test_decoding_is_the_oracles(frames: int, changes: dict[str, Any]) -> None:
    oracle, own = both(**changes)
    z = latents(frames, batch=2)
    expected = oracle.decode(z).sample.clamp(-1, 1)
    parts = list(own.decode_chunks(z))
    found = torch.cat(parts, dim=2)
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.05
    assert float((found - expected).abs().max()) < CLOSE
    assert sum(part.shape[2] for part in parts) == (4 * frames - 3 if frames % 2 else 4 * frames)


@pytest.mark.parametrize(
    ("tiles", "height", "width"),
    [
        ((32, 64, 24, 32), 6, 9),
        ((32, 32, 16, 16), 5, 6),
        ((64, 32, 48, 24), 10, 4),
        ((64, 32, 48, 24), 4, 7),
        ((40, 56, 16, 48), 6, 8),
    ],
)
def test_tiled_is_the_oracles_at_the_same_tiles(tiles: tuple[int, int, int, int], height: int, width: int) -> None:
    oracle, own = both()
    # The oracle multiplies by these and truncates, so that rounded ones would give it other strides.
    oracle.enable_tiling(tiles[0], tiles[1], 1 - Fraction(tiles[2], tiles[0]), 1 - Fraction(tiles[3], tiles[1]))
    z, video = latents(4, height, width), clip(1, 8 * height, 8 * width)
    expected = oracle.decode(z).sample.clamp(-1, 1)
    found = torch.cat(list(own.decode_chunks(z, tiles)), dim=2)
    assert float((found - expected).abs().max()) < CLOSE
    moments = oracle.encode(video).latent_dist
    mean, logvar = own.encode(video, tiles)
    assert float((mean - moments.mean).abs().max()) < CLOSE
    assert float((logvar - moments.logvar).abs().max()) < CLOSE
    whole = torch.cat(list(own.decode_chunks(z)), dim=2)
    tiled = height > tiles[0] // 8 or width > tiles[1] // 8
    assert (float((found - whole).abs().max()) > 1e-3) == tiled


def test_the_oracles_own_overlaps_are_a_sixth_and_a_fifth() -> None:
    oracle, own = both(sample_height=96, sample_width=80)
    oracle.enable_tiling()
    z = latents(3, 8, 9)
    found = torch.cat(list(own.decode_chunks(z, (48, 40, 40, 32))), dim=2)
    assert float((found - oracle.decode(z).sample.clamp(-1, 1)).abs().max()) < CLOSE


def test_frames_depend_on_no_later_chunk_but_on_every_frame_of_their_own() -> None:
    _, own = both()
    z = latents(7)
    changed = z.clone()
    changed[:, :, 5:] += 1
    before, after = (torch.cat(list(own.decode_chunks(x)), dim=2) for x in (z, changed))
    assert torch.equal(before[:, :, :17], after[:, :, :17])
    first_of_the_last_chunk = (before[:, :, 17] - after[:, :, 17]).abs().max()
    assert float(first_of_the_last_chunk) > 1e-3
    video, other = clip(17), clip(17)
    other[:, :, 9:] = -other[:, :, 9:]
    assert torch.equal(own.encode(video)[0][:, :, :3], own.encode(other)[0][:, :, :3])
    assert not torch.equal(own.encode(video)[0][:, :, 3:], own.encode(other)[0][:, :, 3:])


def test_what_a_clip_keeps_between_chunks_does_not_grow_with_its_length() -> None:
    _, own = both()
    sizes, cache = [], None
    for part in chunks(latents(9), 2):
        _, cache = own.decode(part, cache)
        sizes.append(sum(past.numel() for past in cache))
    assert len(sizes) == 4 and len(set(sizes)) == 1


def test_chunks_go_by_size_with_the_rest_in_the_first() -> None:
    lengths = {n: [part.shape[2] for part in chunks(torch.zeros(1, 1, n), 8)] for n in (1, 8, 9, 16, 17, 25)}
    assert lengths == {1: [1], 8: [8], 9: [9], 16: [8, 8], 17: [9, 8], 25: [9, 8, 8]}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_keys_and_shapes_are_the_published_checkpoints(name: str) -> None:
    config = {key: value for key, value in CHECKPOINTS[name]["vae"].items() if not key.startswith("_")}
    with torch.device("meta"):
        oracle, own = AutoencoderKLCogVideoX(**config), CogVideoXVAE(vae_params(config))
    expected = {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in own.state_dict().items()} == expected
