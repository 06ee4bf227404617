"""The Wan 2.1 video diffusion transformer (Wan 2.1 technical report, arXiv 2503.20314, section 4.2).

Module names are the keys of the checkpoint's transformer/ folder. Refuses to know guidance, schedules, and where text
embeddings and weights come from.

Letters: B batch, C channels, F frames, H W height width of the latents, N tokens, L text tokens, D width, h heads,
d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.wan.params import TransformerParams
from vidgen.nn.attention import attention
from vidgen.nn.norms import FP32LayerNorm
from vidgen.nn.rope import Rope, grid_rope, rotate
from vidgen.parallel import IDENTITY, ContextParallel

ROPE_THETA = 10000.0
TIME_PERIOD = 10000.0


@dataclass(frozen=True, slots=True)
class TextContext:
    """Cross-attention keys and values of a batch of prompts, one [B, L, h, d] a layer each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def join(cls, contexts: Sequence[TextContext]) -> TextContext:
        """One context for a batch of items, from theirs."""
        return cls(
            keys=tuple(torch.cat(layer) for layer in zip(*(c.keys for c in contexts), strict=True)),
            values=tuple(torch.cat(layer) for layer in zip(*(c.values for c in contexts), strict=True)),
        )


class Attention(nn.Module):
    """Projections of one attention; queries and keys are normed over all heads together."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.width
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=params.eps)
        self.norm_k = nn.RMSNorm(width, eps=params.eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def key(self, x: Tensor) -> Tensor:
        return self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1))

    def value(self, x: Tensor) -> Tensor:
        return self.to_v(x).unflatten(-1, (self.heads, -1))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class GELU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        # The checkpoint counts a dropout between the two.
        self.net = nn.Sequential(GELU(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward. The residual stream keeps the dtype of the weights;
    norms, modulation and gates are fp32 and are rounded once."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width, eps = params.width, params.eps
        self.norm1 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(params)
        self.norm2 = FP32LayerNorm(width, eps) if params.cross_attn_norm else nn.Identity()
        self.attn2 = Attention(params)
        self.norm3 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, params.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self, x: Tensor, time: Tensor, rope: Rope, key: Tensor, value: Tensor, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """x [B, n, D], time [B, 6, D] fp32, rope of the n tokens, key and value [B, L, h, d] -> [B, n, D]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + time).chunk(6, dim=1)

        h = (self.norm1(x) * (1 + scale) + shift).to(x.dtype)
        q, k, v = rotate(self.attn1.query(h), rope), rotate(self.attn1.key(h), rope), self.attn1.value(h)
        h = self.attn1.out(attention(q, k, v, cp))
        x = (x.float() + h * gate).to(x.dtype)

        h = self.norm2(x).to(x.dtype)
        # Every rank holds all of the text, so there is nothing to exchange.
        x = x + self.attn2.out(attention(self.attn2.query(h), key, value))

        h = (self.norm3(x) * (1 + ffn_scale) + ffn_shift).to(x.dtype)
        return (x.float() + self.ffn(h).float() * ffn_gate).to(x.dtype)


class Projection(nn.Module):
    """Two linear layers, named as in the checkpoint."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)


class ConditionEmbedder(nn.Module):
    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.freq_dim = params.freq_dim
        self.time_embedder = Projection(params.freq_dim, params.width)
        self.time_proj = nn.Linear(params.width, params.width * 6)
        self.text_embedder = Projection(params.text_dim, params.width)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B] -> (embedding [B, D], modulation [B, 6, D]), all in fp32."""
        half = self.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(-math.log(TIME_PERIOD) / half * steps)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedding = _linear_fp32(self.time_embedder.linear_1, wave)
        embedding = _linear_fp32(self.time_embedder.linear_2, F.silu(embedding))
        return embedding, _linear_fp32(self.time_proj, F.silu(embedding)).unflatten(1, (6, -1))

    def text(self, text: Tensor) -> Tensor:
        """text [B, L, text_dim] -> [B, L, D]."""
        return self.text_embedder.linear_2(F.gelu(self.text_embedder.linear_1(text), approximate="tanh"))


class WanTransformer3DModel(nn.Module):
    """One forward predicts the flow velocity of noisy latents. Activations have the dtype of `patch_embedding`."""

    KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    """Parts of a key that keep fp32 weights when a checkpoint published in fp32 is loaded in a smaller dtype."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        patch, width = params.patch_size, params.width
        self.patch_embedding = nn.Conv3d(params.in_channels, width, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(params)
        self.blocks = nn.ModuleList([Block(params) for _ in range(params.num_layers)])
        self.norm_out = FP32LayerNorm(width, params.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, params.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def text_context(self, text: Tensor) -> TextContext:
        """text [B, L, text_dim], padded as the pipeline pads it -> keys and values of every layer, once a prompt."""
        text = self.condition_embedder.text(text.to(self.patch_embedding.weight.dtype))
        attns = [block.attn2 for block in self._blocks()]
        return TextContext(tuple(a.key(text) for a in attns), tuple(a.value(text) for a in attns))

    def forward(
        self, latents: Tensor, timestep: Tensor, context: TextContext, cp: ContextParallel = IDENTITY
    ) -> Tensor:
        """latents [B, C, F, H, W], timestep [B] in [0, 1000] and never in bf16 -> velocity [B, C, F, H, W].

        F, H, W are multiples of the patch. With a gang, latents and result are whole on every rank.
        """
        grid = self._grid(latents)
        rope = grid_rope(grid, self._rope_dims(), ROPE_THETA, latents.device)
        embedding, time = self.condition_embedder.time(timestep)

        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x, rope = cp.shard(x), (cp.shard(rope[0]), cp.shard(rope[1]))
        for block, key, value in zip(self._blocks(), context.keys, context.values, strict=True):
            x = block(x, time, rope, key, value, cp)

        shift, scale = (self.scale_shift_table.float() + embedding.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(x.dtype))
        return self._unpatchify(cp.gather(x, math.prod(grid)), grid)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        sizes, patch = tuple(latents.shape[2:]), self.params.patch_size
        if any(size % step for size, step in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of {sizes} frames x height x width are not multiples of the patch {patch}")
        frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        return frames, height, width

    def _rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that encode frame, row and column: a third each, the remainder to the frame."""
        size = self.params.attention_head_dim
        third = 2 * (size // 6)
        return size - 2 * third, third, third

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, patch C] -> [B, C, F, H, W]; within a token the channel runs fastest."""
        x = x.unflatten(2, (*self.params.patch_size, -1)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # B, C, frames, p_t, rows, p_h, columns, p_w
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
