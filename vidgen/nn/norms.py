"""Layer norm whose result stays in fp32, so that modulation and norm share one rounding. Refuses to know any model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FP32LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension: any dtype in, fp32 out."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
