"""Tokenizers of a checkpoint, from transformers."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.errors import CheckpointError

FILES = frozenset({"tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json"})
"""Files of which a tokenizer has one at least."""


def load_tokenizer(folder: CheckpointFolder, component: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a local checkpoint's folder; CheckpointError if there is none, or it cannot be loaded.

    Read as its files say, whatever class model_index.json names: a byte-level tokenizer.json under a SentencePiece
    class is mis-read by that class.
    """
    assert folder.local is not None, "a tokenizer is loaded from a local folder"
    names = {path.rpartition("/")[2] for path in folder.files(component)}
    if not names & FILES:
        raise CheckpointError(f"{folder.resolved.name}: {component} has none of {', '.join(sorted(FILES))}")
    try:
        place = folder.local / component
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder.resolved.name}: {component} cannot be loaded: {error}") from error
