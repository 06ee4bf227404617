"""The Allegro autoencoder: 2D layers frame by frame with layers over time between them, 8x8 in space and 4x in time.

It works by overlapping tiles of frames, rows and columns, as it was trained, and their results are added with weights
that rise and fall linearly over the overlaps. Not causal: the layers over time look both ways inside a tile.

Module names are the keys of the checkpoint's vae/ folder. Refuses to know what a prompt is, where weights come from,
and what becomes of the frames.

Letters: B batch, C channels, F frames, H W height width, z latent channels, f h w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.allegro.params import VAEParams
from vidgen.nn.tiling import in_step
from vidgen.parallel import ALONE, Ranks

Tiling = tuple[int, int, int, int]
Sizes = tuple[int, int, int]
"""Frames, height, width."""
IMAGE_NORM_EPS, TIME_NORM_EPS = 1e-6, 1e-5
LOGVAR = (-30.0, 20.0)
"""Limits of the posterior's log variance."""


class ResnetBlock(nn.Module):
    """On single frames."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, IMAGE_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, IMAGE_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, frames: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(frames)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(frames) + h


class TimeLayer(nn.Module):
    """Four convolutions over time around a shortcut; the first of them may halve (`down`) or double (`up`) the frames,
    and then all of them look at neighbouring pixels too."""

    def __init__(self, channels: int, groups: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        space = 1 if resample is None else 3
        kernel = {None: 3, "down": 2, "up": 1}[resample]
        stride = (2, 1, 1) if resample == "down" else 1
        out = 2 * channels if resample == "up" else channels
        same = (0, space // 2, space // 2)
        self.conv1 = _normed(channels, groups, nn.Conv3d(channels, out, (kernel, space, space), stride, same))
        second, third, fourth = (nn.Conv3d(channels, channels, (3, space, space), padding=same) for _ in range(3))
        # The checkpoint counts a dropout before two of them.
        self.conv2 = _normed(channels, groups, second, dropout=True)
        self.conv3 = _normed(channels, groups, third, dropout=True)
        self.conv4 = _normed(channels, groups, fourth)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> the same with F, F / 2 or 2 F frames."""
        if self.resample == "down":
            shortcut, h = x[:, :, ::2], self.conv1(x)
        elif self.resample == "up":
            shortcut = x.repeat_interleave(2, dim=2)
            h = self.conv1(x).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        else:
            shortcut, h = x, self.conv1(_with_ends(x))
        for conv in (self.conv2, self.conv3, self.conv4):
            h = conv(_with_ends(h))
        return shortcut + h


def _normed(channels: int, groups: int, conv: nn.Conv3d, dropout: bool = False) -> nn.Sequential:
    between = [nn.Identity()] if dropout else []
    return nn.Sequential(nn.GroupNorm(groups, channels, TIME_NORM_EPS), nn.SiLU(), *between, conv)


def _with_ends(x: Tensor) -> Tensor:
    """The first and the last frame once more."""
    return torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame by itself."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, IMAGE_NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, frames: Tensor) -> Tensor:
        pixels = self.group_norm(frames).flatten(2).transpose(1, 2)
        q, k, v = (layer(pixels).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return frames + out.transpose(1, 2).reshape(frames.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(F.pad(frames, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks, each followed by a layer over time; then half the frames and half the height and width."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, time: bool, space: bool) -> None:
        super().__init__()
        a, b = widths
        self.resnets = nn.ModuleList([ResnetBlock(a if i == 0 else b, b, groups) for i in range(layers)])
        self.temp_convs = nn.ModuleList([TimeLayer(b, groups) for _ in range(layers)])
        self.temp_convs_down = TimeLayer(b, groups, "down") if time else None
        self.downsamplers = nn.ModuleList([Downsample(b)] if space else [])

    def forward(self, x: Tensor) -> Tensor:
        x = _alternating(x, self.resnets, self.temp_convs)
        x = x if self.temp_convs_down is None else self.temp_convs_down(x)
        for layer in self.downsamplers:
            x = on_frames(layer, x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, each followed by a layer over time; then twice the frames and twice the height and width."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, time: bool, space: bool) -> None:
        super().__init__()
        a, b = widths
        self.resnets = nn.ModuleList([ResnetBlock(a if i == 0 else b, b, groups) for i in range(layers)])
        self.temp_convs = nn.ModuleList([TimeLayer(b, groups) for _ in range(layers)])
        self.temp_conv_up = TimeLayer(b, groups, "up") if time else None
        self.upsamplers = nn.ModuleList([Upsample(b)] if space else [])

    def forward(self, x: Tensor) -> Tensor:
        x = _alternating(x, self.resnets, self.temp_convs)
        x = x if self.temp_conv_up is None else self.temp_conv_up(x)
        for layer in self.upsamplers:
            x = on_frames(layer, x)
        return x


class MidBlock(nn.Module):
    """Residual block, layer over time, attention, residual block, layer over time."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.temp_convs = nn.ModuleList([TimeLayer(channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.temp_convs[0](on_frames(self.resnets[0], x))
        x = on_frames(self.attentions[0], x)
        return self.temp_convs[1](on_frames(self.resnets[1], x))


def _alternating(x: Tensor, resnets: nn.ModuleList, layers: nn.ModuleList) -> Tensor:
    for resnet, layer in zip(resnets, layers, strict=True):
        x = layer(on_frames(resnet, x))
    return x


def on_frames(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of images over each frame of a clip [B, C, F, H, W]."""
    frames = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Encoder(nn.Module):
    """Pixels [B, 3, F, H, W] -> [B, 2 z, f, h, w], of one tile."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths, groups = params.block_out_channels, params.norm_num_groups
        first, last = widths[0], widths[-1]
        self.conv_in = nn.Conv2d(params.in_channels, first, 3, padding=1)
        self.temp_conv_in = nn.Conv3d(first, first, (3, 1, 1), padding=(1, 0, 0))
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(pair, params.layers_per_block, groups, time, level < len(widths) - 1)
                for level, (pair, time) in enumerate(
                    zip(pairwise((first, *widths)), params.temporal_downsample_blocks, strict=True)
                )
            ]
        )
        self.mid_block = MidBlock(last, groups)
        self.conv_norm_out = nn.GroupNorm(groups, last, IMAGE_NORM_EPS)
        self.temp_conv_out = nn.Conv3d(last, last, (3, 1, 1), padding=(1, 0, 0))
        self.conv_out = nn.Conv2d(last, 2 * params.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = on_frames(self.conv_in, x)
        x = x + self.temp_conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = F.silu(on_frames(self.conv_norm_out, self.mid_block(x)))
        return on_frames(self.conv_out, x + self.temp_conv_out(x))


class Decoder(nn.Module):
    """Latents [B, z, f, h, w] -> pixels [B, 3, F, H, W], of one tile."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths, groups = params.block_out_channels, params.norm_num_groups
        first, last = widths[0], widths[-1]
        self.conv_in = nn.Conv2d(params.latent_channels, last, 3, padding=1)
        self.temp_conv_in = nn.Conv3d(last, last, (3, 1, 1), padding=(1, 0, 0))
        self.mid_block = MidBlock(last, groups)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(pair, params.layers_per_block + 1, groups, time, level < len(widths) - 1)
                for level, (pair, time) in enumerate(
                    zip(pairwise((last, *reversed(widths))), params.temporal_upsample_blocks, strict=True)
                )
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, first, IMAGE_NORM_EPS)
        self.temp_conv_out = nn.Conv3d(first, first, (3, 1, 1), padding=(1, 0, 0))
        self.conv_out = nn.Conv2d(first, params.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = on_frames(self.conv_in, x)
        x = self.mid_block(x + self.temp_conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        x = F.silu(on_frames(self.conv_norm_out, x))
        return on_frames(self.conv_out, x + self.temp_conv_out(x))


class AllegroVAE(nn.Module):
    """Encoder and decoder. A clip's sizes are those that tiles cover exactly; ValueError names them otherwise."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        self.quant_conv = nn.Conv2d(2 * params.latent_channels, 2 * params.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(params.latent_channels, params.latent_channels, 1)

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """video [B, 3, F, H, W] in [-1, 1] -> mean and log variance of the posterior, each [B, z, f, h, w].

        `tiling` is (height, width, stride down, stride right) in pixels; None is the checkpoint's own. There is no
        encoding without tiles."""
        pixels, latents = self._tiles(tiling)
        chunks = list(tiled(self.encoder, video, pixels, latents))
        mean, logvar = on_frames(self.quant_conv, torch.cat(chunks, dim=2)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def decode_chunks(self, latents: Tensor, tiling: Tiling | None = None, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """latents [B, z, f, h, w] -> frames as they come, [B, 3, n, H, W] in [-1, 1]: a tile's frames in memory at a
        time. `tiling` as for `encode`. Of a gang, every rank decodes its tiles, and rank 0 has the frames."""
        pixels, tiles = self._tiles(tiling)
        for frames in tiled(self.decoder, on_frames(self.post_quant_conv, latents), tiles, pixels, ranks):
            yield frames.clamp(-1, 1)

    def _tiles(self, tiling: Tiling | None) -> tuple[tuple[Sizes, Sizes], tuple[Sizes, Sizes]]:
        """Tile and stride in frames and pixels, and the same in latents."""
        time, space = self.params.temporal_factor, self.params.spatial_factor
        height, width, down, right = tiling or self.params.tiling
        pixels = (self.params.tile[0], height, width), (self.params.stride[0], down, right)
        tile, stride = ((frames // time, rows // space, columns // space) for frames, rows, columns in pixels)
        return pixels, (tile, stride)


def tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    source: tuple[Sizes, Sizes],
    target: tuple[Sizes, Sizes],
    ranks: Ranks = ALONE,
) -> Iterator[Tensor]:
    """What a network makes of x [B, C, F, H, W] tile by tile, as far as no later tile adds to it: [B, C', n, H', W'].

    `source` and `target` are (tile, stride) of what goes into the network and of what comes out. ValueError if the
    tiles do not cover x exactly."""
    (tile, stride), (out_tile, out_stride) = source, target
    sizes = tuple(x.shape[2:])
    if any(size < t or (size - t) % s for size, t, s in zip(sizes, tile, stride, strict=True)):
        raise ValueError(
            f"{sizes} frames x height x width are not covered by tiles of {tile} every {stride}; allowed: a tile and a "
            "whole number of strides each"
        )
    counts = [(size - t) // s + 1 for size, t, s in zip(sizes, tile, stride, strict=True)]
    height, width = ((n - 1) * s + t for n, t, s in zip(counts[1:], out_tile[1:], out_stride[1:], strict=True))
    carried: Tensor | None = None

    def stream(j: int, k: int) -> Iterator[Tensor]:
        for i in range(counts[0]):
            yield _faded(network(x[_window((i, j, k), tile, stride)]), (i, j, k), counts, out_stride)

    tiles = [[x[_window((0, j, k), tile, stride)] for k in range(counts[2])] for j in range(counts[1])]
    streams = [[stream(j, k) for k in range(counts[2])] for j in range(counts[1])]
    for i, rows in enumerate(in_step(tiles, streams, ranks)):
        frames = rows[0][0].new_zeros(*rows[0][0].shape[:3], height, width)
        for j, k in product(range(counts[1]), range(counts[2])):
            frames[_window((0, j, k), out_tile, out_stride)] += rows[j][k]
        if carried is not None:
            frames[:, :, : carried.shape[2]] += carried
        done = out_stride[0] if i < counts[0] - 1 else out_tile[0]
        carried = frames[:, :, done:].clone()  # a view would keep the frames that are done
        yield frames[:, :, :done]


def _window(place: Sizes, tile: Sizes, stride: Sizes) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(n * s, n * s + t) for n, t, s in zip(place, tile, stride, strict=True)))


def _faded(x: Tensor, place: Sizes, counts: list[int], stride: Sizes) -> Tensor:
    """A tile's result with weights that rise from 0 where it overlaps the tile before and fall from 1 where it overlaps
    the next, along each axis on which there is one."""
    for dim, (index, count, step) in enumerate(zip(place, counts, stride, strict=True), start=2):
        size = x.shape[dim]
        overlap = size - step
        rise = torch.arange(overlap, dtype=x.dtype, device=x.device) / overlap if overlap else x.new_zeros(0)
        weight = x.new_ones(size)
        if index > 0:
            weight[:overlap] *= rise
        if index < count - 1:
            weight[size - overlap :] *= 1 - rise
        x = x * weight.view(-1, *[1] * (4 - dim))
    return x
