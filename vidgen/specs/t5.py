"""Sizes of T5 and UMT5 encoders from their config.json, and how many numbers their weights hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.specs.config import one_of, take


@dataclass(frozen=True, slots=True)
class T5Params:
    """Sizes of the encoder, named as in its config.json. `kind` is t5 or umt5; `relative_attention_layers` counts the
    layers with a position bias of their own: all in UMT5, the first in T5."""

    kind: str
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    vocab_size: int
    relative_attention_num_buckets: int
    relative_attention_layers: int
    gated: bool


def t5_params(config: Mapping[str, Any], where: str = "text_encoder/config.json") -> T5Params:
    """CheckpointError names what is missing or not a T5."""
    kind = one_of(config, "model_type", ("umt5", "t5"), where)
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size", "relative_attention_num_buckets")
    sizes = {name: take(config, name, where) for name in names}
    return T5Params(
        kind=kind,
        **sizes,
        relative_attention_layers=sizes["num_layers"] if kind == "umt5" else 1,
        gated=str(config.get("feed_forward_proj", "relu")).startswith("gated-"),
    )


def t5_weights(t: T5Params) -> int:
    """Numbers in the encoder's weights; its token embedding counts once."""
    layer = 4 * t.d_model * t.num_heads * t.d_kv + (3 if t.gated else 2) * t.d_model * t.d_ff + 2 * t.d_model
    bias = t.relative_attention_layers * t.relative_attention_num_buckets * t.num_heads
    return t.vocab_size * t.d_model + t.num_layers * layer + bias + t.d_model
