"""The LTX-Video autoencoder (HaCohen et al. 2025, arXiv 2501.00103, section 2.1): 8 frames x 32 x 32 pixels a latent.

Module names are the keys of the checkpoint's vae/ folder. The encoder sees no later frame. The published decoders do,
one frame a convolution, so a clip goes through the network as a stream of pieces: a layer hands on what it has seen
enough to compute, and the last piece is marked. All frames alive at once are those of a few pieces. Refuses to know
what a prompt is, where weights come from, and what becomes of the frames.

Letters: B batch, C channels, F frames, H W height width, z latent channels, f h w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.ltx.params import STRIDES, DownStage, UpStage, VAEParams
from vidgen.models.ltx.transformer import TimestepEmbedding
from vidgen.nn.tiling import in_step, merge, split
from vidgen.parallel import ALONE, Ranks
from vidgen.sampling.step import Draws

Tiling = tuple[int, int, int, int]
Pieces = Iterator[tuple[Tensor, bool]]
"""The frames of a clip in order, [B, C, some, H, W] at a time, and whether these are the last."""
Noise = Iterator[Tensor]
"""What residual blocks inject, two [B, 1, 1, H, W] a block, in the order in which the blocks run."""
NORM_EPS = 1e-8


class Conv3d(nn.Module):
    """3D convolution over a stream. The first frame stands for those before the clip, and where the convolution is not
    causal the last one for those after it."""

    def __init__(
        self, inputs: int, outputs: int, causal: bool, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=stride, padding=(0, kernel // 2, kernel // 2))
        self.kernel, self.stride = kernel, stride[0]
        self.ahead = 0 if causal else kernel // 2

    def forward(self, pieces: Pieces) -> Pieces:
        held: Tensor | None = None
        for x, last in pieces:
            before = x[:, :, :1].expand(-1, -1, self.kernel - 1 - self.ahead, -1, -1) if held is None else held
            after = x[:, :, -1:].expand(-1, -1, self.ahead if last else 0, -1, -1)
            x = torch.cat([before, x, after], dim=2)
            made = max(0, (x.shape[2] - self.kernel) // self.stride + 1)
            held = x[:, :, made * self.stride :].clone()  # a view would keep all of x alive
            if made:
                yield self.conv(x), last


class Around:
    """The way around layers that hold frames back: iterating feeds them, `take` gives the frames of what came out."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._held: Tensor | None = None

    def __iter__(self) -> Pieces:
        for x, last in self._pieces:
            self._held = x if self._held is None else torch.cat([self._held, x], dim=2)
            yield x, last

    def take(self, frames: int) -> Tensor:
        assert self._held is not None and self._held.shape[2] >= frames
        taken, rest = self._held[:, :, :frames], self._held[:, :, frames:]
        self._held = rest.clone() if rest.shape[2] else None
        return taken


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; modulated by the timestep and with noise injected where the checkpoint says."""

    def __init__(
        self, inputs: int, outputs: int, eps: float, causal: bool, noisy: bool = False, timed: bool = False
    ) -> None:
        super().__init__()
        self.noisy = noisy
        self.conv1 = Conv3d(inputs, outputs, causal)
        self.conv2 = Conv3d(outputs, outputs, causal)
        if inputs != outputs:
            self.norm3: nn.LayerNorm | None = nn.LayerNorm(inputs, eps=eps)
            self.conv_shortcut: Conv3d | None = Conv3d(inputs, outputs, causal, kernel=1)
        else:
            self.norm3 = self.conv_shortcut = None
        self.per_channel_scale1 = nn.Parameter(torch.zeros(inputs, 1, 1)) if noisy else None
        self.per_channel_scale2 = nn.Parameter(torch.zeros(inputs, 1, 1)) if noisy else None
        self.scale_shift_table = nn.Parameter(torch.randn(4, inputs) / inputs**0.5) if timed else None

    def forward(self, pieces: Pieces, time: Tensor | None = None, noise: Noise | None = None) -> Pieces:
        """time [B, 4, C] if the block is modulated."""
        first, second = (next(noise), next(noise)) if self.noisy and noise is not None else (None, None)
        return self._stream(Around(pieces), *self._modulation(time), first, second)

    def _stream(
        self,
        around: Around,
        modulation1: tuple[Tensor, Tensor] | None,
        modulation2: tuple[Tensor, Tensor] | None,
        noise1: Tensor | None,
        noise2: Tensor | None,
    ) -> Pieces:
        h = self.conv1(_each(iter(around), lambda x: F.silu(_modulated(_norm(x), modulation1))))
        h = _each(h, lambda x: F.silu(_modulated(_norm(_noised(x, noise1, self.per_channel_scale1)), modulation2)))
        for y, last in self.conv2(h):
            yield _noised(y, noise2, self.per_channel_scale2) + self._shortcut(around.take(y.shape[2])), last

    def _modulation(self, time: Tensor | None) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        if self.scale_shift_table is None:
            return None, None
        assert time is not None
        shift1, scale1, shift2, scale2 = (self.scale_shift_table + time)[..., None, None, None].unbind(dim=1)
        return (shift1, scale1), (shift2, scale2)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.norm3 is None or self.conv_shortcut is None:
            return x
        return self.conv_shortcut.conv(self.norm3(x.movedim(1, -1)).movedim(-1, 1))


class Downsampler(nn.Module):
    """Fewer frames, rows and columns, as more channels; around the convolution the mean of the folded ones."""

    def __init__(self, inputs: int, outputs: int, kind: str, causal: bool) -> None:
        super().__init__()
        self.stride = STRIDES[kind]
        folded = self.stride[0] * self.stride[1] * self.stride[2]
        self.group = inputs * folded // outputs
        self.conv = Conv3d(inputs, outputs // folded, causal)

    def forward(self, pieces: Pieces) -> Pieces:
        """The clip in one piece: encoding is not streamed."""
        for x, last in pieces:
            x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
            mean = _folded(x, self.stride).unflatten(1, (-1, self.group)).mean(dim=2)
            for y, end in self.conv(iter([(x, last)])):
                yield _folded(y, self.stride) + mean, end


class Upsampler(nn.Module):
    """Twice the frames, rows and columns, unfolded from channels; the clip's first frame stays one."""

    STRIDE = STRIDES["spatiotemporal"]

    def __init__(self, channels: int, factor: int, residual: bool, causal: bool) -> None:
        super().__init__()
        self.residual, self.repeats = residual, 8 // factor
        self.conv = Conv3d(channels, channels * 8 // factor, causal)

    def forward(self, pieces: Pieces) -> Pieces:
        around, begun = Around(pieces), False
        for y, last in self.conv(iter(around)):
            x = around.take(y.shape[2])
            y = _unfolded(y, self.STRIDE)
            if self.residual:
                y = y + _unfolded(x, self.STRIDE).repeat(1, self.repeats, 1, 1, 1)
            yield (y if begun else y[:, :, 1:]), last
            begun = True


class DownBlock(nn.Module):
    def __init__(self, stage: DownStage, params: VAEParams) -> None:
        super().__init__()
        eps, causal = params.resnet_norm_eps, params.encoder_causal
        inputs, outputs, kind = stage.inputs, stage.outputs, stage.downsample
        self.resnets = nn.ModuleList([ResidualBlock(inputs, inputs, eps, causal) for _ in range(stage.resnets)])
        self.downsamplers: nn.ModuleList | None = None
        self.conv_out: ResidualBlock | None = None
        if kind is not None and params.factorised:
            self.downsamplers = nn.ModuleList([Downsampler(inputs, outputs, kind, causal)])
        elif kind is not None:
            self.downsamplers = nn.ModuleList([Conv3d(inputs, inputs, causal, stride=STRIDES[kind])])
        if inputs != outputs and not params.factorised:
            self.conv_out = ResidualBlock(inputs, outputs, eps, causal)

    def forward(self, pieces: Pieces) -> Pieces:
        for layer in (*self.resnets, *(self.downsamplers or ()), *((self.conv_out,) if self.conv_out else ())):
            pieces = layer(pieces)
        return pieces


class MidBlock(nn.Module):
    def __init__(
        self, width: int, resnets: int, eps: float, causal: bool, noisy: bool = False, timed: bool = False
    ) -> None:
        super().__init__()
        self.time_embedder = TimestepEmbedding(4 * width) if timed else None
        blocks = [ResidualBlock(width, width, eps, causal, noisy, timed) for _ in range(resnets)]
        self.resnets = nn.ModuleList(blocks)

    def forward(self, pieces: Pieces, timestep: Tensor | None = None, noise: Noise | None = None) -> Pieces:
        time = _time(self.time_embedder, timestep, 4)
        for resnet in self.resnets:
            pieces = resnet(pieces, time, noise)
        return pieces


class UpBlock(nn.Module):
    def __init__(self, stage: UpStage, params: VAEParams) -> None:
        super().__init__()
        eps, causal, timed = params.resnet_norm_eps, params.decoder_causal, params.timestep_conditioning
        width = stage.outputs
        self.time_embedder = TimestepEmbedding(4 * width) if timed else None
        self.conv_in = ResidualBlock(stage.inputs, width, eps, causal) if stage.widens else None
        self.upsamplers: nn.ModuleList | None = None
        if stage.upsample:
            upsampler = Upsampler(width * stage.factor, stage.factor, stage.residual, causal)
            self.upsamplers = nn.ModuleList([upsampler])
        blocks = [ResidualBlock(width, width, eps, causal, stage.inject_noise, timed) for _ in range(stage.resnets)]
        self.resnets = nn.ModuleList(blocks)

    def forward(self, pieces: Pieces, timestep: Tensor | None, noise: Noise | None) -> Pieces:
        time = _time(self.time_embedder, timestep, 4)
        if self.conv_in is not None:
            pieces = self.conv_in(pieces)
        for upsampler in self.upsamplers or ():
            pieces = upsampler(pieces)
        for resnet in self.resnets:
            pieces = resnet(pieces, time, noise)
        return pieces


class Encoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.patch = params.patch_size
        stages, causal = params.down_stages(), params.encoder_causal
        last = stages[-1].outputs
        self.conv_in = Conv3d(params.in_channels * self.patch**2, stages[0].inputs, causal)
        self.down_blocks = nn.ModuleList([DownBlock(stage, params) for stage in stages])
        self.mid_block = MidBlock(last, params.layers_per_block[-1], params.resnet_norm_eps, causal)
        self.conv_out = Conv3d(last, params.latent_channels + 1, causal)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> [B, z + 1, f, h, w]: the mean, and one logarithm of the variance for all channels."""
        pieces = self.conv_in(iter([(_columns_first(_folded(video, (1, self.patch, self.patch)), self.patch), True)]))
        for block in self.down_blocks:
            pieces = block(pieces)
        pieces = self.conv_out(_each(self.mid_block(pieces), lambda x: F.silu(_norm(x))))
        return torch.cat([x for x, _ in pieces], dim=2)


class Decoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.patch = params.patch_size
        timed, causal, eps = params.timestep_conditioning, params.decoder_causal, params.resnet_norm_eps
        first, last = params.decoder_block_out_channels[-1], params.up_stages()[-1].outputs
        self.conv_in = Conv3d(params.latent_channels, first, causal)
        layers, noisy = params.decoder_layers_per_block[-1], params.decoder_inject_noise[-1]
        self.mid_block = MidBlock(first, layers, eps, causal, noisy, timed)
        self.up_blocks = nn.ModuleList([UpBlock(stage, params) for stage in params.up_stages()])
        self.conv_out = Conv3d(last, params.out_channels * self.patch**2, causal)
        self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0)) if timed else None
        self.time_embedder = TimestepEmbedding(2 * last) if timed else None
        self.scale_shift_table = nn.Parameter(torch.randn(2, last) / last**0.5) if timed else None

    def forward(self, latents: Tensor, timestep: Tensor, noise: Noise | None, chunk: int) -> Iterator[Tensor]:
        """latents [B, z, f, h, w], timestep [B] in [0, 1] -> frames as they come; `chunk` latent frames at a time."""
        if self.timestep_scale_multiplier is not None:
            timestep = timestep.float() * self.timestep_scale_multiplier.float()
        pieces = self.mid_block(self.conv_in(_cut(iter([(latents, True)]), chunk)), timestep, noise)
        for block in self.up_blocks:
            pieces = block(_cut(pieces, chunk), timestep, noise)
            chunk *= 2 if isinstance(block, UpBlock) and block.upsamplers is not None else 1
        modulation = None
        if self.scale_shift_table is not None:
            time = _time(self.time_embedder, timestep, 2)
            assert time is not None
            shift, scale = (self.scale_shift_table + time)[..., None, None, None].unbind(dim=1)
            modulation = (shift, scale)
        pieces = self.conv_out(_each(_cut(pieces, chunk), lambda x: F.silu(_modulated(_norm(x), modulation))))
        return (_unfolded(_columns_first(x, self.patch), (1, self.patch, self.patch)) for x, _ in pieces)


class LTXVAE(nn.Module):
    """AutoencoderKLLTXVideo of the Diffusers layout. Computes in the dtype of its weights."""

    KEEP_FP32 = ("latents_mean", "latents_std")
    """The latents' statistics, which are not computed with in the dtype of the weights."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", torch.zeros(params.latent_channels))
        self.register_buffer("latents_std", torch.ones(params.latent_channels))

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """A whole clip, video [B, 3, F, H, W] in [-1, 1] -> (mean, logvar), each [B, z, f, h, w].

        F = 1 + k x temporal factor. logvar is clamped to [-30, 20]. `tiling` is (tile height, tile width, stride
        height, stride width) in pixels.
        """
        if tiling is None or (video.shape[-2] <= tiling[0] and video.shape[-1] <= tiling[1]):
            moments = self.encoder(video)
        else:
            tiles = [[self.encoder(tile) for tile in row] for row in split(video, tiling[:2], tiling[2:])]
            factor = self.params.spatial_factor
            height, width, down, right = (size // factor for size in tiling)
            size = (video.shape[-2] // factor, video.shape[-1] // factor)
            moments = merge(tiles, (height - down, width - right), (down, right), size)
        mean, logvar = moments[:, :-1], moments[:, -1:]
        return mean, logvar.clamp(-30.0, 20.0).expand_as(mean)

    def decode_chunks(
        self,
        latents: Tensor,
        tiling: Tiling | None = None,
        timestep: float = 0.0,
        draws: Draws | None = None,
        chunk: int = 2,
        ranks: Ranks = ALONE,
    ) -> Iterator[Tensor]:
        """Frames [B, 3, some, H, W] in [-1, 1], as they come.

        latents are [B, z, f, h, w]. `timestep` in [0, 1] is the noise left in them, for a decoder that is conditioned
        on it. `draws` is what a decoder that injects noise draws from, tile after tile (diffusers: the global
        generator); without it none is injected. `chunk` latent frames are worked on at a time. `tiling` is (tile
        height, tile width, stride height, stride width) in pixels; a picture that fits one tile is decoded whole. Of
        a gang, every rank decodes its tiles, and rank 0 has the frames.
        """
        factor = self.params.spatial_factor
        height, width = latents.shape[-2:]
        times = torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
        if tiling is None or (height <= tiling[0] // factor and width <= tiling[1] // factor):
            stream = self.decoder(latents, times, self._noise(latents, draws), chunk)
            for rows in in_step([[latents]], [[stream]], ranks):
                yield rows[0][0].clamp(-1.0, 1.0)
            return
        tile, step = (tiling[0] // factor, tiling[1] // factor), (tiling[2] // factor, tiling[3] // factor)
        overlap = (tiling[0] - tiling[2], tiling[1] - tiling[3])
        tiles = split(latents, tile, step)
        # Every rank draws for all tiles, so that each finds its own noise.
        streams = [[self.decoder(x, times, self._noise(x, draws), chunk) for x in row] for row in tiles]
        for rows in in_step(tiles, streams, ranks):
            yield merge(rows, overlap, tiling[2:], (height * factor, width * factor)).clamp(-1.0, 1.0)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the VAE -> latents of the transformer, zero mean and unit variance a channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents of the transformer -> latents of the VAE."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, self.params.latent_channels, 1, 1, 1)
        return self.latents_mean.view(shape).to(latents), self.latents_std.view(shape).to(latents)

    def _noise(self, latents: Tensor, draws: Draws | None) -> Noise | None:
        """All that the decoder injects into this tile, drawn at once: its blocks do not run in order over a stream."""
        if draws is None:
            return None
        drawn = [draws.normal(shape) for shape in self._noise_shapes(*latents.shape[-2:])]
        return iter([x[:, None, None].to(latents) for x in drawn])

    def _noise_shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        inject, resnets = self.params.decoder_inject_noise, self.params.decoder_layers_per_block
        shapes = [(height, width)] * (2 * resnets[-1] * inject[-1])
        for stage in self.params.up_stages():
            height, width = (2 * height, 2 * width) if stage.upsample else (height, width)
            shapes += [(height, width)] * (2 * stage.resnets * stage.inject_noise)
        return shapes


def _each(pieces: Pieces, change: Callable[[Tensor], Tensor]) -> Pieces:
    for x, last in pieces:
        yield change(x), last


def _cut(pieces: Pieces, frames: int) -> Pieces:
    """The same frames, at most `frames` at a time: what was held back all comes with the last piece."""
    for x, last in pieces:
        parts = x.split(frames, dim=2)
        for i, part in enumerate(parts):
            yield part, last and i == len(parts) - 1


def _norm(x: Tensor) -> Tensor:
    """x / root mean square over channels (dimension 1), in fp32 with one rounding."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + NORM_EPS)).to(x.dtype)


def _modulated(x: Tensor, modulation: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if modulation is None else x * (1 + modulation[1]) + modulation[0]


def _noised(x: Tensor, noise: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if noise is None or scale is None else x + noise * scale[:, None]


def _time(embedder: TimestepEmbedding | None, timestep: Tensor | None, parts: int) -> Tensor | None:
    """[B] -> [B, parts, C], or None for a network that takes no timestep."""
    if embedder is None:
        return None
    assert timestep is not None
    return embedder(timestep).unflatten(-1, (parts, -1))


def _folded(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """[B, C, F, H, W] -> [B, C strides, F / s, H / s, W / s]: frame, row, column of the fold after the channel."""
    for dim in (4, 3, 2):
        x = x.unflatten(dim, (-1, stride[dim - 2]))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _unfolded(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The way back."""
    return x.unflatten(1, (-1, *stride)).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _columns_first(x: Tensor, patch: int) -> Tensor:
    """Sub-pixels of a patch with the column before the row, as the model orders them: its own inverse."""
    return x.unflatten(1, (-1, patch, patch)).transpose(2, 3).flatten(1, 3)
