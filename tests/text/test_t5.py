"""The text encoder gives what transformers gives, offline, one prompt at a time and at its own length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from tests.models.wan import tiny_checkpoint
from vidgen import tokens
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError
from vidgen.text.prompt import Prompt, Text, padded
from vidgen.text.t5 import TextEncoder, load_text_encoder

STAGE = 1e-4
"""fp32 on both sides, with padding on one alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build(tmp_path_factory.mktemp("text"))


def load(folder: Path, max_tokens: int = 512, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return load_text_encoder(open_checkpoint(str(folder)), max_tokens=max_tokens, dtype=dtype)


@pytest.mark.parametrize("prompt", ["a red circle moving left", "", "  A &lt;cat&gt;\n\tor dog  ", "cat " * 600])
def test_an_encoded_prompt_is_the_oracles_where_its_padding_is_cut(folder: Path, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    batch = tokenizer(
        [tokens.clean(prompt)], padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).last_hidden_state[0]
    length = int(batch.attention_mask.sum())
    found = load(folder).encode(Prompt(prompt)).embedding
    assert found.shape == (length, 16)
    assert float((found - expected[:length]).abs().max()) < STAGE


def test_a_prompt_keeps_at_most_its_limit_with_the_closing_token(folder: Path) -> None:
    encoder = load(folder, max_tokens=5)
    ids = encoder.token_ids("cat dog cat dog cat dog")
    assert len(ids) == 5
    assert ids[-1] == 1
    assert len(encoder.token_ids("cat dog")) == 3


def test_a_digest_tells_text_and_picture_apart() -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    digests = {
        Prompt("a cat").digest,
        Prompt("a  cat").digest,
        Prompt("a cat", picture).digest,
        Prompt("a cat", picture.reshape(3, 2, 3)).digest,
        Prompt("a cat", picture + 1).digest,
    }
    assert len(digests) == 5
    assert Prompt("a cat", picture).digest == Prompt("a cat", picture.copy()).digest


def test_padding_is_zero_after_the_true_length() -> None:
    text = Text("", torch.ones(2, 3, dtype=torch.bfloat16), 2)
    result = padded(text, 4)
    assert result.shape == (1, 4, 3)
    assert result.dtype == torch.bfloat16
    assert result[0].sum(dim=1).tolist() == [3, 3, 0, 0]


def test_token_counts_of_the_planner_are_the_encoders(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    count = tokens.counter(checkpoint.files("tokenizer"), checkpoint.read, "tokenizer")
    prompts = ["a red circle", "", "cat &amp; dog", "a strange word"]
    assert count(prompts) == [len(load(folder).token_ids(prompt)) for prompt in prompts]


def test_a_tokenizer_that_has_only_its_sentencepiece_model_loads_offline(folder: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(tiny_checkpoint.WORDS)] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=27,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    place = shutil.copytree(folder, tmp_path / "copy")
    (place / "tokenizer/tokenizer.json").unlink()
    (place / "tokenizer/spiece.model").write_bytes((tmp_path / "spiece.model").read_bytes())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
    (place / "tokenizer/tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for prompt in ("a red circle moving left", "the cat"):
        assert load(place).token_ids(prompt) == [*processor.encode(prompt), 1]


def test_a_tokenizer_without_its_files_is_named(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "copy")
    (place / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer has none of spiece"):
        load(place)


def test_the_embedding_of_tokens_is_one_tensor_and_has_the_dtype_asked_for(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16).model
    assert model.get_parameter("shared.weight") is model.get_parameter("encoder.embed_tokens.weight")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
