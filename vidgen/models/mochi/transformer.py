"""The Mochi 1 video diffusion transformer: an asymmetric DiT, a wide stream for the video and a narrow one for the text
that meet in one attention a layer (Genmo, "Mochi 1: A new SOTA in open text-to-video", 2024).

Module names are the keys of the checkpoint's transformer/ folder. Refuses to know guidance, schedules, and where text
embeddings and weights come from.

Letters: B batch, C channels, F frames, H W height width of the latents, N video tokens, L text tokens, D width of the
video, T width of the text, h heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.mochi.params import POOL_HEADS, TransformerParams
from vidgen.nn.attention import Projections, joint_attention
from vidgen.nn.norms import FP32LayerNorm
from vidgen.nn.rope import Rope, rotate
from vidgen.parallel import IDENTITY, ContextParallel

TIME_PERIOD = 10000.0
BASE_AREA = 192 * 192
"""Positions are scaled as if every picture had this many tokens, so that the frequencies hold for every size."""
EPS = 1e-6
HEAD_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class TextContext:
    """A batch of prompts as the transformer sees them at every step: `pooled` [B, D] for the modulation, `caption`
    [B, L, T] for the text stream, and how many rows of each caption are its own; the others are zero."""

    pooled: Tensor
    caption: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def join(cls, contexts: Sequence[TextContext]) -> TextContext:
        """One context for a batch of items, from theirs."""
        longest = max(context.caption.shape[1] for context in contexts)
        captions = [F.pad(c.caption, (0, 0, 0, longest - c.caption.shape[1])) for c in contexts]
        lengths = tuple(length for context in contexts for length in context.lengths)
        return cls(torch.cat([context.pooled for context in contexts]), torch.cat(captions), lengths)


def rms(x: Tensor, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension: any dtype in, fp32 out."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class HeadNorm(nn.Module):
    """RMS norm of each head, with one weight for all heads; in fp32 with one rounding."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return (rms(x, HEAD_EPS) * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Projections of one joint attention. The text is lifted to the width of the video and, with `answers`, lowered
    again: the last layer only reads it."""

    def __init__(self, params: TransformerParams, answers: bool) -> None:
        super().__init__()
        width, wide, size = params.width, params.pooled_projection_dim, params.attention_head_dim
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.norm_q = HeadNorm(size)
        self.norm_k = HeadNorm(size)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.add_q_proj = nn.Linear(wide, width, bias=False)
        self.add_k_proj = nn.Linear(wide, width, bias=False)
        self.add_v_proj = nn.Linear(wide, width, bias=False)
        self.norm_added_q = HeadNorm(size)
        self.norm_added_k = HeadNorm(size)
        self.to_add_out = nn.Linear(width, wide) if answers else nn.Identity()

    def video(self, x: Tensor, rope: Rope) -> Projections:
        """x [B, n, D] -> turned queries and keys, and values, each [B, n, h, d]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        return rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope), v

    def text(self, y: Tensor) -> Projections:
        """y [B, L, T] -> queries, keys and values, each [B, L, h, d]. Text has no positions."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.silu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        # The checkpoint counts a dropout between the two.
        self.net = nn.Sequential(SwiGLU(width, inner), nn.Identity(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Modulation(nn.Module):
    """Four factors of a stream from the time and the caption: scale and gate of its attention, then of its
    feed-forward. The name of the layer is the checkpoint's."""

    def __init__(self, width: int, stream: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * stream)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """time [B, D] -> scale, gate, scale, gate, each [B, 1, stream] in fp32; the gates lie within (-1, 1)."""
        scale, gate, ffn_scale, ffn_gate = self.linear(F.silu(time)).float().unsqueeze(1).chunk(4, dim=-1)
        return 1 + scale, gate.tanh(), 1 + ffn_scale, ffn_gate.tanh()


class LastModulation(nn.Module):
    """Of the text in the last layer, which only reads it: one scale."""

    def __init__(self, width: int, stream: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, stream)

    def forward(self, time: Tensor) -> Tensor:
        """time [B, D] -> scale [B, 1, stream] in fp32."""
        return 1 + self.linear_1(F.silu(time)).float().unsqueeze(1)


class Block(nn.Module):
    """Joint attention of video and text, then a feed-forward for each. A branch is normed on its way in and on its way
    out. Norms, modulation and gates are fp32 and are rounded once."""

    def __init__(self, params: TransformerParams, last: bool) -> None:
        super().__init__()
        width, wide = params.width, params.pooled_projection_dim
        self.norm1 = Modulation(width, width)
        self.norm1_context = LastModulation(width, wide) if last else Modulation(width, wide)
        self.attn1 = Attention(params, answers=not last)
        self.ff = FeedForward(width, params.ffn_dim)
        self.ff_context = None if last else FeedForward(wide, params.text_ffn_dim)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        time: Tensor,
        rope: Rope,
        lengths: Sequence[int],
        cp: ContextParallel = IDENTITY,
    ) -> tuple[Tensor, Tensor]:
        """x [B, n, D], y [B, L, T], time [B, D], rope of the n tokens -> (x, y); the last block leaves y as it is."""
        scale, gate, ffn_scale, ffn_gate = self.norm1(time)
        if self.ff_context is None:
            text_scale = self.norm1_context(time)
        else:
            text_scale, text_gate, text_ffn_scale, text_ffn_gate = self.norm1_context(time)

        text = self.attn1.text((rms(y) * text_scale).to(y.dtype))
        seen, read = joint_attention(self.attn1.video((rms(x) * scale).to(x.dtype), rope), text, lengths, cp)

        x = (x + rms(self.attn1.to_out[0](seen.flatten(2))) * gate).to(x.dtype)
        x = (x + rms(self.ff((rms(x) * ffn_scale).to(x.dtype))) * ffn_gate).to(x.dtype)
        if self.ff_context is not None:
            y = (y + rms(self.attn1.to_add_out(read.flatten(2))) * text_gate).to(y.dtype)
            y = (y + rms(self.ff_context((rms(y) * text_ffn_scale).to(y.dtype))) * text_ffn_gate).to(y.dtype)
        return x, y


class Projection(nn.Module):
    """Two linear layers, named as in the checkpoint."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class AttentionPool(nn.Module):
    """A caption as one vector: the mean of its tokens attends to itself and to them."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        embed = params.text_embed_dim
        self.to_kv = nn.Linear(embed, 2 * embed)
        self.to_q = nn.Linear(embed, embed)
        self.to_out = nn.Linear(embed, params.width)

    def forward(self, text: Tensor) -> Tensor:
        """text [B, L, E], no padding -> [B, D]. The mean of no tokens is zero."""
        mean = text.sum(dim=1, keepdim=True) / max(text.shape[1], 1)
        k, v = self.to_kv(torch.cat([mean, text], dim=1)).unflatten(-1, (2, POOL_HEADS, -1)).unbind(2)
        q = self.to_q(mean).unflatten(-1, (POOL_HEADS, -1))
        pooled = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out(pooled.squeeze(2).flatten(1))


class TimeEmbed(nn.Module):
    """The time and the caption as one vector, and the caption as the text stream begins with it."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.dim = params.time_embed_dim
        self.timestep_embedder = Projection(params.time_embed_dim, params.width)
        self.pooler = AttentionPool(params)
        self.caption_proj = nn.Linear(params.text_embed_dim, params.pooled_projection_dim)

    def time(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> [B, D]; the waves are computed in fp32."""
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(-math.log(TIME_PERIOD) * steps / half)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.timestep_embedder(wave.to(self.caption_proj.weight.dtype))


class PatchEmbed(nn.Module):
    """Patches of each frame by itself."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        patch = params.patch_size
        self.proj = nn.Conv2d(params.in_channels, params.width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, H, W] -> tokens [B, N, D], frame by frame, row by row."""
        frames = self.proj(latents.transpose(1, 2).flatten(0, 1))
        return frames.flatten(2).transpose(1, 2).unflatten(0, (latents.shape[0], -1)).flatten(1, 2)


class OutputNorm(nn.Module):
    """Layer norm, scaled and shifted by the time and the caption; in fp32 with one rounding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = FP32LayerNorm(width, EPS, elementwise_affine=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(time)).float().unsqueeze(1).chunk(2, dim=-1)
        return (self.norm(x) * (1 + scale) + shift).to(x.dtype)


class MochiTransformer3DModel(nn.Module):
    """One forward predicts the direction from noise to picture. Activations have the dtype of `proj_out`."""

    KEEP_FP32 = ("pos_frequencies", "norm_q", "norm_k", "norm_added_q", "norm_added_k")
    """Parts of a key that keep fp32 weights when a checkpoint published in fp32 is loaded in a smaller dtype: those
    that Mochi's authors ask to keep so. Angles are up to a hundred radians."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        heads, half, count = params.num_attention_heads, params.attention_head_dim // 2, params.num_layers
        self.patch_embed = PatchEmbed(params)
        self.time_embed = TimeEmbed(params)
        self.pos_frequencies = nn.Parameter(torch.zeros(3, heads, half))
        self.transformer_blocks = nn.ModuleList([Block(params, last=i == count - 1) for i in range(count)])
        self.norm_out = OutputNorm(params.width)
        self.proj_out = nn.Linear(params.width, params.patch_size**2 * params.out_channels)

    def text_context(self, text: Tensor) -> TextContext:
        """text [1, L, E] of one prompt, without padding -> what every step needs of it. L may be 0."""
        text = text.to(self.proj_out.weight.dtype)
        return TextContext(self.time_embed.pooler(text), self.time_embed.caption_proj(text), (text.shape[1],))

    def forward(
        self, latents: Tensor, timestep: Tensor, context: TextContext, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """latents [B, C, F, H, W], timestep [B] in [0, 1000], 0 being noise, and never in bf16 -> [B, C, F, H, W].

        H and W are multiples of the patch. With a gang, latents and result are whole on every rank.
        """
        grid = self._grid(latents)
        rope = self._rope(grid)
        time = self.time_embed.time(timestep) + context.pooled

        x, y = self.patch_embed(latents.to(self.proj_out.weight.dtype)), context.caption
        cp = cp.over(math.prod(grid))
        x, rope = cp.shard(x), (cp.shard(rope[0]), cp.shard(rope[1]))
        for block in self.transformer_blocks:
            x, y = block(x, y, time, rope, context.lengths, cp)

        x = self.proj_out(self.norm_out(x, time))
        return self._unpatchify(cp.gather(x), grid)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        frames, height, width = latents.shape[2:]
        patch = self.params.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} are not multiples of the patch {patch}")
        return frames, height // patch, width // patch

    def _rope(self, grid: tuple[int, int, int]) -> Rope:
        """(cos, sin) of every token and head, each [1, N, h, d / 2] in fp32, from learned frequencies.

        Frames count from 0; rows and columns are measured from the middle of a picture of `BASE_AREA`.
        """
        frames, height, width = grid
        device = self.pos_frequencies.device
        scale = (BASE_AREA / (height * width)) ** 0.5
        axes = (
            torch.arange(frames, dtype=torch.float32, device=device),
            *(_centres(size, scale, device) for size in (height, width)),
        )
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        # Products and sums rather than a matrix product, which some GPUs round to ten bits.
        angle = sum(p[:, None, None] * f for p, f in zip(positions, self.pos_frequencies.float(), strict=True))
        assert isinstance(angle, Tensor)
        return angle.cos()[None], angle.sin()[None]

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, patch C] -> [B, C, F, H, W]; within a token the channel runs fastest."""
        patch = self.params.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, grid)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # B, C, frames, rows, p_h, columns, p_w
        return x.flatten(5, 6).flatten(3, 4)


def _centres(size: int, scale: float, device: torch.device) -> Tensor:
    """Middles of `size` cells of width `scale` around 0, fp32."""
    edges = torch.linspace(-size * scale / 2, size * scale / 2, size + 1, dtype=torch.float32, device=device)
    return (edges[:-1] + edges[1:]) / 2
