"""Scaled dot-product attention over tokens that may be spread over a gang. Refuses to know any model.

Letters: B batch, N video tokens, M keys, L text tokens, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.parallel import IDENTITY, ContextParallel

Projections = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [B, tokens, h, d]."""


def attention(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel = IDENTITY, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [B, N, h, d] and k, v [B, M, h, d] -> [B, N, h, d].

    With a gang, every tensor holds this rank's tokens and so does the result. Keys that every rank holds in full
    (text) are called with the default `cp`; only they may have a `mask`, bool [B, M], true where a key is attended to.
    """
    assert mask is None or cp.size == 1, "only keys that every rank holds in full are masked"
    q, k, v = (cp.to_heads(x).transpose(1, 2) for x in (q, k, v))
    shown = None if mask is None else mask[:, None, None, :]
    return cp.to_tokens(F.scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2))


def joint_attention(
    video: Projections, text: Projections, lengths: Sequence[int] | None = None, cp: ContextParallel = IDENTITY
) -> tuple[Tensor, Tensor]:
    """One softmax over video and text tokens together -> (video [B, N, h, d], text [B, L, h, d]).

    With a gang, video tokens are this rank's and text is whole on every rank. `lengths` are the true text lengths of
    the batch's items: rows beyond are not attended to and come out as zeros. Items of different lengths attend one by
    one, so that no mask keeps the fast kernels away.
    """
    longest = text[0].shape[1]
    if lengths is None or all(length == longest for length in lengths):
        return _joint(video, text, cp)
    outs = []
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        q, k, v = (x[one] for x in video)
        tq, tk, tv = (x[one, :length] for x in text)
        seen, read = _joint((q, k, v), (tq, tk, tv), cp)
        outs.append((seen, F.pad(read, (0, 0, 0, 0, 0, longest - length))))
    return torch.cat([seen for seen, _ in outs]), torch.cat([read for _, read in outs])


def _joint(video: Projections, text: Projections, cp: ContextParallel) -> tuple[Tensor, Tensor]:
    assert cp.size == 1, "joint attention over a gang is not written"
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(video, text, strict=True))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    tokens = video[0].shape[1]
    return out[:, :tokens], out[:, tokens:]
