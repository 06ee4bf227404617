"""Scaled dot-product attention over tokens that may be spread over a gang. Refuses to know any model, and how the ranks
of a gang speak to each other.

Between ranks of a ring, keys and values arrive block by block. Each block's attention comes with the logarithm of its
sum of exponentials, by which the blocks' results are merged in fp32; the next block is on its way meanwhile.

Letters: B batch, N video tokens of this rank, m those of its ring block, M keys, L text tokens, h heads, g those of
this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from vidgen.parallel import IDENTITY, ContextParallel

Projections = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [B, tokens, h, d]."""


def attention(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel = IDENTITY, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [B, N, h, d] and k, v [B, M, h, d] -> [B, N, h, d].

    With a gang, every tensor holds this rank's tokens and so does the result. Keys that every rank holds in full
    (text) are called with the default `cp`; only they may have a `mask`, bool [B, M], true where a key is attended to.
    """
    assert mask is None or cp.size == 1, "only keys that every rank holds in full are masked"
    heads = q.shape[2]
    q, k, v = cp.to_heads(q, k, v)
    if cp.ring == 1:
        return cp.to_tokens(_attended(q, k, v, mask), heads)
    merged = Merged(q)
    for turn in range(cp.ring):
        coming = cp.pass_on(k, v, turn) if turn + 1 < cp.ring else None
        merged.add(k, v)
        k, v = (k, v) if coming is None else coming.wait()
        del coming  # and with it the block that is gone: a ring holds two of keys and values, not three
    return cp.to_tokens(merged.result(), heads)


def joint_attention(
    video: Projections, text: Projections, lengths: Sequence[int] | None = None, cp: ContextParallel = IDENTITY
) -> tuple[Tensor, Tensor]:
    """One softmax over video and text tokens together -> (video [B, N, h, d], text [B, L, h, d]).

    With a gang, video tokens are this rank's and text is whole on every rank, which attends to it once: with its own
    block. `lengths` are the true text lengths of the batch's items: rows beyond are not attended to and come out as
    zeros. Items of different lengths attend one by one, so that no mask keeps the fast kernels away.
    """
    heads, longest = video[0].shape[2], text[0].shape[1]
    q, k, v = cp.to_heads(*video)
    del video
    tq, tk, tv = (cp.own_heads(x) for x in text)
    rows = [(slice(None), longest)]
    if lengths is not None and any(length != longest for length in lengths):
        rows = [(slice(b, b + 1), length) for b, length in enumerate(lengths)]
    queries = [torch.cat([q[b], tq[b, :length]], dim=1) for b, length in rows]
    outs = []
    if cp.ring == 1:
        for query, (b, length) in zip(queries, rows, strict=True):
            key, value = (torch.cat([x[b], t[b, :length]], dim=1) for x, t in ((k, tk), (v, tv)))
            outs.append(_attended(query, key, value))
    else:
        merged = [Merged(query) for query in queries]
        for turn in range(cp.ring):
            coming = cp.pass_on(k, v, turn) if turn + 1 < cp.ring else None
            for one, (b, length) in zip(merged, rows, strict=True):
                one.add(k[b], v[b])
                if turn == 0:
                    one.add(tk[b, :length], tv[b, :length])
            k, v = (k, v) if coming is None else coming.wait()
            del coming
        outs = [one.result() for one in merged]
    if any(length < longest for _, length in rows):
        outs = [F.pad(out, (0, 0, 0, 0, 0, longest - length)) for out, (_, length) in zip(outs, rows, strict=True)]
    out = cp.to_tokens(outs[0] if len(outs) == 1 else torch.cat(outs), heads, whole=longest)
    tokens = out.shape[1] - longest
    return out[:, :tokens], out[:, tokens:]


@dataclass
class Merged:
    """The attention of queries [B, m, g, d] to blocks of keys that come one after the other."""

    queries: Tensor
    out: Tensor | None = None
    lse: Tensor | None = None

    def add(self, k: Tensor, v: Tensor) -> None:
        """Attends to a block k, v [B, M, g, d] as well; M may be 0."""
        if k.shape[1] == 0:
            return
        out, lse = attention_with_lse(self.queries, k, v)
        lse = lse.unsqueeze(-1)
        if self.out is None or self.lse is None:
            self.out, self.lse = out.to(torch.float32, copy=True), lse
            return
        # The block's share of the whole sum of exponentials, without an exponential of anything large.
        self.out.lerp_(out.float(), torch.sigmoid(lse - self.lse))
        self.lse = torch.logaddexp(self.lse, lse)

    def result(self) -> Tensor:
        """[B, m, g, d] in the dtype of the queries."""
        assert self.out is not None, "there are keys somewhere"
        return self.out.to(self.queries.dtype)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, N, h, d], k, v [B, M, h, d] -> (attention [B, N, h, d], log of the sum of exponentials [B, N, h] fp32).

    By the kernel that scaled_dot_product_attention itself would take on this device, dtype and shape; where that one
    keeps its sums to itself, in plain fp32, which needs memory for N x M scores.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    choice = torch._fused_sdp_choice(q, k, v)
    aten = torch.ops.aten
    if choice == SDPBackend.FLASH_ATTENTION.value and q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif choice == SDPBackend.FLASH_ATTENTION.value:
        size, spare = q.shape[-1], -q.shape[-1] % 8  # the kernel wants heads of a multiple of 8
        wide = (F.pad(x, (0, spare)) if spare else x for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention(*wide, scale=size**-0.5)[:2]
        out = out[..., :size]
    elif choice == SDPBackend.EFFICIENT_ATTENTION.value:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    elif choice == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, lse = plain_attention_with_lse(q, k, v)
    # The kernels round the number of queries up, or keep a last dimension of one.
    lse = lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]]
    return out.transpose(1, 2), lse.transpose(1, 2)


def plain_attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, h, N, d], k, v [B, h, M, d] -> (attention [B, h, N, d], log of the sum of exponentials [B, h, N] fp32)."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, dim=-1)
    return (torch.exp(scores - lse[..., None]) @ v.float()).to(q.dtype), lse


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shown = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2)
