"""The published checkpoints of every native family, as the parsed JSON files of their folders."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import T5Config

from tests.models.case import native_families

Configs = dict[str, dict[str, Any]]
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
"""T5 v1.1 xxl, as arguments of T5Config."""


def t5_xxl(dtype: str = "bfloat16") -> dict[str, Any]:
    """Its parsed config.json."""
    parsed: dict[str, Any] = T5Config(**T5_XXL, dtype=dtype).to_dict()
    return parsed


def find(name: str) -> tuple[str, Configs]:
    """(family, files) of a checkpoint, by the name that `published.py` of the family's tests gives it."""
    known: dict[str, tuple[str, Configs]] = {}
    for kind in native_families():
        module = importlib.import_module(f"tests.models.{kind}.published")
        known |= {each: (kind, configs) for each, configs in module.CHECKPOINTS.items()}
    if name not in known:
        raise KeyError(f"{name!r} is no published checkpoint; known: {', '.join(sorted(known))}")
    return known[name]
