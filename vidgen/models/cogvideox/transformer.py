"""The CogVideoX video diffusion transformer (CogVideoX, arXiv 2408.06072, section 2.2), versions 1.0 and 1.5.

Module names are the keys of the checkpoint's transformer/ folder. Refuses to know guidance, schedules, and where text
embeddings and weights come from.

Letters: B batch, F frames, C channels, H W height width of the latents, N tokens, L text tokens, D width, T width of
the time embedding, h heads, d head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.cogvideox.params import TransformerParams
from vidgen.nn.attention import Projections, joint_attention
from vidgen.nn.feed_forward import FeedForward
from vidgen.nn.rope import Rope, rotate
from vidgen.parallel import IDENTITY, ContextParallel

PERIOD = 10000.0
"""Of time embeddings, rotary and sinusoidal positions alike."""
QK_EPS = 1e-6
OFS = 2.0
"""What the image-to-video pipeline of 1.5 tells the transformer as `ofs`, always."""

Grid = tuple[int, int, int]
"""Patches along frames, height and width."""


class Attention(nn.Module):
    """Projections shared by video and text tokens; queries and keys are normed a head at a time."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width, size, bias = params.width, params.attention_head_dim, params.attention_bias
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.LayerNorm(size, eps=QK_EPS)
        self.norm_k = nn.LayerNorm(size, eps=QK_EPS)

    def project(self, x: Tensor, rope: Rope | None = None) -> Projections:
        """x [B, n, D] -> queries, keys and values [B, n, h, d], the first two turned by `rope`."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class LayerNormZero(nn.Module):
    """One norm for video and text, each with its own shift, scale and gate from the time embedding."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.linear = nn.Linear(params.time_embed_dim, 6 * params.width)
        self.norm = nn.LayerNorm(params.width, eps=params.norm_eps)

    def forward(self, video: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(video [B, n, D], text [B, L, D], time [B, T]) -> (video, text, gate of video, gate of text [B, 1, D])."""
        shift, scale, gate, text_shift, text_scale, text_gate = self.linear(F.silu(time))[:, None].chunk(6, dim=-1)
        video = self.norm(video) * (1 + scale) + shift
        text = self.norm(text) * (1 + text_scale) + text_shift
        return video, text, gate, text_gate


class Block(nn.Module):
    """Joint attention of video and text, then one feed-forward for both, in the dtype of the weights throughout."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.norm1 = LayerNormZero(params)
        self.attn1 = Attention(params)
        self.norm2 = LayerNormZero(params)
        self.ff = FeedForward(params.width, 4 * params.width)

    def forward(
        self, video: Tensor, text: Tensor, time: Tensor, rope: Rope | None, cp: ContextParallel = IDENTITY
    ) -> tuple[Tensor, Tensor]:
        """video [B, n, D], text [B, L, D], time [B, T], rope of the n tokens -> (video, text)."""
        x, y, gate, text_gate = self.norm1(video, text, time)
        x, y = joint_attention(self.attn1.project(x, rope), self.attn1.project(y), cp=cp)
        video, text = video + gate * self.attn1.out(x), text + text_gate * self.attn1.out(y)

        x, y, gate, text_gate = self.norm2(video, text, time)
        return video + gate * self.ff(x), text + text_gate * self.ff(y)


class PatchEmbed(nn.Module):
    """Patches and prompts to tokens. 1.0 stores its projection as a convolution, 1.5 as a matrix."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        size, width = params.patch_size, params.width
        if params.patch_size_t is None:
            self.proj: nn.Module = nn.Conv2d(params.in_channels, width, size, stride=size, bias=params.patch_bias)
        else:
            self.proj = nn.Linear(params.in_channels * params.patch_volume, width)
        self.text_proj = nn.Linear(params.text_embed_dim, width)
        if params.use_learned_positional_embeddings:
            tokens = params.max_text_seq_length + math.prod(params.trained_grid)
            self.register_buffer("pos_embedding", torch.zeros(1, tokens, width))

    def patches(self, x: Tensor) -> Tensor:
        """Patches [B, N, C p_t p p], the channel slowest -> tokens [B, N, D]."""
        weight, bias = self.proj.weight, self.proj.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return F.linear(x, weight.flatten(1), bias)


class Embedding(nn.Module):
    """A number's waves through two linear layers, named as in the checkpoint."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, number: Tensor) -> Tensor:
        """number [B] fp32 -> [B, T] in the dtype of the weights; the waves are fp32."""
        half = self.linear_1.in_features // 2
        steps = torch.arange(half, dtype=torch.float32, device=number.device)
        angle = number.float()[:, None] * torch.exp(-math.log(PERIOD) * steps / half)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(wave.to(self.linear_1.weight.dtype))))


class NormOut(nn.Module):
    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.linear = nn.Linear(params.time_embed_dim, 2 * params.width)
        self.norm = nn.LayerNorm(params.width, eps=params.norm_eps)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(time))[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXTransformer3DModel(nn.Module):
    """One forward predicts what the checkpoint's scheduler says (v, in all published ones) of noisy latents.

    Everything runs in the dtype of the weights; the published 2B is fp16 and keeps nothing in fp32.
    """

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        self.patch_embed = PatchEmbed(params)
        self.time_embedding = Embedding(params.width, params.time_embed_dim)
        size = params.ofs_embed_dim
        self.ofs_embedding = Embedding(size, size) if size else None
        self.transformer_blocks = nn.ModuleList([Block(params) for _ in range(params.num_layers)])
        self.norm_final = nn.LayerNorm(params.width, eps=params.norm_eps)
        self.norm_out = NormOut(params)
        self.proj_out = nn.Linear(params.width, params.out_channels * params.patch_volume)

    def text_tokens(self, text: Tensor) -> Tensor:
        """Embeddings [B, L, text_embed_dim] of padded prompts -> tokens [B, L, D], once a prompt."""
        text = self.patch_embed.text_proj(text.to(self.proj_out.weight.dtype))
        if not self.params.use_learned_positional_embeddings:
            return text
        return text + self._learned()[:, : self.params.max_text_seq_length].to(text.dtype)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, cp: ContextParallel = IDENTITY) -> Tensor:
        """latents [B, F, C, H, W], timestep [B] in [0, 1000), text of `text_tokens` -> prediction [B, F, C', H, W].

        C is in_channels (latents, then those of the image) and C' out_channels. F, H, W are multiples of the patch;
        with learned positions they are the size the model was trained on. With a gang, latents and result are whole on
        every rank.
        """
        p, grid = self.params, self._grid(latents)
        time = self.time_embedding(timestep)
        if self.ofs_embedding is not None:
            time = time + self.ofs_embedding(timestep.new_full((1,), OFS, dtype=torch.float32))

        video = self.patch_embed.patches(patchify(latents.to(self.proj_out.weight.dtype), p.depth, p.patch_size))
        if p.use_learned_positional_embeddings:
            video = video + self._learned()[:, p.max_text_seq_length :].to(video.dtype)
        elif not p.use_rotary_positional_embeddings:
            video = video + sincos_positions(p, grid, video)
        rope = rotary_positions(p, grid, latents.device) if p.use_rotary_positional_embeddings else None

        cp = cp.over(math.prod(grid))
        video, rope = cp.shard(video), None if rope is None else (cp.shard(rope[0]), cp.shard(rope[1]))
        for block in self.transformer_blocks:
            video, text = block(video, text, time, rope, cp)
        video = self.proj_out(self.norm_out(self.norm_final(video), time))
        return unpatchify(cp.gather(video), grid, p.depth, p.patch_size)

    def _learned(self) -> Tensor:
        return self.patch_embed.get_buffer("pos_embedding")

    def _grid(self, latents: Tensor) -> Grid:
        p = self.params
        sizes, patch = (latents.shape[1], *latents.shape[3:]), (p.depth, p.patch_size, p.patch_size)
        if any(size % step for size, step in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of {sizes} frames x height x width are not multiples of the patch {patch}")
        frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        if p.use_learned_positional_embeddings and (frames, height, width) != p.trained_grid:
            raise ValueError(f"a grid of {(frames, height, width)} patches; learned positions are for {p.trained_grid}")
        return frames, height, width


def patchify(x: Tensor, depth: int, size: int) -> Tensor:
    """[B, F, C, H, W] -> [B, N, C p_t p p]."""
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size)).unflatten(1, (-1, depth))
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # B, frames, rows, columns, C, p_t, p_h, p_w


def unpatchify(x: Tensor, grid: Grid, depth: int, size: int) -> Tensor:
    """[B, N, C p_t p p] -> [B, F, C, H, W]."""
    x = x.unflatten(2, (-1, depth, size, size)).unflatten(1, grid)
    x = x.permute(0, 1, 5, 4, 2, 6, 3, 7)  # B, frames, p_t, C, rows, p_h, columns, p_w
    return x.flatten(6, 7).flatten(4, 5).flatten(1, 2)


def rotary_positions(params: TransformerParams, grid: Grid, device: torch.device) -> Rope:
    """(cos, sin) [1, N, 1, d / 2] fp32: a quarter of the head's channels for the frame, three eighths each for row and
    column. 1.0 stretches the picture's grid into the box in which the trained one would hold it; 1.5 counts. Angles
    are fp32, as the reference has them."""
    frames, height, width = grid
    (top, bottom), (left, right) = (0.0, height), (0.0, width)
    if params.patch_size_t is None:
        (top, bottom), (left, right) = fitted_box(grid[1:], params.trained_grid[1:])
    size = params.attention_head_dim
    axes = (
        (_evenly(0.0, frames, frames, device), size // 4, (frames, 1, 1)),
        (_evenly(top, bottom, height, device), size // 8 * 3, (1, height, 1)),
        (_evenly(left, right, width, device), size // 8 * 3, (1, 1, width)),
    )
    angles = []
    for positions, channels, shape in axes:
        exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        angles.append(torch.outer(positions, 1.0 / PERIOD**exponent).view(*shape, -1))
    cos, sin = ([wave(angle).expand(*grid, -1) for angle in angles] for wave in (torch.cos, torch.sin))
    return torch.cat(cos, dim=-1).flatten(0, 2)[None, :, None], torch.cat(sin, dim=-1).flatten(0, 2)[None, :, None]


def fitted_box(grid: tuple[int, int], trained: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) of a grid of (height, width) scaled to fit into the trained one, centred and
    rounded."""
    (height, width), (most_height, most_width) = grid, trained
    if height / width > most_height / most_width:
        fitted = (most_height, round(most_height / height * width))
    else:
        fitted = (round(most_width / width * height), most_width)
    top, left = round((most_height - fitted[0]) / 2.0), round((most_width - fitted[1]) / 2.0)
    return (top, top + fitted[0]), (left, left + fitted[1])


def sincos_positions(params: TransformerParams, grid: Grid, like: Tensor) -> Tensor:
    """Sinusoidal positions [1, N, D] (the 2B), computed in float64 and given in dtype and place of `like`: a quarter of
    the width for the frame, then three eighths each for column and row, divided by the interpolation scales."""
    frames, height, width = grid
    space, time, total = params.spatial_interpolation_scale, params.temporal_interpolation_scale, params.width
    axes = (
        (frames, time, total // 4, (frames, 1, 1)),
        (width, space, total // 8 * 3, (1, 1, width)),
        (height, space, total // 8 * 3, (1, height, 1)),
    )
    waves = []
    for count, scale, channels, shape in axes:
        omega = 1.0 / PERIOD ** (torch.arange(channels // 2, dtype=torch.float64, device=like.device) / (channels / 2))
        angle = torch.outer((torch.arange(count, dtype=torch.float32, device=like.device) / scale).double(), omega)
        wave = torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)
        waves.append(wave.view(*shape, -1).expand(*grid, -1))
    return torch.cat(waves, dim=-1).flatten(0, 2)[None]


def _evenly(start: float, stop: float, count: int, device: torch.device) -> Tensor:
    """`count` positions from `start` on, evenly spaced, the next of which would be `stop`."""
    last = stop * (count - 1) / count
    return torch.linspace(start, last, count, dtype=torch.float32, device=device)
