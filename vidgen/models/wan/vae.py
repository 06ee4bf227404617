"""The Wan autoencoder: causal in time, 2**n in space, frame 0 alone and then 2**m frames a latent frame.

Module names are the keys of the checkpoint's vae/ folder. State between chunks is a list of tensors that is passed in
and handed back. Refuses to know what a prompt is, where weights come from, and what becomes of the frames.

Letters: B batch, C channels, F frames, H W height width, z latent channels, f h w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.wan.params import VAEParams
from vidgen.nn.causal_conv3d import CausalConv3d, Stream
from vidgen.nn.tiling import merge, split

Cache = list[Tensor]
Tiling = tuple[int, int, int, int]


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over channels (dimension 1), in fp32 with one rounding."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        # Several times faster on a CPU than vector_norm over a dimension that is not the last.
        norm = wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
        return (wide / norm * (self.gamma.float() * self.scale)).to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, 3)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = RMSNorm(out_channels, 3)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = stream(self.conv1, F.silu(self.norm1(x)))
        h = stream(self.conv2, F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        frames = _images(x)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + _clip(self.proj(out.reshape(frames.shape)), x.shape[0])


class Resample(nn.Module):
    """Twice or half the height and width, and with `temporal` twice or half the frames after a clip's first one.

    `time_conv` never makes the first frame: going up it does not see it, going down it is its first past.
    """

    def __init__(self, channels: int, up: bool, temporal: bool) -> None:
        super().__init__()
        self.up = up
        if up:
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
            )
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if temporal:
            wide, stride = (channels * 2, 1) if up else (channels, 2)
            self.time_conv: CausalConv3d | None = CausalConv3d(channels, wide, (3, 1, 1), stride=stride)
        else:
            self.time_conv = None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and self.up:
            x = stream(self._double, x)
        x = _clip(self.resample(_images(x)), x.shape[0])
        if self.time_conv is not None and not self.up:
            x = stream(self._halve, x)
        return x

    def _double(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.time_conv is not None
        if past is not None:
            y, past = self.time_conv(x, past)
            return _interleave(y), past
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2] == 0:
            return first, x.new_zeros(x.shape[0], x.shape[1], self.time_conv.history, *x.shape[3:])
        y, past = self.time_conv(rest, None)
        return torch.cat([first, _interleave(y)], dim=2), past

    def _halve(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.time_conv is not None
        if past is not None:
            return self.time_conv(x, past)
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2] == 0:
            return first, first.clone()
        y, past = self.time_conv(rest, first)
        return torch.cat([first, y], dim=2), past


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resnets[0](x, stream)
        x = self.attentions[0](x, stream)
        return self.resnets[1](x, stream)


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, resnets: int, upsampler: Resample | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream)
        return x if self.upsamplers is None else self.upsamplers[0](x, stream)


class Encoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths = [params.base_dim * mult for mult in (1, *params.dim_mult)]
        self.conv_in = CausalConv3d(params.in_channels, widths[0], (3, 3, 3))
        blocks: list[nn.Module] = []
        for level, width in enumerate(widths[1:]):
            previous = widths[level]
            for _ in range(params.num_res_blocks):
                blocks.append(ResidualBlock(previous, width))
                if 2.0**-level in params.attn_scales:
                    blocks.append(AttentionBlock(width))
                previous = width
            if level < len(params.dim_mult) - 1:
                blocks.append(Resample(width, up=False, temporal=params.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], params.z_dim * 2, (3, 3, 3))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream(self.conv_in, x)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return stream(self.conv_out, F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths = [params.decoder_base_dim * mult for mult in (params.dim_mult[-1], *reversed(params.dim_mult))]
        levels = len(params.dim_mult)
        self.conv_in = CausalConv3d(params.z_dim, widths[0], (3, 3, 3))
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList([])
        for level in range(levels):
            # An upsampler halves the channels it hands on.
            previous = widths[level] if level == 0 else widths[level] // 2
            width = widths[level + 1]
            temporal = level < levels - 1 and params.temperal_downsample[levels - 2 - level]
            upsampler = Resample(width, up=True, temporal=temporal) if level < levels - 1 else None
            self.up_blocks.append(UpBlock(previous, width, params.num_res_blocks + 1, upsampler))
        self.norm_out = RMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], params.out_channels, (3, 3, 3))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream(self.conv_in, x)
        x = self.mid_block(x, stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return stream(self.conv_out, F.silu(self.norm_out(x)))


class WanVAE(nn.Module):
    """AutoencoderKLWan of the Diffusers layout. Computes in the dtype of its weights (or under autocast)."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.quant_conv = nn.Conv3d(params.z_dim * 2, params.z_dim * 2, 1)
        self.post_quant_conv = nn.Conv3d(params.z_dim, params.z_dim, 1)
        self.decoder = Decoder(params)

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """A whole clip, video [B, 3, F, H, W] in [-1, 1] -> (mean, logvar), each [B, z, f, h, w].

        F = 1 + k x temporal factor. logvar is clamped to [-30, 20]. `tiling` is (tile height, tile width, stride
        height, stride width) in pixels, or with `patch_size` in unshuffled pixels: that is how diffusers counts here.
        """
        x = F.pixel_unshuffle(_images(video), self.params.patch_size)
        x = self._unshuffled_order(_clip(x, video.shape[0]))
        if tiling is None or (x.shape[-2] <= tiling[0] and x.shape[-1] <= tiling[1]):
            moments, _ = self.encode_chunk(x)
        else:
            ratio = self.params.spatial_factor // self.params.patch_size
            tiles = [[self.encode_chunk(tile)[0] for tile in row] for row in split(x, tiling[:2], tiling[2:])]
            height, width, down, right = (size // ratio for size in tiling)
            size = (x.shape[-2] // ratio, x.shape[-1] // ratio)
            moments = merge(tiles, (height - down, width - right), (down, right), size)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_chunk(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Unshuffled frames -> (moments [B, 2 z, f, h, w], cache). With a cache F is a multiple of the temporal
        factor; without one the clip starts here and F is one more."""
        stream = Stream(cache)
        moments = self.encoder(x, stream)
        return self.quant_conv(moments), stream.next

    def decode(self, latents: Tensor, cache: Cache | None = None, clamp: bool = True) -> tuple[Tensor, Cache]:
        """latents [B, z, f, h, w] -> (frames [B, 3, F, H, W], cache). cache=None starts a clip: its first latent
        frame gives 1 frame, each later one `temporal_factor`. Chunk after chunk gives what the whole gives.
        `clamp` to [-1, 1]; training wants it off, because a clamped pixel has no gradient."""
        frames, cache = self._decode_packed(latents, cache)
        frames = self._shuffle(frames)
        return (frames.clamp(-1.0, 1.0) if clamp else frames), cache

    def decode_chunks(self, latents: Tensor, tiling: Tiling | None = None, chunk: int = 1) -> Iterator[Tensor]:
        """Frames [B, 3, F, H, W] in [-1, 1], as they come, `chunk` latent frames at a time. `tiling` is (tile height,
        tile width, stride height, stride width) in pixels; a picture that fits one tile is decoded whole."""
        factor, patch = self.params.spatial_factor, self.params.patch_size
        height, width = latents.shape[-2:]
        if tiling is None or (height <= tiling[0] // factor and width <= tiling[1] // factor):
            cache: Cache | None = None
            for part in latents.split(chunk, dim=2):
                frames, cache = self.decode(part, cache)
                yield frames
            return
        tile = (tiling[0] // factor, tiling[1] // factor)
        step = (tiling[2] // factor, tiling[3] // factor)
        stride = (tiling[2] // patch, tiling[3] // patch)
        overlap = (tiling[0] // patch - stride[0], tiling[1] // patch - stride[1])
        size = (height * factor // patch, width * factor // patch)
        caches: dict[tuple[int, int], Cache] = {}
        for part in latents.split(chunk, dim=2):
            rows: list[list[Tensor]] = []
            for i, row in enumerate(split(part, tile, step)):
                rows.append([])
                for j, piece in enumerate(row):
                    frames, caches[i, j] = self._decode_packed(piece, caches.get((i, j)))
                    rows[i].append(frames)
            yield self._shuffle(merge(rows, overlap, stride, size)).clamp(-1.0, 1.0)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the VAE -> latents of the transformer, zero mean and unit variance a channel."""
        mean, inverse = self._statistics(latents)
        return (latents - mean) * inverse

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents of the transformer -> latents of the VAE, rounded as WanPipeline does it."""
        mean, inverse = self._statistics(latents)
        return latents / inverse + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, self.params.z_dim, 1, 1, 1)
        mean = torch.tensor(self.params.latents_mean).view(shape).to(latents.device, latents.dtype)
        std = torch.tensor(self.params.latents_std).view(shape).to(latents.device, latents.dtype)
        return mean, 1.0 / std

    def _decode_packed(self, latents: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Frames as the decoder makes them: `patch_size`**2 sub-pixels as channels."""
        stream = Stream(cache)
        return self.decoder(self.post_quant_conv(latents), stream), stream.next

    def _unshuffled_order(self, x: Tensor) -> Tensor:
        """Channels as Wan orders sub-pixels, column before row: torch's pixel_unshuffle has the row first."""
        patch = self.params.patch_size
        return x.unflatten(1, (-1, patch, patch)).transpose(2, 3).flatten(1, 3)

    def _shuffle(self, x: Tensor) -> Tensor:
        patch = self.params.patch_size
        return _clip(F.pixel_shuffle(_images(self._unshuffled_order(x)), patch), x.shape[0])


def _images(x: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B F, C, H, W]"""
    return x.transpose(1, 2).flatten(0, 1)


def _clip(x: Tensor, batch: int) -> Tensor:
    """[B F, C, H, W] -> [B, C, F, H, W]"""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _interleave(x: Tensor) -> Tensor:
    """[B, 2 C, F, H, W] -> [B, C, 2 F, H, W]: the first half of the channels is the earlier frame."""
    return torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)
