"""A prompt before and after encoding. Refuses to know any encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vidgen.sampling.step import branches
from vidgen.types import Request


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What one branch of one request is conditioned on, before encoding: text, and where the encoder looks at a
    picture too, uint8 RGB [H, W, 3]."""

    text: str
    image: np.ndarray | None = None

    @property
    def digest(self) -> str:
        """Equal for equal prompts."""
        digest = hashlib.sha256(self.text.encode())
        if self.image is not None:
            digest.update(f"\0{self.image.shape}\0".encode())
            digest.update(np.ascontiguousarray(self.image).data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Text:
    """An encoded prompt: `embedding` is [L, D], one row a token, of which the first `tokens` are its own and the rest
    is padding; `pooled` is one vector [P] for the whole, where a family has one. `digest` is that of its prompt."""

    digest: str
    embedding: torch.Tensor
    tokens: int
    pooled: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Text:
        """The same in another dtype."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Text(self.digest, self.embedding.to(dtype), self.tokens, pooled)


def prompts_of(request: Request, written: Callable[[str], str] = str) -> dict[str, Prompt]:
    """The prompt of each branch, its text `written` as the family wants it; a guidance scale of 1 or less has no
    unconditional one."""
    texts = (request.prompt, request.negative_prompt)
    names = branches(request.guidance_scale > 1)
    return {name: Prompt(written(text)) for name, text in zip(names, texts, strict=False)}


class Encoder(Protocol):
    def encode(self, prompt: Prompt) -> Text:
        """The prompt's embeddings, in the encoder's dtype."""


def encoded(encoder: Encoder | None, prompts: Sequence[Prompt], dtype: torch.dtype) -> list[Text]:
    """Each prompt's embeddings in this dtype. None stands for the encoder on the ranks of a gang that have none."""
    assert encoder is not None, "rank 0 of a gang alone encodes text"
    return [encoder.encode(prompt).to(dtype) for prompt in prompts]


def padded(text: Text, length: int) -> torch.Tensor:
    """Embeddings [1, length, D] with zeros after the text's true length."""
    result = text.embedding.new_zeros(1, length, text.embedding.shape[-1])
    result[0, : text.tokens] = text.embedding[: text.tokens]
    return result
