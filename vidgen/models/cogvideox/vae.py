"""The CogVideoX autoencoder: 3D causal convolutions, 4 in time and 8 x 8 in space (arXiv 2408.06072, section 2.1).

A clip goes through in chunks, the convolutions' pasts handed from one to the next: frames by eights, latent frames by
twos, and what is left over with the first. Norms see a whole chunk, so chunks are part of the model: frames depend on
no later chunk, but on every frame of their own.

Module names are the keys of the checkpoint's vae/ folder. Refuses to know what a prompt is, where weights come from,
how latents are scaled, and what becomes of the frames.

Letters: B batch, C channels, F frames, H W height width, z latent channels, f h w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.cogvideox.params import VAEParams
from vidgen.nn.causal_conv3d import Stream
from vidgen.nn.tiling import in_step, merge, split
from vidgen.parallel import ALONE, Ranks

Cache = list[Tensor]
Tiling = tuple[int, int, int, int]

ENCODED, DECODED = 8, 2
"""Frames, and latent frames, of a chunk."""
SPATIAL_EPS = 1e-6


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame: the two before a clip are its first one, repeated."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, C, F, H, W], past [B, C, 2, H, W] or None at the start of a clip -> (y [B, C', F, H, W], past)."""
        x = torch.cat([x[:, :, :1].expand(-1, -1, 2, -1, -1) if past is None else past, x], dim=2)
        # A copy: a view would keep every frame of this layer alive for as long as the cache lives.
        return self.conv(x), x[:, :, -2:].clone()


class PointConv3d(nn.Module):
    """A convolution of one pixel, stored one name deeper."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are read off the latents (MoVQ, arXiv 2209.09002), enlarged to the features."""

    def __init__(self, channels: int, params: VAEParams) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(params.norm_num_groups, channels, eps=SPATIAL_EPS)
        self.conv_y = PointConv3d(params.latent_channels, channels)
        self.conv_b = PointConv3d(params.latent_channels, channels)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        # Nearest neighbours: a latent's scale and shift are made before it is enlarged. One after the other, because
        # each is as large as x.
        h = self.norm_layer(x) * _enlarged(self.conv_y(latents), x.shape[2:])
        return h + _enlarged(self.conv_b(latents), x.shape[2:])


class ResidualBlock(nn.Module):
    """`spatial`: norms conditioned on the latents, as everywhere in the decoder."""

    def __init__(self, in_channels: int, out_channels: int, params: VAEParams, spatial: bool) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, params, spatial)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = _norm(out_channels, params, spatial)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, stream: Stream, latents: Tensor | None = None) -> Tensor:
        condition = () if latents is None else (latents,)
        h = stream(self.conv1, F.silu(self.norm1(x, *condition)))
        h = stream(self.conv2, F.silu(self.norm2(h, *condition)))
        return h + self.conv_shortcut(x)


class Downsample(nn.Module):
    """Half the height and width; with `temporal` first half the frames, as means of two. A chunk with an odd frame
    keeps its first one."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.temporal = temporal

    def forward(self, x: Tensor) -> Tensor:
        if self.temporal:
            odd = x.shape[2] % 2
            halves = x[:, :, odd:].unflatten(2, (x.shape[2] // 2, 2)).mean(dim=3)
            x = torch.cat([x[:, :, :odd], halves], dim=2)
        return _clip(self.conv(F.pad(_images(x), (0, 1, 0, 1))), x.shape[0])


class Upsample(nn.Module):
    """Twice the height and width; with `temporal` twice the frames. A chunk with an odd frame keeps its first one."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.temporal = temporal

    def forward(self, x: Tensor) -> Tensor:
        frames, (height, width) = x.shape[2], x.shape[3:]
        if self.temporal:
            frames = 2 * frames - frames % 2
        return _clip(self.conv(_images(_enlarged(x, (frames, 2 * height, 2 * width)))), x.shape[0])


class DownBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, params: VAEParams, downsampler: Downsample | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * params.layers_per_block
        self.resnets = nn.ModuleList([ResidualBlock(a, b, params, spatial=False) for a, b in pairwise(widths)])
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class MidBlock(nn.Module):
    def __init__(self, channels: int, params: VAEParams, spatial: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, params, spatial) for _ in range(2)])

    def forward(self, x: Tensor, stream: Stream, latents: Tensor | None = None) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream, latents)
        return x


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, params: VAEParams, upsampler: Upsample | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (params.layers_per_block + 1)
        self.resnets = nn.ModuleList([ResidualBlock(a, b, params, spatial=True) for a, b in pairwise(widths)])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, x: Tensor, stream: Stream, latents: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream, latents)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths = params.block_out_channels
        self.conv_in = CausalConv3d(params.in_channels, widths[0])
        self.down_blocks = nn.ModuleList([])
        for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
            last = level == len(widths) - 1
            downsampler = None if last else Downsample(b, temporal=level < params.temporal_levels)
            self.down_blocks.append(DownBlock(a, b, params, downsampler))
        self.mid_block = MidBlock(widths[-1], params, spatial=False)
        self.norm_out = nn.GroupNorm(params.norm_num_groups, widths[-1], eps=SPATIAL_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * params.latent_channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream(self.conv_in, x)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return stream(self.conv_out, F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths = tuple(reversed(params.block_out_channels))
        self.conv_in = CausalConv3d(params.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], params, spatial=True)
        self.up_blocks = nn.ModuleList([])
        for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
            last = level == len(widths) - 1
            upsampler = None if last else Upsample(b, temporal=level < params.temporal_levels)
            self.up_blocks.append(UpBlock(a, b, params, upsampler))
        self.norm_out = SpatialNorm(widths[-1], params)
        self.conv_out = CausalConv3d(widths[-1], params.out_channels)

    def forward(self, latents: Tensor, stream: Stream) -> Tensor:
        x = stream(self.conv_in, latents)
        x = self.mid_block(x, stream, latents)
        for block in self.up_blocks:
            x = block(x, stream, latents)
        return stream(self.conv_out, F.silu(self.norm_out(x, latents)))


class CogVideoXVAE(nn.Module):
    """AutoencoderKLCogVideoX of the Diffusers layout. Computes in the dtype of its weights."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """A whole clip, video [B, 3, F, H, W] in [-1, 1] -> (mean, logvar), each [B, z, f, h, w]; not scaled.

        F = 1 + 8 k or 8 k gives f = 1 + 2 k or 2 k. logvar is clamped to [-30, 20]. `tiling` is (tile height, tile
        width, stride height, stride width) in pixels; a picture that fits one tile is encoded whole.
        """
        factor = self.params.spatial_factor
        if tiling is None or (video.shape[-2] <= tiling[0] and video.shape[-1] <= tiling[1]):
            moments = torch.cat(list(self._encoded(video)), dim=2)
        else:
            tiles = [
                [torch.cat(list(self._encoded(tile)), dim=2) for tile in row]
                for row in split(video, tiling[:2], tiling[2:])
            ]
            height, width, down, right = (size // factor for size in tiling)
            size = (video.shape[-2] // factor, video.shape[-1] // factor)
            moments = merge(tiles, (height - down, width - right), (down, right), size)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """One chunk, latents [B, z, f, h, w] -> (frames [B, 3, F, H, W], not clamped, cache). F is 4 f, or 4 f - 3
        for odd f, which only the first chunk of a clip (cache None) may have."""
        stream = Stream(cache)
        return self.decoder(latents, stream), stream.next

    def decode_chunks(self, latents: Tensor, tiling: Tiling | None = None, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """latents [B, z, f, h, w], not scaled -> frames [B, 3, F, H, W] in [-1, 1] as they come: 8 a chunk, the first
        of 9 for odd f. `tiling` is (tile height, tile width, stride height, stride width) in pixels; a picture that
        fits one tile is decoded whole. Of a gang, every rank decodes its tiles, and rank 0 has the frames."""
        factor, (height, width) = self.params.spatial_factor, latents.shape[-2:]
        if tiling is None or (height <= tiling[0] // factor and width <= tiling[1] // factor):
            for rows in in_step([[latents]], [[self._decoded(latents)]], ranks):
                yield rows[0][0].clamp(-1.0, 1.0)
            return
        tile, step = (tiling[0] // factor, tiling[1] // factor), (tiling[2] // factor, tiling[3] // factor)
        overlap, size = (tiling[0] - tiling[2], tiling[1] - tiling[3]), (height * factor, width * factor)
        tiles = split(latents, tile, step)
        for rows in in_step(tiles, [[self._decoded(x) for x in row] for row in tiles], ranks):
            yield merge(rows, overlap, tiling[2:], size).clamp(-1.0, 1.0)

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames [B, 3, F, H, W], not clamped, of a clip or a tile of it, chunk after chunk."""
        cache: Cache | None = None
        for part in chunks(latents, DECODED):
            frames, cache = self.decode(part, cache)
            yield frames

    def _encoded(self, video: Tensor) -> Iterator[Tensor]:
        """Moments [B, 2 z, f, h, w] of a clip, chunk after chunk."""
        cache: Cache | None = None
        for part in chunks(video, ENCODED):
            stream = Stream(cache)
            yield self.encoder(part, stream)
            cache = stream.next


def chunks(x: Tensor, size: int) -> list[Tensor]:
    """Frames (dimension 2) by `size`; what is left over goes with the first, or is the only one."""
    count, left = divmod(x.shape[2], size)
    lengths = [size + left, *[size] * (count - 1)] if count else [left]
    return list(x.split(lengths, dim=2))


def _norm(channels: int, params: VAEParams, spatial: bool) -> nn.Module:
    if spatial:
        return SpatialNorm(channels, params)
    return nn.GroupNorm(params.norm_num_groups, channels, eps=params.norm_eps)


def _enlarged(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """x [B, C, f, h, w] at `size` (F, H, W) by nearest neighbours. For odd F above 1 the first frame stays one frame
    and the rest becomes the rest."""
    if size[0] > 1 and size[0] % 2:
        first = F.interpolate(x[:, :, :1], size=(1, *size[1:]))
        return torch.cat([first, F.interpolate(x[:, :, 1:], size=(size[0] - 1, *size[1:]))], dim=2)
    return F.interpolate(x, size=tuple(size))


def _images(x: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B F, C, H, W]"""
    return x.transpose(1, 2).flatten(0, 1)


def _clip(x: Tensor, batch: int) -> Tensor:
    """[B F, C, H, W] -> [B, C, F, H, W]"""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
