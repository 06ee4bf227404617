"""The HunyuanVideo autoencoder: 4 x 8 x 8, convolutions and attention that look back in time only.

Module names are the keys of the checkpoint's vae/ folder. Group norms take statistics over all frames of a call, so
that an earlier frame does depend on later ones, and a stream of chunks is not what the whole gives: the published
decoder works on overlapping tiles of 17 frames, always, and so does this one; their frames come as tiles are done.
Refuses to know what a prompt is, where weights come from, and what becomes of the frames.

Letters: B batch, C channels, F frames, H W height width, z latent channels, f h w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.hunyuan.params import VAEParams
from vidgen.nn.tiling import in_step, merge, split
from vidgen.parallel import ALONE, Ranks

Tiling = tuple[int, int, int, int]

EPS = 1e-6
TILE_FRAMES, TILE_STRIDE = 16, 12
"""Frames of a tile in time beside its first one, and from a tile to the next. Latent frames: a quarter."""


class CausalConv(nn.Module):
    """3D convolution that sees no later frame; pictures and the first frame are repeated beyond their borders."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.padding = (*[kernel // 2] * 4, kernel - 1, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding, mode="replicate"))


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = CausalConv(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = CausalConv(out_channels, out_channels)
        self.conv_shortcut = CausalConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """One head over the pixels of a frame and of all before it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Frame by frame, so that no mask of pixels x pixels is made."""
        pixels = x.shape[3] * x.shape[4]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        seen = [
            F.scaled_dot_product_attention(q[:, :, end - pixels : end], k[:, :, :end], v[:, :, :end])
            for end in range(pixels, q.shape[2] + 1, pixels)
        ]
        out = self.to_out[0](torch.cat(seen, dim=2).squeeze(1))
        return x + out.transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Half or twice the height and width (`space`), the frames after the first (`time`), or both."""

    def __init__(self, channels: int, up: bool, space: bool, time: bool) -> None:
        super().__init__()
        self.up, self.space, self.time = up, space, time
        stride = (1, 1, 1) if up else (2 if time else 1, 2 if space else 1, 2 if space else 1)
        self.conv = CausalConv(channels, channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.up and self.time:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        if self.up and self.space:
            x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """Residual blocks, and what leads to the next level under the checkpoint's name for it."""

    def __init__(
        self, widths: tuple[int, int], resnets: int, groups: int, name: str, resample: Resample | None
    ) -> None:
        super().__init__()
        inputs = [widths[0]] + [widths[1]] * resnets
        self.resnets = nn.ModuleList([ResidualBlock(a, b, groups) for a, b in pairwise(inputs)])
        self.name = name
        setattr(self, name, None if resample is None else nn.ModuleList([resample]))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        resamples = getattr(self, self.name)
        return x if resamples is None else resamples[0](x)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _levels(params: VAEParams, up: bool) -> nn.ModuleList:
    """Levels from the first to be run. Going up, halvings of the finest levels are undone at the coarsest."""
    widths = params.block_out_channels[::-1] if up else params.block_out_channels
    resnets, name = (params.layers_per_block + 1, "upsamplers") if up else (params.layers_per_block, "downsamplers")
    found = []
    for level, pair in enumerate(pairwise((widths[0], *widths))):
        space, time = params.spatial_levels[level], params.temporal_levels[level]
        resample = Resample(pair[1], up, space, time) if space or time else None
        found.append(Level(pair, resnets, params.norm_num_groups, name, resample))
    return nn.ModuleList(found)


class Encoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths, groups = params.block_out_channels, params.norm_num_groups
        self.conv_in = CausalConv(params.in_channels, widths[0])
        self.down_blocks = _levels(params, up=False)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = CausalConv(widths[-1], 2 * params.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths, groups = params.block_out_channels, params.norm_num_groups
        self.conv_in = CausalConv(params.latent_channels, widths[-1])
        self.mid_block = MidBlock(widths[-1], groups)
        self.up_blocks = _levels(params, up=True)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = CausalConv(widths[0], params.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class HunyuanVAE(nn.Module):
    """AutoencoderKLHunyuanVideo of the Diffusers layout. Computes in the dtype of its weights."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        latents = params.latent_channels
        self.quant_conv = nn.Conv3d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv3d(latents, latents, 1)

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """A whole clip, video [B, 3, F, H, W] in [-1, 1] -> (mean, logvar), each [B, z, f, h, w].

        F = 1 + 4 k. logvar is clamped to [-30, 20]. `tiling` is (tile height, tile width, stride height, stride width)
        in pixels; a picture that fits one tile is encoded whole. More than 16 frames are encoded in tiles of 17.
        """
        time = self.params.temporal_compression_ratio
        tiles = (self._encoded(part, tiling) for part in _in_time(video, TILE_FRAMES, TILE_STRIDE))
        overlap = (TILE_FRAMES - TILE_STRIDE) // time
        moments = torch.cat(list(_joined(tiles, TILE_STRIDE // time, overlap)), dim=2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_chunks(self, latents: Tensor, tiling: Tiling | None = None, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """latents [B, z, f, h, w] -> frames [B, 3, F, H, W] in [-1, 1], as they come: 13 of the first tile in time, 12
        of each other. `tiling` as in `encode`, for the picture within a tile in time. Of a gang, every rank decodes its
        tiles of the picture, and rank 0 has the frames."""
        for frames in _joined(self._decoded(latents, tiling, ranks), TILE_STRIDE, TILE_FRAMES - TILE_STRIDE):
            yield frames.clamp(-1.0, 1.0)

    def _encoded(self, video: Tensor, tiling: Tiling | None) -> Tensor:
        ratio = self.params.spatial_compression_ratio
        return _in_space(lambda x: self.quant_conv(self.encoder(x)), video, tiling, _latent(tiling, ratio))

    def _decoded(self, latents: Tensor, tiling: Tiling | None, ranks: Ranks) -> Iterator[Tensor]:
        """Frames of each tile in time, at rank 0."""
        ratio, (height, width) = self.params.spatial_compression_ratio, latents.shape[-2:]
        source = _latent(tiling, ratio)
        if tiling is None or source is None or (height <= source[0] and width <= source[1]):
            for rows in in_step([[latents]], [[self._stream(latents)]], ranks):
                yield rows[0][0]
            return
        overlap, size = (tiling[0] - tiling[2], tiling[1] - tiling[3]), (height * ratio, width * ratio)
        tiles = split(latents, source[:2], source[2:])
        for rows in in_step(tiles, [[self._stream(x) for x in row] for row in tiles], ranks):
            yield merge(rows, overlap, tiling[2:], size)

    def _stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames of each tile in time, of one tile of the picture."""
        time = self.params.temporal_compression_ratio
        for part in _in_time(latents, TILE_FRAMES // time, TILE_STRIDE // time):
            yield self.decoder(self.post_quant_conv(part))


def _latent(tiling: Tiling | None, ratio: int) -> Tiling | None:
    """Tiles of pixels as tiles of latents."""
    if tiling is None:
        return None
    height, width, down, right = (size // ratio for size in tiling)
    return height, width, down, right


def _in_space(run: Callable[[Tensor], Tensor], x: Tensor, source: Tiling | None, target: Tiling | None) -> Tensor:
    """`run` on tiles of the picture (`source`, in units of x), joined again (`target`, in units of the result)."""
    if source is None or target is None or (x.shape[-2] <= source[0] and x.shape[-1] <= source[1]):
        return run(x)
    rows = [[run(tile) for tile in row] for row in split(x, source[:2], source[2:])]
    size = (x.shape[-2] * target[0] // source[0], x.shape[-1] * target[1] // source[1])
    return merge(rows, (target[0] - target[2], target[1] - target[3]), target[2:], size)


def _in_time(x: Tensor, length: int, stride: int) -> Iterator[Tensor]:
    """Tiles of 1 + `length` frames, one every `stride`. One that would hold nothing but its first frame, which the tile
    before it has made, is left out."""
    for first in range(0, x.shape[2], stride):
        if first == 0 or x.shape[2] - first > 1:
            yield x[:, :, first : first + length + 1]


def _joined(tiles: Iterator[Tensor], stride: int, overlap: int) -> Iterator[Tensor]:
    """What each tile in time contributes: `stride` frames, of the first one more. Every other tile drops its first
    frame and fades in over the `overlap` last frames of the tile before it."""
    end: Tensor | None = None
    for tile in tiles:
        if end is not None:
            tile = _faded(end, tile[:, :, 1:])
        kept = tile[:, :, : stride + 1 if end is None else stride]
        end = tile[:, :, max(tile.shape[2] - overlap, 0) :].clone()  # a view would keep the whole tile
        yield kept


def _faded(end: Tensor, tile: Tensor) -> Tensor:
    """The tile, its first frames mixed with `end`: frame i of n is i / n its own."""
    extent = min(end.shape[2], tile.shape[2])
    weight = torch.arange(extent, dtype=tile.dtype, device=tile.device).view(-1, 1, 1) / extent
    before = end[:, :, end.shape[2] - extent :]
    return torch.cat([before * (1 - weight) + tile[:, :, :extent] * weight, tile[:, :, extent:]], dim=2)
