"""Token counts: cleaning never lengthens unseen, and the bound that saves counting is a bound."""

from __future__ import annotations

import html
import io
import re

import ftfy
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from vidgen import tokens
from vidgen.errors import CheckpointError


def subword_tokenizer() -> tokenizers.Tokenizer:
    """A unigram tokenizer with byte fallback whose every piece is one byte: the most tokens a text can have."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"<0x{byte:02X}>", -5.0) for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(8)
    return tokenizer


FILES = {"tokenizer/tokenizer.json": subword_tokenizer().to_str().encode()}
count = tokens.counter(FILES, FILES.__getitem__, "tokenizer")


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_no_text_has_more_tokens_than_the_bound(text: str) -> None:
    assert count([text])[0] <= tokens.at_most(text)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30) | st.text("a &;#<>lt\t\n\x01é\ufdfa“", max_size=20))
def test_cleaning_is_what_published_pipelines_do(text: str) -> None:
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert tokens.clean(text) == re.sub(r"\s+", " ", repaired).strip()


@pytest.mark.parametrize("text", ["&#xFDFA;" * 20, "\ufdfa" * 20, "ﬃ" * 20])
def test_the_bound_knows_of_characters_that_grow(text: str) -> None:
    """U+FDFA alone becomes 18 characters under NFKC."""
    assert count([text])[0] <= tokens.at_most(text)
    assert tokens.at_most(text) > len(text)


def test_counts_are_of_the_whole_text_whatever_truncation_the_file_asks_for() -> None:
    assert count(["a" * 50])[0] == 52


def test_a_sentencepiece_model_counts_with_its_closing_token() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moving left", "a blue square moving up"] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    files = {"tokenizer/spiece.model": model.getvalue()}
    counter = tokens.counter(files, files.__getitem__, "tokenizer")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert counter(["a red square"]) == [len(processor.encode("a red square")) + 1]


@pytest.mark.parametrize(("files", "words"), [({}, "neither"), ({"tokenizer/tokenizer.json": b"{}"}, "tokenizer.json")])
def test_a_missing_or_damaged_tokenizer_is_named(files: dict[str, bytes], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        tokens.counter(files, files.__getitem__, "tokenizer")
