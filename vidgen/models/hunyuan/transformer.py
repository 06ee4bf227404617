"""The video diffusion transformer of HunyuanVideo (arXiv 2412.03603, section 4.2).

Video and text run in streams with weights of their own (dual blocks), then through one set of weights (single blocks);
in both they attend together. Module names are the keys of the checkpoint's transformer/ folder. Text comes at its true
length, so that attention needs no mask. Refuses to know schedules, prompts, and where embeddings and weights come from.

Letters: B batch, C channels, F frames, H W height width of the latents, N video tokens, n those of this rank, L text
tokens, D width, h heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.hunyuan.params import REPLACE, TransformerParams
from vidgen.nn.attention import Projections, attention, joint_attention
from vidgen.nn.feed_forward import FeedForward, gelu
from vidgen.nn.rope import Rope, grid_rope, rotate
from vidgen.parallel import IDENTITY, ContextParallel

TIME_CHANNELS = 256
TIME_PERIOD = 10000.0
EPS = 1e-6
REFINER_RATIO = 4


@dataclass(frozen=True, slots=True)
class TextContext:
    """What a batch of prompts is before the timestep is known: `tokens` [B, L, D], of which those beyond an item's
    `lengths` are padding; `summary` [B, D] of their mean, for the refiner; `pooled` [B, D] of CLIP's vector."""

    tokens: Tensor
    summary: Tensor
    pooled: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def join(cls, contexts: Sequence[TextContext]) -> TextContext:
        """One context for a batch of items, from theirs."""
        lengths = tuple(length for c in contexts for length in c.lengths)
        longest = max(lengths)
        return cls(
            tokens=torch.cat([F.pad(c.tokens, (0, 0, 0, longest - c.tokens.shape[1])) for c in contexts]),
            summary=torch.cat([c.summary for c in contexts]),
            pooled=torch.cat([c.pooled for c in contexts]),
            lengths=lengths,
        )

    def mask(self) -> Tensor | None:
        """[B, L], true at an item's own tokens; None where there is no padding."""
        longest = self.tokens.shape[1]
        if all(length == longest for length in self.lengths):
            return None
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.arange(longest, device=self.tokens.device) < lengths[:, None]


@dataclass(frozen=True, slots=True)
class Modulation:
    """Shifts, scales and gates of a block, [B, parts, D]. Where the first frame is given, its tokens, the `first` of
    this rank's, have their own: `still`, made for a timestep of 0."""

    rows: Tensor
    still: Tensor | None = None
    first: int = 0

    def scaled(self, x: Tensor, shift: int, scale: int) -> Tensor:
        return self._each(x, lambda part, rows: part * (1 + rows[:, scale, None]) + rows[:, shift, None])

    def gated(self, x: Tensor, gate: int) -> Tensor:
        return self._each(x, lambda part, rows: part * rows[:, gate, None])

    def _each(self, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if self.still is None or self.first == 0:
            return change(x, self.rows)
        return torch.cat([change(x[:, : self.first], self.still), change(x[:, self.first :], self.rows)], dim=1)


@dataclass(frozen=True, slots=True)
class Moment:
    """The conditioning vector of a step, [B, D]; where the first frame is given, also that of its `first` tokens."""

    vector: Tensor
    still: Tensor | None = None
    first: int = 0


class AdaNorm(nn.Module):
    """A layer norm without weights, and `parts` modulations made from the step's vector."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def modulation(self, moment: Moment) -> Modulation:
        still = None if moment.still is None else self._rows(moment.still)
        return Modulation(self._rows(moment.vector), still, moment.first)

    def _rows(self, vector: Tensor) -> Tensor:
        return self.linear(F.silu(vector)).unflatten(-1, (self.parts, -1))


class Attention(nn.Module):
    """Projections of one attention, and with `added` those of a text stream of its own; queries and keys are normed a
    head. `ends`: whether results are projected here."""

    def __init__(self, params: TransformerParams, added: bool, ends: bool) -> None:
        super().__init__()
        width, size = params.width, params.attention_head_dim
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(size, eps=EPS)
        self.norm_k = nn.RMSNorm(size, eps=EPS)
        if added:
            self.add_q_proj = nn.Linear(width, width)
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.norm_added_q = nn.RMSNorm(size, eps=EPS)
            self.norm_added_k = nn.RMSNorm(size, eps=EPS)
            self.to_add_out = nn.Linear(width, width)
        if ends:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def project(self, x: Tensor, rope: Rope | None = None) -> Projections:
        """[B, tokens, D] -> queries, keys and values of the video stream, or of both where they share weights."""
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def project_text(self, c: Tensor) -> Projections:
        """The same of the text stream."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(c).unflatten(2, (self.heads, -1)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v


class DualBlock(nn.Module):
    """Video and text with weights of their own, and one attention over both. Parts of a modulation: shift, scale and
    gate of the attention, then of the feed-forward."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.norm1 = AdaNorm(params.width, 6)
        self.norm1_context = AdaNorm(params.width, 6)
        self.attn = Attention(params, added=True, ends=True)
        self.ff = FeedForward(params.width, params.ffn_dim)
        self.ff_context = FeedForward(params.width, params.ffn_dim)

    def forward(
        self, x: Tensor, c: Tensor, moment: Moment, rope: Rope, lengths: Sequence[int], cp: ContextParallel
    ) -> tuple[Tensor, Tensor]:
        """x [B, n, D] video, c [B, L, D] text -> the same after the block."""
        video, text = self.norm1.modulation(moment), self.norm1_context.modulation(Moment(moment.vector))
        q = self.attn.project_text(text.scaled(_norm(c), 0, 1))
        seen, read = joint_attention(self.attn.project(video.scaled(_norm(x), 0, 1), rope), q, lengths, cp)
        x = x + video.gated(self.attn.to_out[0](seen.flatten(2)), 2)
        c = c + text.gated(self.attn.to_add_out(read.flatten(2)), 2)
        x = x + video.gated(self.ff(video.scaled(_norm(x), 3, 4)), 5)
        c = c + text.gated(self.ff_context(text.scaled(_norm(c), 3, 4)), 5)
        return x, c


class SingleBlock(nn.Module):
    """Video and text with the same weights; attention and feed-forward side by side, with one projection and one gate
    at their end. Parts of a modulation: shift, scale, gate."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.attn = Attention(params, added=False, ends=False)
        self.norm = AdaNorm(params.width, 3)
        self.proj_mlp = nn.Linear(params.width, params.ffn_dim)
        self.proj_out = nn.Linear(params.width + params.ffn_dim, params.width)

    def forward(
        self, x: Tensor, c: Tensor, moment: Moment, rope: Rope, lengths: Sequence[int], cp: ContextParallel
    ) -> tuple[Tensor, Tensor]:
        """x [B, n, D] video, c [B, L, D] text -> the same after the block."""
        video = self.norm.modulation(moment)
        text = Modulation(video.rows)
        h, g = video.scaled(_norm(x), 0, 1), text.scaled(_norm(c), 0, 1)
        seen, read = joint_attention(self.attn.project(h, rope), self.attn.project(g), lengths, cp)
        x = x + video.gated(self._out(seen, h), 2)
        c = c + text.gated(self._out(read, g), 2)
        return x, c

    def _out(self, attended: Tensor, x: Tensor) -> Tensor:
        return self.proj_out(torch.cat([attended.flatten(2), gelu(self.proj_mlp(x))], dim=2))


class Embedding(nn.Module):
    """A vector through two linear layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))

    def wave(self, timestep: Tensor) -> Tensor:
        """timestep [B], fp32 -> the embedding of its waves, computed in fp32 and then in the dtype of the weights."""
        half = TIME_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(-math.log(TIME_PERIOD) * steps / half)
        return self(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype))


class TimeTextEmbedding(nn.Module):
    """Embeddings of the timestep and of a vector for the whole prompt; of a guidance scale where there is one."""

    def __init__(self, inputs: int, width: int, guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = Embedding(TIME_CHANNELS, width)
        self.text_embedder = Embedding(inputs, width)
        if guidance:
            self.guidance_embedder = Embedding(TIME_CHANNELS, width)


class RefinerAttention(nn.Module):
    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.width
        self.heads = params.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, c: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (layer(c).unflatten(2, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attention(q, k, v, mask=mask).flatten(2))


class RefinerBlock(nn.Module):
    """Self-attention among the tokens of a prompt, and feed-forward, gated by the step's vector."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.width
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = RefinerAttention(params)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.ff = FeedForward(width, REFINER_RATIO * width, activation=F.silu)
        self.norm_out = AdaNorm(width, 2)

    def forward(self, c: Tensor, moment: Moment, mask: Tensor | None) -> Tensor:
        gates = self.norm_out.modulation(moment)
        c = c + gates.gated(self.attn(self.norm1(c), mask), 0)
        return c + gates.gated(self.ff(self.norm2(c)), 1)


class TokenRefiner(nn.Module):
    """Tokens of the text encoder, which reads in one direction -> tokens that know of each other and of the step."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(params.text_embed_dim, params.width, guidance=False)
        self.proj_in = nn.Linear(params.text_embed_dim, params.width)
        self.token_refiner = nn.ModuleDict(
            {"refiner_blocks": nn.ModuleList([RefinerBlock(params) for _ in range(params.num_refiner_layers)])}
        )

    def forward(self, text: TextContext, timestep: Tensor) -> Tensor:
        """-> [B, L, D]; rows beyond an item's length mean nothing."""
        moment = Moment(self.time_text_embed.timestep_embedder.wave(timestep) + text.summary)
        c, mask = text.tokens, text.mask()
        for block in self.token_refiner["refiner_blocks"].children():
            c = block(c, moment, mask)
        return c


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, N, D]"""
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class HunyuanVideoTransformer3DModel(nn.Module):
    """One forward predicts the flow velocity of noisy latents. Activations have the dtype of the weights."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        width, patch = params.width, params.patch_size
        self.x_embedder = PatchEmbed(params.in_channels, width, (1, patch, patch))
        self.context_embedder = TokenRefiner(params)
        self.time_text_embed = TimeTextEmbedding(params.pooled_projection_dim, width, params.guidance_embeds)
        self.transformer_blocks = nn.ModuleList([DualBlock(params) for _ in range(params.num_layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(params) for _ in range(params.num_single_layers)])
        self.norm_out = AdaNorm(width, 2)
        self.proj_out = nn.Linear(width, params.out_channels * patch * patch)

    def text_context(self, text: Tensor, pooled: Tensor) -> TextContext:
        """text [1, L, text_embed_dim] without padding, pooled [1, pooled_projection_dim] -> all of a prompt that no
        timestep changes, once a prompt."""
        assert len(text) == 1, "prompts of a batch have lengths of their own: join their contexts"
        dtype = self.x_embedder.proj.weight.dtype
        text, refiner = text.to(dtype), self.context_embedder
        # The mean as the reference takes it over a mask: summed in fp32.
        summary = refiner.time_text_embed.text_embedder(text.float().mean(dim=1).to(dtype))
        whole = self.time_text_embed.text_embedder(pooled.to(dtype))
        return TextContext(refiner.proj_in(text), summary, whole, (text.shape[1],))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextContext,
        guidance: Tensor | None = None,
        cp: ContextParallel = IDENTITY,
    ) -> Tensor:
        """latents [B, in_channels, F, H, W] -> velocity [B, out_channels, F, H, W].

        `timestep` [B] in [0, 1000], never in bf16; `guidance` [B] is a thousand times the embedded scale, where the
        checkpoint embeds one. H, W are multiples of the patch. With a gang, latents and result are whole on every rank.
        """
        grid = self._grid(latents)
        rope = grid_rope(grid, self.params.rope_axes_dim, self.params.rope_theta, latents.device)
        cp = cp.over(math.prod(grid))
        moment = self._moment(timestep, text, guidance, grid, cp)
        c = self.context_embedder(text, timestep)

        x, rope = cp.shard(self.x_embedder(latents)), (cp.shard(rope[0]), cp.shard(rope[1]))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            x, c = block(x, c, moment, rope, text.lengths, cp)

        # Here the given first frame has no modulation of its own, and the scale comes first.
        ends = self.norm_out.modulation(Moment(moment.vector))
        x = self.proj_out(ends.scaled(_norm(x), shift=1, scale=0))
        return self._unpatchify(cp.gather(x), grid)

    def _moment(
        self,
        timestep: Tensor,
        text: TextContext,
        guidance: Tensor | None,
        grid: tuple[int, int, int],
        cp: ContextParallel,
    ) -> Moment:
        embed = self.time_text_embed
        vector = embed.timestep_embedder.wave(timestep)
        if self.params.guidance_embeds:
            if guidance is None:
                raise ValueError("this transformer embeds a guidance scale; none was given")
            vector = vector + embed.guidance_embedder.wave(guidance)
        vector = vector + text.pooled
        if self.params.image_condition_type != REPLACE:
            return Moment(vector)
        still = embed.timestep_embedder.wave(torch.zeros_like(timestep)) + text.pooled
        # Counted on the CPU: how many of this rank's tokens are of the first frame.
        given = torch.arange(math.prod(grid)).unsqueeze(0) < grid[1] * grid[2]
        return Moment(vector, still, int(cp.shard(given).sum()))

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        frames, height, width = latents.shape[2:]
        patch = self.params.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} are not multiples of the patch {patch}")
        return frames, height // patch, width // patch

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, C patch] -> [B, C, F, H, W]; within a token the column runs fastest."""
        patch = self.params.patch_size
        x = x.unflatten(2, (-1, patch, patch)).unflatten(1, grid)
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # B, C, frames, rows, p, columns, p


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)
