"""The Wan autoencoders: causal in time, 2**n in space, frame 0 alone and then 2**m frames a latent frame.

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
from vidgen.nn.tiling import in_step, merge, split
from vidgen.parallel import ALONE, Ranks

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

    def __init__(self, channels: int, up: bool, temporal: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.up = up
        if up:
            narrow = out_channels or channels // 2
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, narrow, 3, padding=1)
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


class DownShortcut(nn.Module):
    """Past a block that halves: cells of `time` frames x `space` x `space` pixels become channels, groups of which are
    averaged. No weights. A clip's first frame shares its cell with zeros."""

    def __init__(self, in_channels: int, out_channels: int, time: int, space: int) -> None:
        super().__init__()
        assert in_channels * time * space * space % out_channels == 0, "checked where sizes are read"
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        x = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space)).unflatten(2, (-1, self.time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # B, (C, time, space, space), F, H, W
        return x.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class UpShortcut(nn.Module):
    """Past a block that doubles: channels, repeated, become cells of `time` frames x 2 x 2 pixels. No weights. A clip's
    first frame fills only the last of its cell's frames."""

    def __init__(self, in_channels: int, out_channels: int, time: int) -> None:
        super().__init__()
        assert out_channels * time * 4 % in_channels == 0, "checked where sizes are read"
        self.repeats, self.out_channels, self.time = out_channels * time * 4 // in_channels, out_channels, time

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """A layer of a stream, because a clip starts differently; its past holds nothing."""
        y = x.repeat_interleave(self.repeats, dim=1).unflatten(1, (self.out_channels, self.time, 2, 2))
        y = y.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return (y[:, :, self.time - 1 :] if past is None else y), x.new_empty(0)


class ResidualDownBlock(nn.Module):
    """The levels of the Wan 2.2 encoder: residual blocks and a halving, with a shortcut around all of it."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, downsampler: Resample | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets
        time = 2 if downsampler is not None and downsampler.time_conv is not None else 1
        self.avg_shortcut = DownShortcut(in_channels, out_channels, time, 1 if downsampler is None else 2)
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.downsampler = downsampler

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = x
        for resnet in self.resnets:
            h = resnet(h, stream)
        if self.downsampler is not None:
            h = self.downsampler(h, stream)
        return h + self.avg_shortcut(x)


class ResidualUpBlock(nn.Module):
    """The levels of the Wan 2.2 decoder: residual blocks and a doubling, with a shortcut around it; the last level
    neither doubles nor has a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, upsampler: Resample | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.upsampler = upsampler
        self.avg_shortcut = None
        if upsampler is not None:
            time = 2 if upsampler.time_conv is not None else 1
            self.avg_shortcut = UpShortcut(in_channels, out_channels, time)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = x
        for resnet in self.resnets:
            h = resnet(h, stream)
        if self.upsampler is None or self.avg_shortcut is None:
            return h
        return self.upsampler(h, stream) + stream(self.avg_shortcut, x)


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
        for level, (previous, width) in enumerate(pairwise(widths)):
            if params.is_residual:
                halves = level < len(params.dim_mult) - 1
                half = Resample(width, up=False, temporal=params.temperal_downsample[level]) if halves else None
                blocks.append(ResidualDownBlock(previous, width, params.num_res_blocks, half))
                continue
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
            previous, width = widths[level : level + 2]
            doubles = level < levels - 1
            temporal = doubles and params.temperal_downsample[levels - 2 - level]
            narrow = width if params.is_residual else width // 2
            upsampler = Resample(width, up=True, temporal=temporal, out_channels=narrow) if doubles else None
            resnets = params.num_res_blocks + 1
            if params.is_residual:
                self.up_blocks.append(ResidualUpBlock(previous, width, resnets, upsampler))
            else:
                # An upsampler halves the channels it hands on.
                self.up_blocks.append(UpBlock(previous if level == 0 else previous // 2, width, resnets, upsampler))
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
        """A whole clip, video [B, 3, F, H, W] in [-1, 1] -> (mean, logvar), each [B, z, f, h, w], in the dtype of the
        encoder's weights.

        F = 1 + k x temporal factor. logvar is clamped to [-30, 20]. `tiling` is (tile height, tile width, stride
        height, stride width); a picture of at most that many pixels is encoded whole. With `patch_size` tiles are cut
        from unshuffled pixels: that is how diffusers counts here.
        """
        x = F.pixel_unshuffle(_images(video.to(self.quant_conv.weight.dtype)), self.params.patch_size)
        x = self._unshuffled_order(_clip(x, video.shape[0]))
        if tiling is None or (video.shape[-2] <= tiling[0] and video.shape[-1] <= tiling[1]):
            moments = self._encode_stream(x)
        else:
            ratio = self.params.spatial_factor // self.params.patch_size
            tiles = [[self._encode_stream(tile) for tile in row] for row in split(x, tiling[:2], tiling[2:])]
            height, width, down, right = (size // ratio for size in tiling)
            size = (x.shape[-2] // ratio, x.shape[-1] // ratio)
            moments = merge(tiles, (height - down, width - right), (down, right), size)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def _encode_stream(self, x: Tensor) -> Tensor:
        """Moments of a whole clip, a latent frame at a time, so that memory does not grow with its length."""
        cache: Cache | None = None
        parts = []
        for part in (x[:, :, :1], *x[:, :, 1:].split(self.params.temporal_factor, dim=2)):
            if part.shape[2]:
                moments, cache = self.encode_chunk(part, cache)
                parts.append(moments)
        return torch.cat(parts, dim=2)

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

    def decode_chunks(
        self, latents: Tensor, tiling: Tiling | None = None, chunk: int = 1, ranks: Ranks = ALONE
    ) -> Iterator[Tensor]:
        """Frames [B, 3, F, H, W] in [-1, 1], as they come, `chunk` latent frames at a time. `tiling` is (tile height,
        tile width, stride height, stride width) in pixels; a picture that fits one tile is decoded whole. Of a gang,
        every rank decodes its tiles, and rank 0 has the frames."""
        factor, patch = self.params.spatial_factor, self.params.patch_size
        height, width = latents.shape[-2:]
        if tiling is None or (height <= tiling[0] // factor and width <= tiling[1] // factor):
            for rows in in_step([[latents]], [[self._stream(latents, chunk)]], ranks):
                yield self._shuffle(rows[0][0]).clamp(-1.0, 1.0)
            return
        tile = (tiling[0] // factor, tiling[1] // factor)
        step = (tiling[2] // factor, tiling[3] // factor)
        stride = (tiling[2] // patch, tiling[3] // patch)
        overlap = (tiling[0] // patch - stride[0], tiling[1] // patch - stride[1])
        size = (height * factor // patch, width * factor // patch)
        tiles = split(latents, tile, step)
        for rows in in_step(tiles, [[self._stream(x, chunk) for x in row] for row in tiles], ranks):
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

    def _stream(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """Frames as the decoder makes them, of one tile, as they come."""
        cache: Cache | None = None
        for part in latents.split(chunk, dim=2):
            frames, cache = self._decode_packed(part, cache)
            yield frames

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
