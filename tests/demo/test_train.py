"""The training script works from nothing, and trains on exactly what inference computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vidgen import engine
from vidgen.demo import tokenizer, train

TINY = train.Recipe(vae_stages=((1, 2, 2), (5, 1, 1)), bank=32, steps=2, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "checkpoint"
    train.make(TINY, out)
    return out


def test_a_few_steps_give_a_folder_that_the_engine_opens(folder: Path) -> None:
    loaded = engine.load(str(folder))
    (video,) = loaded.generate([loaded.request("a red circle moving left", num_inference_steps=2)])
    assert np.concatenate(list(video.chunks)).shape == (17, 64, 64, 3)


def test_a_finished_training_that_is_started_again_changes_nothing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    train.make(TINY, folder)
    assert before == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_again_from_nothing_gives_the_same_autoencoder(folder: Path, tmp_path: Path) -> None:
    again = train.train_vae(TINY, tmp_path / "vae.pt").state_dict()
    first = torch.load(folder.with_name("checkpoint-training") / "vae.pt")["model"]
    for key, value in again.items():
        if not key.startswith("quant_conv"):  # its unused variance is reset after the last step
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("prompt", ["a red circle moving left", ""])
def test_training_sees_a_prompt_padded_to_512_tokens_as_inference_does(prompt: str) -> None:
    torch.manual_seed(0)
    model = train.Denoiser().eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)  # it starts at zero, which would hide all
    ids = tokenizer.build().encode(prompt).ids
    short = torch.tensor([ids + [0] * (tokenizer.PROMPT_TOKENS - len(ids))])
    latents, sigma = torch.randn(1, 16, 5, 8, 8), torch.tensor([0.7])
    with torch.no_grad():
        trained = model(latents, sigma, short)
        text = model.text_encoder(input_ids=torch.tensor([ids])).last_hidden_state
        text = torch.nn.functional.pad(text, (0, 0, 0, train.MAX_TEXT_TOKENS - len(ids)))
        inferred = model.transformer(latents, sigma * 1000, model.transformer.text_context(text))
    assert trained.abs().max() > 0.1
    assert torch.allclose(trained, inferred, atol=1e-5)  # fp32 rounding in another order


def test_the_learning_rate_rises_then_falls_to_a_fiftieth() -> None:
    rates = [train.rate(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == rates[100]
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=0.001)
