"""Llama, CLIP and Llava for a prompt, against diffusers' HunyuanVideo pipelines, which pad, mask and crop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.models.hunyuan import tiny_checkpoint
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError
from vidgen.text import llama_clip
from vidgen.text.llama_clip import LlamaClipEncoder, PicturePrompt, load_llama_clip
from vidgen.text.prompt import Prompt

STAGE = 1e-4
"""fp32 on both sides; without padding the sums are the same ones. Observed 1e-6."""
PROMPTS = ("a red circle moving left", "the cat and a dog or the green square", "", "a strange word {} <|eot_id|>")
DTYPES = {"text_encoder": torch.float32, "text_encoder_2": torch.float32}
TOKENS = 256

Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[str, Path] = {}

    def once(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_checkpoint.build(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return once


def load(folder: Path) -> LlamaClipEncoder:
    return load_llama_clip(open_checkpoint(str(folder)), max_tokens=TOKENS, dtypes=DTYPES)


def oracle(folder: Path, kind: str) -> Any:
    return (HunyuanVideoPipeline if kind == "t2v" else HunyuanVideoImageToVideoPipeline).from_pretrained(folder)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def theirs(pipe: Any, text: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings without the padding that the mask hides, and the pooled vector."""
    with torch.no_grad():
        embeddings, pooled, mask = pipe.encode_prompt(prompt=text, **options)
    length = int(mask.sum())
    assert bool(mask[0, :length].all()), "the mask hides nothing but the end"
    return embeddings[0, :length], pooled[0]


def assert_same(found: Any, embeddings: torch.Tensor, pooled: torch.Tensor) -> None:
    assert found.tokens == len(found.embedding)
    torch.testing.assert_close(found.embedding, embeddings, rtol=0, atol=STAGE)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=STAGE)


def test_templates_and_their_cuts_are_the_references_and_the_offline_tokenizer_counts_as_llamas() -> None:
    plain = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    pictured = pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE
    assert (plain["template"], plain["crop_start"]) == (llama_clip.TEMPLATE, llama_clip.CUT)
    assert (pictured["template"], pictured["crop_start"]) == (llama_clip.PICTURE_TEMPLATE, llama_clip.PICTURE_CUT)
    words = tiny_checkpoint.llama_tokenizer()
    for template, cut in ((plain, llama_clip.CUT), (pictured, llama_clip.PICTURE_CUT)):
        assert len(words(template["template"].partition("{}")[0])["input_ids"]) == cut


@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_is_the_references_without_padding(build: Build, text: str) -> None:
    folder = build("t2v")
    assert_same(load(folder).encode(Prompt(text)), *theirs(oracle(folder, "t2v"), text))


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("text", PROMPTS[:3])
def test_a_prompt_with_a_picture_is_the_references(build: Build, text: str, interleave: int) -> None:
    folder = build("replace")
    found = load(folder).encode(PicturePrompt(text, picture(), interleave))
    options = {"image": Image.fromarray(picture()), "image_embed_interleave": interleave}
    assert_same(found, *theirs(oracle(folder, "replace"), text, **options))
    assert found.tokens == 576 // interleave + len(text.split()) + 1


@pytest.mark.parametrize("words", [249, 250, 251, 252, 254, 255, 256, 300])
@pytest.mark.parametrize("kind", ["t2v", "replace"])
def test_a_prompt_that_is_too_long_loses_what_the_references_loses(build: Build, kind: str, words: int) -> None:
    folder, text = build(kind), " ".join(["red", "cat"] * (words // 2) + ["dog"] * (words % 2))
    prompt, options = Prompt(text), {}
    if kind == "replace":
        prompt, options = PicturePrompt(text, picture(), 4), {"image": Image.fromarray(picture())}
        options["image_embed_interleave"] = 4
    assert_same(load(folder).encode(prompt), *theirs(oracle(folder, kind), text, **options))


def test_another_picture_gives_other_tokens_of_the_prompt_too(build: Build) -> None:
    encoder = load(build("replace"))
    first, second = (encoder.encode(PicturePrompt(PROMPTS[0], picture(seed), 4)) for seed in (0, 1))
    assert first.digest != second.digest
    assert not torch.equal(first.embedding[:144], second.embedding[:144])
    assert not torch.equal(first.embedding[144:], second.embedding[144:])


def test_the_digest_tells_interleaves_apart() -> None:
    digests = {PicturePrompt("a", picture(), interleave).digest for interleave in (1, 2, 4)}
    assert len(digests) == 3
    assert PicturePrompt("a", picture(), 2).digest == PicturePrompt("a", picture(), 2).digest


def test_what_the_transformer_does_not_look_at_is_not_kept(build: Build) -> None:
    plain, pictured = load(build("t2v")), load(build("concat"))
    assert len(plain.llama.layers) == tiny_checkpoint.LLAMA["num_hidden_layers"] - 2
    assert not any("lm_head" in name for name, _ in pictured.llama.named_parameters())
    assert len(pictured.llama.language_model.layers) == tiny_checkpoint.LLAMA["num_hidden_layers"] - 2


OLDER: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "clip_text_model": ("t2v", "text_encoder_2", lambda key: f"text_model.{key}"),
    "llama_in_a_model": ("t2v", "text_encoder", lambda key: f"model.{key}"),
    "clip_vision_model": ("replace", "text_encoder", lambda key: key.replace("tower.", "tower.vision_model.")),
    "llava_of_today": (
        "replace",
        "text_encoder",
        lambda key: (
            key.replace("language_model.lm_head", "lm_head")
            if "lm_head" in key
            else "model." + key.replace("language_model.model", "language_model")
        ),
    ),
}
"""Places in which transformers has had the same tensors: component, and what becomes of a key."""


@pytest.mark.parametrize("name", OLDER)
def test_keys_of_other_versions_of_transformers_are_read(build: Build, name: str, tmp_path: Path) -> None:
    kind, component, renamed = OLDER[name]
    folder = shutil.copytree(build(kind), tmp_path / "copy")
    place = folder / component / "model.safetensors"
    tensors = load_file(place)
    assert {renamed(key) for key in tensors} != set(tensors)
    save_file({renamed(key): value for key, value in tensors.items()}, place)
    prompt = Prompt(PROMPTS[0]) if kind == "t2v" else PicturePrompt(PROMPTS[0], picture(), 4)
    expected, found = load(build(kind)).encode(prompt), load(folder).encode(prompt)
    assert found.pooled is not None and expected.pooled is not None
    assert torch.equal(found.embedding, expected.embedding) and torch.equal(found.pooled, expected.pooled)


@pytest.mark.parametrize(
    ("kind", "component", "key"),
    [
        ("t2v", "text_encoder", "layers.3.mlp.up_proj.weight"),
        ("t2v", "text_encoder_2", "final_layer_norm.bias"),
        ("replace", "text_encoder", "vision_tower.pre_layrnorm.weight"),
        ("replace", "text_encoder", "multi_modal_projector.linear_2.bias"),
    ],
)
def test_a_missing_weight_is_named(build: Build, kind: str, component: str, key: str, tmp_path: Path) -> None:
    folder = shutil.copytree(build(kind), tmp_path / "copy")
    place = folder / component / "model.safetensors"
    save_file({name: value for name, value in load_file(place).items() if name != key}, place)
    with pytest.raises(CheckpointError, match=key):
        load(folder)


def test_a_folder_without_an_image_processor_or_with_another_encoder_is_refused(build: Build, tmp_path: Path) -> None:
    folder = shutil.copytree(build("replace"), tmp_path / "copy")
    for place in (folder / "image_processor").iterdir():
        place.unlink()
    with pytest.raises(CheckpointError, match="image_processor has none of"):
        load(folder)
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="text_encoder_2 has model_type 'llava'; allowed: clip_text_model"):
        load(folder)


def test_weights_have_the_dtype_of_their_component_and_rotary_frequencies_stay_fp32(build: Build) -> None:
    dtypes = {"text_encoder": torch.bfloat16, "text_encoder_2": torch.float32}
    encoder = load_llama_clip(open_checkpoint(str(build("t2v"))), max_tokens=TOKENS, dtypes=dtypes)
    text = encoder.encode(Prompt(PROMPTS[0]))
    assert text.pooled is not None
    assert (text.embedding.dtype, text.pooled.dtype) == (torch.bfloat16, torch.float32)
    assert encoder.llama.rotary_emb.inv_freq.dtype == torch.float32
