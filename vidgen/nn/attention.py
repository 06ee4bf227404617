"""Scaled dot-product attention over tokens that may be spread over a gang. Refuses to know masks and models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vidgen.parallel import IDENTITY, ContextParallel


def attention(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel = IDENTITY) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [B, N, h, d] and k, v [B, M, h, d] -> [B, N, h, d].

    With a gang, every tensor holds this rank's tokens and so does the result. Keys that every rank holds in full
    (text) are called with the default `cp`.
    """
    q, k, v = (cp.to_heads(x).transpose(1, 2) for x in (q, k, v))
    return cp.to_tokens(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
