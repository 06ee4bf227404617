"""The LTX-Video diffusion transformer (HaCohen et al. 2025, LTX-Video, arXiv 2501.00103, section 2.2).

Module names are the keys of the checkpoint's transformer/ folder. Refuses to know guidance, schedules, latents that are
not packed, and where text embeddings and weights come from.

Letters: B batch, N video tokens, L text tokens, C channels, D width, h heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.ltx.params import TIME_CHANNELS, TransformerParams
from vidgen.nn.attention import attention
from vidgen.nn.feed_forward import FeedForward
from vidgen.nn.rope import Rope, rotate
from vidgen.parallel import IDENTITY, ContextParallel

ROPE_THETA = 10000.0
TIME_PERIOD = 10000.0
HEAD_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class TextContext:
    """Cross-attention keys and values of a batch of prompts, one [B, L, h, d] a layer each. `mask` [B, L] is true where
    a row is a token of its prompt, or None where all rows are."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None

    @classmethod
    def join(cls, contexts: Sequence[TextContext]) -> TextContext:
        """One context for a batch of items from theirs; shorter prompts are padded with rows that are masked."""
        lengths = [context.keys[0].shape[1] for context in contexts]
        longest = max(lengths)
        mask = None
        if min(lengths) < longest:
            shown = torch.arange(longest) < torch.tensor(lengths)[:, None]
            mask = shown.to(contexts[0].keys[0].device)
        keys = zip(*(context.keys for context in contexts), strict=True)
        values = zip(*(context.values for context in contexts), strict=True)
        return cls(
            tuple(_stack(layer, longest) for layer in keys), tuple(_stack(layer, longest) for layer in values), mask
        )


class Attention(nn.Module):
    """Projections of one attention; queries and keys are normed over all heads together."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.width
        self.heads = params.num_attention_heads
        self.norm_q = nn.RMSNorm(width, eps=HEAD_NORM_EPS)
        self.norm_k = nn.RMSNorm(width, eps=HEAD_NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def key(self, x: Tensor) -> Tensor:
        return self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1))

    def value(self, x: Tensor) -> Tensor:
        return self.to_v(x).unflatten(-1, (self.heads, -1))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text (which is neither normed nor modulated), feed-forward."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(params.width, eps=params.norm_eps, elementwise_affine=False)
        self.attn1 = Attention(params)
        self.norm2 = nn.RMSNorm(params.width, eps=params.norm_eps, elementwise_affine=False)
        self.attn2 = Attention(params)
        self.ff = FeedForward(params.width, 4 * params.width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, params.width) / params.width**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        clean: Tensor | None,
        rope: Rope,
        text: tuple[Tensor, Tensor, Tensor | None],
        cp: ContextParallel = IDENTITY,
    ) -> Tensor:
        """x [B, n, D], time [B, 1 or 2, 6, D], clean and rope of the n tokens, text (key, value, mask) -> [B, n, D]."""
        modulation = self.scale_shift_table + time
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (_of_token(m, clean) for m in modulation.unbind(dim=2))

        h = self.norm1(x) * (1 + scale) + shift
        attn = self.attn1
        h = attn.out(attention(rotate(attn.query(h), rope), rotate(attn.key(h), rope), attn.value(h), cp))
        x = x + h * gate

        key, value, mask = text
        # Every rank holds all of the text, so there is nothing to exchange.
        x = x + self.attn2.out(attention(self.attn2.query(x), key, value, mask=mask))

        h = self.norm2(x) * (1 + ff_scale) + ff_shift
        return x + self.ff(h) * ff_gate


class Projection(nn.Module):
    """Two linear layers with an activation between them, named as in the checkpoint."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)


class TimestepEmbedding(nn.Module):
    """Sinusoids of a timestep, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = Projection(TIME_CHANNELS, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep [...], in fp32 -> [..., D] in the dtype of the weights."""
        half = TIME_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float().unsqueeze(-1) * torch.exp(-math.log(TIME_PERIOD) / half * steps)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        layers = self.timestep_embedder
        return layers.linear_2(F.silu(layers.linear_1(wave.to(layers.linear_1.weight.dtype))))


class TimeModulation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = TimestepEmbedding(width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B, k] -> (embedding [B, k, D], modulation [B, k, 6, D])."""
        embedding = self.emb(timestep)
        return embedding, self.linear(F.silu(embedding)).unflatten(-1, (6, -1))


class LTXVideoTransformer3DModel(nn.Module):
    """One forward predicts the flow velocity of noisy packed latents. Activations have the dtype of the weights."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.proj_in = nn.Linear(params.in_channels, width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.time_embed = TimeModulation(width)
        self.caption_projection = Projection(params.caption_channels, width)
        self.transformer_blocks = nn.ModuleList([Block(params) for _ in range(params.num_layers)])
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, params.out_channels)

    def text_context(self, text: Tensor) -> TextContext:
        """text [B, L, caption_channels], the prompt's own tokens alone -> keys and values of every layer."""
        layers = self.caption_projection
        text = layers.linear_1(text.to(layers.linear_1.weight.dtype))
        text = layers.linear_2(F.gelu(text, approximate="tanh"))
        attns = [block.attn2 for block in self._blocks()]
        return TextContext(tuple(a.key(text) for a in attns), tuple(a.value(text) for a in attns))

    def rope(self, positions: Tensor) -> Rope:
        """positions [N, 3] (frame, row, column, each as a share of the base size) -> (cos, sin) [1, N, h, d / 2] fp32.

        The width of all heads together is divided: frequency by frequency the three axes take turns, and what is left
        over at the front turns nothing. In fp32 like the model in training: its angles reach 16,000 radians.
        """
        width, heads = self.params.width, self.params.num_attention_heads
        exponents = torch.linspace(0.0, 1.0, width // 6, dtype=torch.float32, device=positions.device)
        frequencies = ROPE_THETA**exponents * math.pi / 2.0
        angles = frequencies * (positions.float().unsqueeze(-1) * 2 - 1)
        angles = angles.transpose(-1, -2).flatten(1)
        angles = F.pad(angles, (width // 2 - angles.shape[1], 0))
        angles = angles.unflatten(-1, (heads, -1)).unsqueeze(0)
        return angles.cos(), angles.sin()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        rope: Rope,
        text: TextContext,
        clean: Tensor | None = None,
        cp: ContextParallel = IDENTITY,
    ) -> Tensor:
        """Packed latents [B, N, C], timestep [B] in [0, 1000] and never in bf16 -> velocity [B, N, C].

        `clean` [1, N, 1] is true at tokens that are told a timestep of 0 (a given image). With a gang, latents and
        result are whole on every rank.
        """
        times = timestep[:, None] if clean is None else torch.stack([timestep, torch.zeros_like(timestep)], dim=1)
        embedding, time = self.time_embed(times)

        cp = cp.over(latents.shape[1])
        x = cp.shard(self.proj_in(latents.to(self.proj_in.weight.dtype)))
        rope = (cp.shard(rope[0]), cp.shard(rope[1]))
        clean = None if clean is None else cp.shard(clean)
        for block, key, value in zip(self._blocks(), text.keys, text.values, strict=True):
            x = block(x, time, clean, rope, (key, value, text.mask), cp)

        modulation = self.scale_shift_table + embedding.unsqueeze(2)
        shift, scale = (_of_token(m, clean) for m in modulation.unbind(dim=2))
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        return cp.gather(x)

    def _blocks(self) -> list[Block]:
        return [block for block in self.transformer_blocks if isinstance(block, Block)]


def _of_token(modulation: Tensor, clean: Tensor | None) -> Tensor:
    """[B, 1 or 2, D] of the timestep and of 0 -> each token's own, [B, 1 or n, D]."""
    return modulation if clean is None else torch.where(clean, modulation[:, 1:], modulation[:, :1])


def _stack(layer: Sequence[Tensor], length: int) -> Tensor:
    return torch.cat([F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) for x in layer])
