"""The video diffusion transformer of Wan 2.1 and 2.2 (Wan 2.1 technical report, arXiv 2503.20314, section 4.2).

Module names are the keys of the checkpoint's transformer/ folder. Refuses to know guidance, schedules, which of two
experts it is, and where embeddings and weights come from.

Letters: B batch, C channels, F frames, H W height width of the latents, N tokens, n those of this rank, L text or image
tokens, T timesteps a clip (one, or one a frame), D width, h heads, d head size.
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
from vidgen.nn.feed_forward import FeedForward
from vidgen.nn.norms import FP32LayerNorm
from vidgen.nn.rope import Rope, grid_rope, rotate
from vidgen.parallel import IDENTITY, ContextParallel

ROPE_THETA = 10000.0
TIME_PERIOD = 10000.0


KeyValue = tuple[Tensor, Tensor]
"""Cross-attention keys and values of one layer, each [B, L, h, d]."""


@dataclass(frozen=True, slots=True)
class Context:
    """Cross-attention keys and values of a batch of prompts, or of its images: one [B, L, h, d] a layer each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def join(cls, contexts: Sequence[Context]) -> Context:
        """One context for a batch of items, from theirs."""
        if len(contexts) == 1:
            return contexts[0]
        return cls(
            keys=tuple(torch.cat(layer) for layer in zip(*(c.keys for c in contexts), strict=True)),
            values=tuple(torch.cat(layer) for layer in zip(*(c.values for c in contexts), strict=True)),
        )


class Attention(nn.Module):
    """Projections of one attention; queries and keys are normed over all heads together. `added` is the width of the
    image tokens that have keys and values of their own, or None."""

    def __init__(self, params: TransformerParams, added: int | None = None) -> None:
        super().__init__()
        width = params.width
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=params.eps)
        self.norm_k = nn.RMSNorm(width, eps=params.eps)
        if added is not None:
            self.add_k_proj = nn.Linear(added, width)
            self.add_v_proj = nn.Linear(added, width)
            self.norm_added_k = nn.RMSNorm(width, eps=params.eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def key(self, x: Tensor) -> Tensor:
        return self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1))

    def value(self, x: Tensor) -> Tensor:
        return self.to_v(x).unflatten(-1, (self.heads, -1))

    def image_key(self, x: Tensor) -> Tensor:
        return self.norm_added_k(self.add_k_proj(x)).unflatten(-1, (self.heads, -1))

    def image_value(self, x: Tensor) -> Tensor:
        return self.add_v_proj(x).unflatten(-1, (self.heads, -1))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to text and image, feed-forward. The residual stream keeps the dtype of the
    weights; norms, modulation and gates are fp32 and are rounded once."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width, eps = params.width, params.eps
        self.norm1 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(params)
        self.norm2 = FP32LayerNorm(width, eps) if params.cross_attn_norm else nn.Identity()
        self.attn2 = Attention(params, params.added_kv_proj_dim)
        self.norm3 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, params.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rows: Tensor | None,
        rope: Rope,
        text: KeyValue,
        image: KeyValue | None = None,
        cp: ContextParallel = IDENTITY,
    ) -> Tensor:
        """x [B, n, D], time [B, T, 6, D] fp32, rows [n] (the timestep of each token; None: T is 1 and there is one for
        all), rope of the n tokens -> [B, n, D]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + time).unbind(dim=2)

        h = (self.norm1(x) * (1 + _spread(scale, rows)) + _spread(shift, rows)).to(x.dtype)
        attn = self.attn1
        h = attn.out(attention(rotate(attn.query(h), rope), rotate(attn.key(h), rope), attn.value(h), cp))
        x = (x.float() + h * _spread(gate, rows)).to(x.dtype)

        # Every rank holds all of the text and of the image, so there is nothing to exchange.
        q = self.attn2.query(self.norm2(x).to(x.dtype))
        h = attention(q, *text)
        if image is not None:
            h = h + attention(q, *image)
        x = x + self.attn2.out(h)

        h = (self.norm3(x) * (1 + _spread(ffn_scale, rows)) + _spread(ffn_shift, rows)).to(x.dtype)
        return (x.float() + self.ffn(h).float() * _spread(ffn_gate, rows)).to(x.dtype)


class Projection(nn.Module):
    """Two linear layers, named as in the checkpoint."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)


class ImageEmbedder(nn.Module):
    """Tokens of an image encoder -> tokens of the transformer's width. First and last frame together have learned
    positions, which tell them apart."""

    def __init__(self, inputs: int, width: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(inputs)
        self.ff = FeedForward(inputs, inputs, width, F.gelu)
        self.norm2 = FP32LayerNorm(width)
        self.pos_embed = None if positions is None else nn.Parameter(torch.zeros(1, positions, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, image_dim] -> [B, L, D]"""
        x = x if self.pos_embed is None else x + self.pos_embed
        return self.norm2(self.ff(self.norm1(x).to(x.dtype))).to(x.dtype)


class ConditionEmbedder(nn.Module):
    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.freq_dim = params.freq_dim
        self.time_embedder = Projection(params.freq_dim, params.width)
        self.time_proj = nn.Linear(params.width, params.width * 6)
        self.text_embedder = Projection(params.text_dim, params.width)
        if params.image_dim is not None:
            self.image_embedder = ImageEmbedder(params.image_dim, params.width, params.pos_embed_seq_len)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [...] -> (embedding [..., D], modulation [..., 6, D]), all in fp32."""
        half = self.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[..., None] * torch.exp(-math.log(TIME_PERIOD) / half * steps)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedding = _linear_fp32(self.time_embedder.linear_1, wave)
        embedding = _linear_fp32(self.time_embedder.linear_2, F.silu(embedding))
        return embedding, _linear_fp32(self.time_proj, F.silu(embedding)).unflatten(-1, (6, -1))

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

    def text_context(self, text: Tensor) -> Context:
        """text [B, L, text_dim], padded as the pipeline pads it -> keys and values of every layer, once a prompt."""
        text = self.condition_embedder.text(text.to(self.patch_embedding.weight.dtype))
        attns = [block.attn2 for block in self._blocks()]
        return Context(tuple(a.key(text) for a in attns), tuple(a.value(text) for a in attns))

    def image_context(self, images: Tensor) -> Context:
        """images [B, L, image_dim], the encoder's tokens of one image or of first and last frame one after the other ->
        keys and values of every layer, once an item. Only checkpoints with `image_dim` look at images this way."""
        images = self.condition_embedder.image_embedder(images.to(self.patch_embedding.weight.dtype))
        attns = [block.attn2 for block in self._blocks()]
        return Context(tuple(a.image_key(images) for a in attns), tuple(a.image_value(images) for a in attns))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Context,
        image: Context | None = None,
        cp: ContextParallel = IDENTITY,
    ) -> Tensor:
        """latents [B, in_channels, F, H, W] -> velocity [B, out_channels, F, H, W].

        `timestep` is [B], or [B, F] with one for each frame of tokens; in [0, 1000] and never in bf16. F, H, W are
        multiples of the patch. With a gang, latents and result are whole on every rank.
        """
        grid = self._grid(latents)
        rope = grid_rope(grid, self._rope_dims(), ROPE_THETA, latents.device)
        rows = self._rows(timestep, grid)
        embedding, time = self.condition_embedder.time(timestep.unsqueeze(1) if rows is None else timestep)

        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        cp = cp.over(math.prod(grid))
        x, rope = cp.shard(x), (cp.shard(rope[0]), cp.shard(rope[1]))
        rows = None if rows is None else cp.shard(rows)[0]
        images = [None] * len(self.blocks) if image is None else list(zip(image.keys, image.values, strict=True))
        for block, key, value, seen in zip(self._blocks(), text.keys, text.values, images, strict=True):
            x = block(x, time, rows, rope, (key, value), seen, cp)

        shift, scale = (self.scale_shift_table.float() + embedding.unsqueeze(2)).unbind(dim=2)
        x = self.proj_out((self.norm_out(x) * (1 + _spread(scale, rows)) + _spread(shift, rows)).to(x.dtype))
        return self._unpatchify(cp.gather(x), grid)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        sizes, patch = tuple(latents.shape[2:]), self.params.patch_size
        if any(size % step for size, step in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of {sizes} frames x height x width are not multiples of the patch {patch}")
        frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        return frames, height, width

    def _rows(self, timestep: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
        """[1, N]: which of a clip's timesteps each token has; None if there is one for all."""
        if timestep.ndim == 1:
            return None
        if timestep.shape[1] != grid[0]:
            raise ValueError(f"{timestep.shape[1]} timesteps a clip; allowed: one, or one for each of {grid[0]} frames")
        frames = torch.arange(grid[0], device=timestep.device)
        return frames.repeat_interleave(grid[1] * grid[2]).unsqueeze(0)

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


def _spread(part: Tensor, rows: Tensor | None) -> Tensor:
    """A part of the modulation [B, T, D] -> what broadcasts over the tokens: as it is, or [B, n, D]."""
    return part if rows is None else part[:, rows]


def _linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
