"""Tokenizers and text encoders of tiny checkpoints: made on the spot, without the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "green", "blue", "circle", "square", "moving", "left", "right", "the", "cat", "dog", "and", "or")
SPECIAL = ("<pad>", "</s>", "<unk>")

Module = TypeVar("Module", bound=nn.Module)


def tokenizer(words: Sequence[str] = WORDS, length: int = 512) -> PreTrainedTokenizerFast:
    """One token a known word, `<unk>` for others, closed by `</s>`."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def tiny_t5(d_model: int = 16, **changes: Any) -> T5EncoderModel:
    """A T5 v1.1 encoder: gated feed-forward, one position bias."""
    sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    config = T5Config(vocab_size=len(WORDS) + len(SPECIAL), d_model=d_model, **sizes | changes)
    return randomise(T5EncoderModel(config))


def tiny_umt5(d_model: int = 16, **changes: Any) -> UMT5EncoderModel:
    """A UMT5 encoder: a position bias in each layer."""
    sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = UMT5Config(vocab_size=len(WORDS) + len(SPECIAL), d_model=d_model, **sizes | changes)
    return randomise(UMT5EncoderModel(config))


def randomise(module: Module, seed: int = 0, scale: float = 0.1) -> Module:
    """Adds noise to every weight, so that no zero, one or equal initialisation hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * scale)
    return module.eval()
