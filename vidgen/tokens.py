"""Prompt cleaning and token counts, as the text encoders' tokenizers see them.

Uses the tokenizers library, or sentencepiece where a checkpoint has only its model. No torch, no transformers; refuses
to know what an encoder is.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import ftfy
import sentencepiece
import tokenizers

from vidgen.errors import CheckpointError

_SPACES = re.compile(r"\s+")
_SPECIAL = 2
"""Tokens that may come on top of a text's own bytes: the leading space and the closing token."""


class Counter(Protocol):
    def __call__(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, the special ones included."""


def clean(text: str) -> str:
    """Repairs mojibake, unescapes HTML twice and collapses white space: what Wan's and most published pipelines do."""
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair, unescape or drop
        return " ".join(text.split())
    return _SPACES.sub(" ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def at_most(text: str) -> int:
    """An upper bound on the tokens of a text, without a tokenizer: no subword is shorter than a byte of the cleaned
    and normalised text."""
    if not text.isascii() or "&" in text:  # the only texts that cleaning or normalising can make longer
        text = unicodedata.normalize("NFKC", clean(text))
    return len(text.encode()) + _SPECIAL


def counter(files: Collection[str], read: Callable[[str], bytes], component: str) -> Counter:
    """Counts with the tokenizer in the checkpoint's folder `component`: `files` are the checkpoint's paths, `read`
    gives one's bytes. Raises CheckpointError if there is neither tokenizer.json nor spiece.model, or it is damaged.
    """
    for name, build in (("tokenizer.json", _fast), ("spiece.model", _sentencepiece)):
        path = f"{component}/{name}"
        if path in files:
            try:
                return build(read(path))
            except Exception as error:  # tokenizers raises nothing narrower
                raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
    raise CheckpointError(f"{component}: holds neither tokenizer.json nor spiece.model")


def _fast(data: bytes) -> Counter:
    tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch([clean(text) for text in texts])]

    return count


def _sentencepiece(data: bytes) -> Counter:
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(processor.encode(clean(text))) + 1 for text in texts]  # the closing token

    return count
