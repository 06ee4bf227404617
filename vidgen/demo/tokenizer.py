"""The demo's tokenizer: one token a word, for the words that its prompts are made of.

Any other text is tokenized too: an unknown word is `<unk>`, which the model never saw. Refuses to know torch and
transformers; the files it writes are read by transformers' AutoTokenizer and by the tokenizers library.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vidgen.demo import data

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
WORDS = (PAD, EOS, UNKNOWN, "a", "moving", *data.COLOURS, *data.SHAPES, *data.DIRECTIONS)
PROMPT_TOKENS = 6
"""Tokens of every prompt of the demo: five words and the closing token."""


def build() -> Tokenizer:
    """Lower-cased words and runs of punctuation, closed by `</s>` as T5 does it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, WORDS.index(EOS))]
    )
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    return tokenizer


def save(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
