"""The video diffusion transformer of Allegro (Zhou et al. 2024, arXiv 2410.15458, section 4.2).

Module names are the keys of the checkpoint's transformer/ folder. Refuses to know guidance, schedules, and where
embeddings and weights come from.

Letters: B batch, C channels, F frames, H W height width of the latents, N tokens, n those of this rank, L text tokens,
D width, h heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.allegro.params import TransformerParams
from vidgen.nn.attention import attention
from vidgen.nn.feed_forward import FeedForward
from vidgen.nn.norms import FP32LayerNorm
from vidgen.parallel import IDENTITY, ContextParallel

ROPE_THETA = 10000.0
TIME_CHANNELS = 256
TIME_PERIOD = 10000.0
OUT_NORM_EPS = 1e-6

Rope = tuple[Tensor, Tensor]
"""(cos, sin) of each token's angles: [1, n, 1, 3, d / 6] fp32, the 3 being frame, row and column."""


@dataclass(frozen=True, slots=True)
class TextContext:
    """Cross-attention keys and values of a batch of prompts, one [B, L, h, d] a layer each. `mask` [B, L] is true where
    a row is a token of its prompt, or None where all rows are."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None


class Attention(nn.Module):
    """Projections of one attention; queries and keys are not normed."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.width
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def query(self, x: Tensor) -> Tensor:
        return self.to_q(x).unflatten(-1, (self.heads, -1))

    def key(self, x: Tensor) -> Tensor:
        return self.to_k(x).unflatten(-1, (self.heads, -1))

    def value(self, x: Tensor) -> Tensor:
        return self.to_v(x).unflatten(-1, (self.heads, -1))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text (which is neither normed nor modulated), feed-forward. The residual
    stream keeps the dtype of the weights; norms, modulation and gates are fp32 and are rounded once."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width, eps = params.width, params.norm_eps
        self.norm1 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(params)
        self.attn2 = Attention(params)
        self.norm2 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.ff = FeedForward(width, 4 * width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rope: Rope,
        text: tuple[Tensor, Tensor, Tensor | None],
        cp: ContextParallel = IDENTITY,
    ) -> Tensor:
        """x [B, n, D], time [B, 6, D] fp32, rope of the n tokens, text (keys, values, mask) -> [B, n, D]."""
        modulation = (self.scale_shift_table.float() + time).unsqueeze(2)  # [B, 6, 1, D]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(dim=1)

        h = (self.norm1(x) * (1 + scale) + shift).to(x.dtype)
        attn = self.attn1
        h = attn.out(attention(rotate(attn.query(h), rope), rotate(attn.key(h), rope), attn.value(h), cp))
        x = (x.float() + h * gate).to(x.dtype)

        key, value, mask = text
        # Every rank holds all of the text, so there is nothing to exchange.
        x = x + self.attn2.out(attention(self.attn2.query(x), key, value, mask=mask))

        h = (self.norm2(x) * (1 + ff_scale) + ff_shift).to(x.dtype)
        return (x.float() + self.ff(h) * ff_gate).to(x.dtype)


class Projection(nn.Module):
    """Two linear layers, named as in the checkpoint."""

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
        """timestep [B] -> [B, D], all in fp32."""
        half = TIME_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(-math.log(TIME_PERIOD) / half * steps)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        layers = self.timestep_embedder
        return _linear_fp32(layers.linear_2, F.silu(_linear_fp32(layers.linear_1, wave)))


class TimeModulation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = TimestepEmbedding(width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B] -> (embedding [B, D], modulation [B, 6, D]), all in fp32."""
        embedding = self.emb(timestep)
        return embedding, _linear_fp32(self.linear, F.silu(embedding)).unflatten(-1, (6, -1))


class PatchEmbedding(nn.Module):
    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        patch = params.patch_size
        self.proj = nn.Conv2d(params.in_channels, params.width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, N, D], frame by frame and row by row."""
        frames = latents.transpose(1, 2).flatten(0, 1)
        return self.proj(frames).flatten(2).transpose(1, 2).reshape(latents.shape[0], -1, self.proj.out_channels)


class AllegroTransformer3DModel(nn.Module):
    """One forward predicts what the scheduler's prediction type says, of latents scaled to preserve variance.
    Activations have the dtype of `pos_embed`."""

    KEEP_FP32 = ("adaln_single", "scale_shift_table")
    """Parts of a key that keep fp32 weights when a checkpoint published in fp32 is loaded in a smaller dtype."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.pos_embed = PatchEmbedding(params)
        self.transformer_blocks = nn.ModuleList([Block(params) for _ in range(params.num_layers)])
        self.norm_out = FP32LayerNorm(width, OUT_NORM_EPS, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, params.patch_size**2 * params.out_channels)
        self.adaln_single = TimeModulation(width)
        self.caption_projection = Projection(params.caption_channels, width)

    def text_context(self, text: Tensor, mask: Tensor | None = None) -> TextContext:
        """text [B, L, caption_channels] -> keys and values of every layer, once a prompt. `mask` [B, L] is true at a
        prompt's own tokens; None if all are."""
        layers = self.caption_projection
        text = layers.linear_1(text.to(layers.linear_1.weight.dtype))
        text = layers.linear_2(F.gelu(text, approximate="tanh"))
        attns = [block.attn2 for block in self._blocks()]
        return TextContext(tuple(a.key(text) for a in attns), tuple(a.value(text) for a in attns), mask)

    def forward(self, latents: Tensor, timestep: Tensor, text: TextContext, cp: ContextParallel = IDENTITY) -> Tensor:
        """latents [B, in_channels, F, H, W] -> prediction [B, out_channels, F, H, W].

        `timestep` is [B], in [0, 1000), not necessarily whole and never in bf16. H and W are multiples of the patch.
        With a gang, latents and result are whole on every rank.
        """
        grid = self._grid(latents)
        rope = self._rope(grid, latents.device)
        embedding, time = self.adaln_single(timestep)

        x = self.pos_embed(latents.to(self.pos_embed.proj.weight.dtype))
        cp = cp.over(math.prod(grid))
        x, rope = cp.shard(x), (cp.shard(rope[0]), cp.shard(rope[1]))
        for block, key, value in zip(self._blocks(), text.keys, text.values, strict=True):
            x = block(x, time, rope, (key, value, text.mask), cp)

        shift, scale = (self.scale_shift_table.float() + embedding.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(x.dtype))
        return self._unpatchify(cp.gather(x), grid)

    def _blocks(self) -> Iterator[Block]:
        return (block for block in self.transformer_blocks if isinstance(block, Block))

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        frames, height, width = latents.shape[2:]
        patch = self.params.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} (height x width) are not multiples of the patch, {patch}")
        return frames, height // patch, width // patch

    def _rope(self, grid: tuple[int, int, int], device: torch.device) -> Rope:
        """Each token's angles, from positions divided by the interpolation scale of their axis; in float64."""
        p = self.params
        scales = (p.interpolation_scale_t, p.interpolation_scale_h, p.interpolation_scale_w)
        third = p.attention_head_dim // 3
        exponent = torch.arange(0, third, 2, dtype=torch.float64, device=device) / third
        positions = [
            torch.arange(size, dtype=torch.float64, device=device) / scale
            for size, scale in zip(grid, scales, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*positions, indexing="ij"), dim=-1).flatten(0, 2)
        angles = (places[..., None] / ROPE_THETA**exponent)[None, :, None]
        return angles.cos().float(), angles.sin().float()

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, patch C] -> [B, C, F, H, W]; within a token the channel runs fastest."""
        patch = self.params.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, grid)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # B, C, frames, rows, p_h, columns, p_w
        return x.flatten(5, 6).flatten(3, 4)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, n, h, d]: in each third of a head, channel i is turned together with channel i + d / 6 (Su et al. 2021,
    eq. 34, with the two halves of the third as the pairs); in fp32 with one rounding."""
    cos, sin = rope
    first, second = x.float().unflatten(-1, (3, 2, -1)).unbind(-2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-3).to(x.dtype)


def _linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())
