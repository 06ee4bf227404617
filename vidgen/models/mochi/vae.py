"""The Mochi autoencoder: causal in time, 6 frames a latent frame, 8 x 8 pixels a latent (AsymmVAE of Mochi 1).

Module names are the keys of the checkpoint's vae/ folder. State between chunks is a list of tensors that is passed in
and handed back. Refuses to know what a prompt is, where weights come from, and what becomes of the frames.

Letters: B batch, C channels, F frames, H W height width, z latent channels, f h w latent frames, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.mochi.params import NORM_GROUP, VAEParams
from vidgen.nn.causal_conv3d import Stream
from vidgen.nn.tiling import in_step, merge, split
from vidgen.parallel import ALONE, Ranks

Cache = list[Tensor]
Tiling = tuple[int, int, int, int]

OCTAVES = (6, 7)
"""Frequencies of the Fourier features, 2**n periods a unit: those below the coarsest step of eight bits."""
HEAD_EPS = 1e-5
SEQUENCES = 2**15
"""Pixels whose frames attend in one call: GPU kernels take no more than 65,535 sequences."""


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame. Borders repeat their last pixel, and a clip's first frame stands for
    what was before it.

    With `stride` 1 the last kernel - 1 frames are the past of the next call; else the kernel is the stride, and calls
    after the first have none.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=kernel if stride else 1)
        self.before = kernel[0] - 1
        self.history = 0 if stride else self.before
        self.border = ((kernel[2] - 1) // 2,) * 2 + ((kernel[1] - 1) // 2,) * 2

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, C, F, H, W], past [B, C, history, H, W] or None -> (y, past)."""
        if past is None:
            past = x[:, :, :1].expand(-1, -1, self.before, -1, -1)
        x = torch.cat([past.to(x.dtype), x], dim=2)
        # A copy: a view would keep every frame of this layer alive for as long as the cache lives.
        later = x[:, :, x.shape[2] - self.history :].clone()
        return self.conv(F.pad(x, (*self.border, 0, 0), mode="replicate")), later


class FrameGroupNorm(nn.Module):
    """Group norm of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(NORM_GROUP, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = FrameGroupNorm(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = stream(self.conv1, F.silu(self.norm1(x)))
        return x + stream(self.conv2, F.silu(self.norm2(h)))


class TimeAttention(nn.Module):
    """Each pixel's frames attend to themselves and earlier ones; queries and keys have length 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // NORM_GROUP
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, F, H, W] -> the same shape."""
        pixels = x.permute(0, 3, 4, 2, 1)
        out = torch.cat([self._attend(part) for part in pixels.flatten(0, 2).split(SEQUENCES)])
        return out.view(pixels.shape).permute(0, 4, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        """x [sequences, F, C] -> the same shape."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (F.normalize(heads, dim=-1, eps=HEAD_EPS) for heads in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Residual blocks, each with an attention behind it or not. Three lists, because the checkpoint has them so."""

    def __init__(self, channels: int, count: int, attend: bool = False) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels) for _ in range(count)])
        self.norms = nn.ModuleList([FrameGroupNorm(channels) for _ in range(count if attend else 0)])
        self.attentions = nn.ModuleList([TimeAttention(channels) for _ in range(count if attend else 0)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, stream)
            if len(self.attentions) > 0:
                x = x + self.attentions[i](self.norms[i](x))
        return x


class DownBlock(Layers):
    """Fewer frames and pixels by a convolution, then `Layers`."""

    def __init__(self, channels: tuple[int, int], count: int, factors: tuple[int, int], attend: bool) -> None:
        super().__init__(channels[1], count, attend)
        time, space = factors
        self.conv_in = CausalConv3d(*channels, (time, space, space), stride=True)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return super().forward(stream(self.conv_in, x), stream)


class UpBlock(Layers):
    """`Layers`, then channels become more frames and pixels."""

    def __init__(self, channels: tuple[int, int], count: int, factors: tuple[int, int]) -> None:
        super().__init__(channels[0], count)
        self.factors = factors
        self.proj = nn.Linear(channels[0], channels[1] * factors[0] * factors[1] ** 2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        time, space = self.factors
        x = _pointwise(self.proj, super().forward(x, stream)).unflatten(1, (-1, time, space, space))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # B, C, frames, time, rows, space, columns, space
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Encoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths, layers, attend = params.encoder_block_out_channels, params.layers_per_block, params.add_attention_block
        self.proj_in = nn.Linear(params.in_channels, widths[0])
        self.block_in = Layers(widths[0], layers[0], attend[0])
        factors = zip(params.temporal_expansions, params.spatial_expansions, strict=True)
        levels = zip(pairwise(widths), layers[1:-1], factors, attend[1:-1], strict=True)
        self.down_blocks = nn.ModuleList([DownBlock(*level) for level in levels])
        self.block_out = Layers(widths[-1], layers[-1], attend[-1])
        self.norm_out = FrameGroupNorm(widths[-1])
        self.proj_out = nn.Linear(widths[-1], 2 * params.latent_channels, bias=False)

    def forward(self, video: Tensor) -> Tensor:
        """A whole clip, video [B, 3, F, H, W] -> moments [B, 2 z, f, h, w]."""
        stream = Stream(None)
        x = self.block_in(_pointwise(self.proj_in, fourier(video)), stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.block_out(x, stream)
        return _pointwise(self.proj_out, F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths, layers = params.decoder_block_out_channels[::-1], params.layers_per_block[::-1]
        self.conv_in = nn.Conv3d(params.latent_channels, widths[0], 1)
        self.block_in = Layers(widths[0], layers[0])
        factors = zip(params.temporal_expansions[::-1], params.spatial_expansions[::-1], strict=True)
        levels = zip(pairwise(widths), layers[1:-1], factors, strict=True)
        self.up_blocks = nn.ModuleList([UpBlock(*level) for level in levels])
        self.block_out = Layers(widths[-1], layers[-1])
        self.proj_out = nn.Linear(widths[-1], params.out_channels)

    def forward(self, latents: Tensor, stream: Stream) -> Tensor:
        """latents [B, z, f, h, w] -> frames [B, 3, f x temporal factor, H, W]."""
        x = self.block_in(self.conv_in(latents), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return _pointwise(self.proj_out, F.silu(self.block_out(x, stream)))


class MochiVAE(nn.Module):
    """Video in about [-1, 1] <-> latents. Statistics of the latents are in `params`."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """A whole clip, video [B, 3, F, H, W] in [-1, 1] -> (mean, logvar), each [B, z, f, h, w].

        F = 1 + k x temporal factor. logvar is clamped to [-30, 20]. `tiling` is (tile height, tile width, stride
        height, stride width) in pixels; a picture that fits one tile is encoded whole.
        """
        if tiling is None or (video.shape[-2] <= tiling[0] and video.shape[-1] <= tiling[1]):
            moments = self.encoder(video)
        else:
            ratio = self.params.spatial_factor
            tiles = [[self.encoder(tile) for tile in row] for row in split(video, tiling[:2], tiling[2:])]
            height, width, down, right = (size // ratio for size in tiling)
            size = (video.shape[-2] // ratio, video.shape[-1] // ratio)
            moments = merge(tiles, (height - down, width - right), (down, right), size)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """latents [B, z, f, h, w] -> (frames [B, 3, F, H, W], cache). cache=None starts a clip: of its first latent
        frame only the last frame is kept, each later one gives `temporal_factor`. Chunk after chunk gives what the
        whole gives. Frames are not clamped."""
        stream = Stream(cache)
        frames = self.decoder(latents, stream)
        return (frames[:, :, self.params.temporal_factor - 1 :] if cache is None else frames), stream.next

    def decode_chunks(
        self, latents: Tensor, tiling: Tiling | None = None, chunk: int = 1, ranks: Ranks = ALONE
    ) -> Iterator[Tensor]:
        """Frames [B, 3, F, H, W], as they come, `chunk` latent frames at a time; a picture lies within [-1, 1], but
        they are not clamped. `tiling` is (tile height, tile width, stride height, stride width) in pixels; a picture
        that fits one tile is decoded whole. Of a gang, every rank decodes its tiles, and rank 0 has the frames."""
        factor = self.params.spatial_factor
        height, width = latents.shape[-2:]
        if tiling is None or (height <= tiling[0] // factor and width <= tiling[1] // factor):
            for rows in in_step([[latents]], [[self._stream(latents, chunk)]], ranks):
                yield rows[0][0]
            return
        tile = (tiling[0] // factor, tiling[1] // factor)
        step = (tiling[2] // factor, tiling[3] // factor)
        overlap = (tiling[0] - tiling[2], tiling[1] - tiling[3])
        tiles = split(latents, tile, step)
        for rows in in_step(tiles, [[self._stream(x, chunk) for x in row] for row in tiles], ranks):
            yield merge(rows, overlap, tiling[2:], (height * factor, width * factor))

    def _stream(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """Frames of one tile, as they come."""
        cache: Cache | None = None
        for part in latents.split(chunk, dim=2):
            frames, cache = self.decode(part, cache)
            yield frames

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents of the transformer -> latents of the VAE, rounded as MochiPipeline does it."""
        mean, std = self._statistics(latents)
        return latents * std / self.params.scaling_factor + mean

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the VAE -> latents of the transformer, zero mean and unit variance a channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) * self.params.scaling_factor / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, self.params.latent_channels, 1, 1, 1)
        mean = torch.tensor(self.params.latents_mean).view(shape).to(latents.device, latents.dtype)
        std = torch.tensor(self.params.latents_std).view(shape).to(latents.device, latents.dtype)
        return mean, std


def fourier(video: Tensor) -> Tensor:
    """Colours [B, 3, F, H, W] -> [B, 15, F, H, W]: themselves, the sines of each at its frequencies, the cosines."""
    wide = video.float()
    octaves = torch.tensor(OCTAVES, dtype=torch.float32, device=video.device)
    waves = (2.0**octaves * (2 * math.pi)).view(1, 1, -1, 1, 1, 1) * wide.unsqueeze(2)
    waves = waves.flatten(1, 2)  # a colour at its frequencies, then the next colour
    return torch.cat([wide, waves.sin(), waves.cos()], dim=1).to(video.dtype)


def _pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer over the channels of x [B, C, F, H, W]."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)
