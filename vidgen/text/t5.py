"""T5 and UMT5 text encoders, from transformers.

Refuses to know what a video is, how prompts are cached, and the network: everything is read from a local folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import load_weights
from vidgen.errors import CheckpointError
from vidgen.text.configs import load_config
from vidgen.text.prompt import Prompt, Text
from vidgen.text.tokenizers import load_tokenizer
from vidgen.tokens import clean

ENCODERS: dict[str, type[T5EncoderModel] | type[UMT5EncoderModel]] = {"umt5": UMT5EncoderModel, "t5": T5EncoderModel}
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
PADDINGS = ("none", "attended")


@dataclass
class TextEncoder:
    """A T5-class encoder. `max_tokens` is the most tokens a prompt keeps, the closing one included. `padding` none
    encodes each prompt at its own length, as a masked and padded run would; attended pads it to `max_tokens` and lets
    the encoder attend to the padding, as pipelines without a mask do. `clean` is applied to the prompt first."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    padding: str = "none"
    clean: Callable[[str], str] | None = clean

    def token_ids(self, prompt: str) -> list[int]:
        """Ids of the prompt, truncated to `max_tokens` with its closing token; not padded."""
        text = prompt if self.clean is None else self.clean(prompt)
        return self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]

    @torch.inference_mode()
    def encode(self, prompt: Prompt) -> Text:
        """Embeddings of the prompt in the encoder's dtype: [L, D] for its L tokens, or [max_tokens, D] (attended).

        The prompt is encoded alone: no neighbour in a batch changes its bits. (Padding that is masked adds terms of
        exactly zero, so it is left out.)
        """
        ids = self.token_ids(prompt.text)
        tokens = len(ids)
        if self.padding == "attended":
            ids = ids + [self._pad()] * (self.max_tokens - tokens)
        batch = torch.tensor([ids], device=next(self.model.parameters()).device)
        hidden = self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state
        return Text(prompt.digest, hidden[0], tokens)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int), "checked at loading"
        return pad


def load_text_encoder(
    folder: CheckpointFolder,
    *,
    component: str = "text_encoder",
    tokenizer: str = "tokenizer",
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    padding: str = "none",
    clean: Callable[[str], str] | None = clean,
) -> TextEncoder:
    """The encoder and tokenizer of a local checkpoint; CheckpointError names what is missing, extra or unsupported."""
    assert folder.local is not None, "a text encoder is loaded from a local folder"
    assert padding in PADDINGS
    config = load_config(folder, component, ENCODERS)
    with torch.device("meta"):
        model = ENCODERS[config.model_type](config)
    keep = ("wo",) if dtype == torch.float16 else ()  # the layer that overflows; transformers loads it so too
    load_weights(model, folder, component, dtype=dtype, device=device, tied=TIED, keep_fp32=keep)
    loaded = load_tokenizer(folder, tokenizer)
    if padding == "attended" and loaded.pad_token_id is None:
        name = folder.resolved.name
        raise CheckpointError(f"{name}: {tokenizer} has no pad_token; prompts are padded to {max_tokens} tokens")
    return TextEncoder(model, loaded, max_tokens, padding, clean)
