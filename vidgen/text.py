"""Text encoders and their tokenizers, from transformers; the only importer of it.

A prompt becomes one embedding a token, without padding. Refuses to know what a video is, how prompts are cached, and
the network: everything is read from a local folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import load_weights
from vidgen.errors import CheckpointError
from vidgen.tokens import clean

ENCODERS: dict[str, type[T5EncoderModel] | type[UMT5EncoderModel]] = {"umt5": UMT5EncoderModel, "t5": T5EncoderModel}
TIED = {"encoder.embed_tokens.weight": "shared.weight"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one branch of one request is conditioned on, before encoding."""

    text: str

    @property
    def digest(self) -> str:
        """Equal for prompts that encode alike."""
        return hashlib.sha256(clean(self.text).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Text:
    """An encoded prompt: `embedding` is [L, D], one row a token, not padded; `digest` is that of its prompt."""

    digest: str
    embedding: torch.Tensor


@dataclass
class TextEncoder:
    """A T5-class encoder. `max_tokens` is the most tokens a prompt keeps, the closing one included."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def token_ids(self, prompt: str) -> list[int]:
        """Ids of the cleaned prompt, truncated to `max_tokens` with its closing token."""
        return self.tokenizer(clean(prompt), truncation=True, max_length=self.max_tokens)["input_ids"]

    @torch.inference_mode()
    def encode(self, prompt: Prompt) -> Text:
        """Embeddings [L, D] of the prompt's L tokens in the encoder's dtype.

        The prompt is encoded alone and at its own length: no neighbour in a batch and no padding changes its bits.
        (Padding that is masked adds terms of exactly zero.)
        """
        ids = torch.tensor([self.token_ids(prompt.text)], device=next(self.model.parameters()).device)
        hidden = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return Text(prompt.digest, hidden[0])


def padded(text: Text, length: int) -> torch.Tensor:
    """Embeddings [1, length, D] with zeros after the text's true length."""
    result = text.embedding.new_zeros(1, length, text.embedding.shape[-1])
    result[0, : len(text.embedding)] = text.embedding
    return result


def load_text_encoder(
    folder: CheckpointFolder,
    *,
    component: str = "text_encoder",
    tokenizer: str = "tokenizer",
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The encoder and tokenizer of a local checkpoint; CheckpointError names what is missing, extra or unsupported."""
    assert folder.local is not None, "a text encoder is loaded from a local folder"
    config = AutoConfig.from_pretrained(folder.local / component, local_files_only=True)
    if config.model_type not in ENCODERS:
        raise CheckpointError(
            f"{folder.resolved.name}: {component} has model_type {config.model_type!r}; allowed: {', '.join(ENCODERS)}"
        )
    with torch.device("meta"):
        model = ENCODERS[config.model_type](config)
    load_weights(model, folder, component, dtype=dtype, device=device, tied=TIED)
    return TextEncoder(model, _load_tokenizer(folder, tokenizer), max_tokens)


def _load_tokenizer(folder: CheckpointFolder, component: str) -> PreTrainedTokenizerBase:
    assert folder.local is not None
    names = {path.rpartition("/")[2] for path in folder.files(component)}
    if not names & {"tokenizer.json", "spiece.model"}:
        raise CheckpointError(f"{folder.resolved.name}: {component} has neither tokenizer.json nor spiece.model")
    try:
        return AutoTokenizer.from_pretrained(folder.local / component, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder.resolved.name}: {component} cannot be loaded: {error}") from error
