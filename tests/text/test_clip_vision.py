"""The CLIP image encoder against diffusers' image-to-video pipeline, in both ways its keys are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.models.wan import tiny_checkpoint
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError
from vidgen.text.clip_vision import ImageEncoder, load_image_encoder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint.build(tmp_path / "checkpoint", transformer=tiny_checkpoint.TWO_IMAGES)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    return load_image_encoder(open_checkpoint(str(folder)), dtype=dtype)


def picture(seed: int) -> np.ndarray:
    """A wide picture, so that it is both made smaller and cut."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((64, 40), Image.Resampling.BICUBIC))


def test_images_are_encoded_as_the_oracle_encodes_them(checkpoint: Path) -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(checkpoint)
    images = [picture(1), picture(2)]
    with torch.no_grad():
        expected = pipe.encode_image([Image.fromarray(image) for image in images], device="cpu")
    found = load(checkpoint).encode(images)
    assert found.shape == (2, 5, 20) and expected.std() > 0.1
    # fp32 on both sides; one picture at a time or both at once.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found[1:], load(checkpoint).encode(images[1:])), "no neighbour changes a picture's bits"


def test_keys_with_the_prefix_of_older_files_are_the_same_weights(checkpoint: Path) -> None:
    found = load(checkpoint).encode([picture(1)])
    place = checkpoint / "image_encoder" / "model.safetensors"
    save_file({f"vision_model.{key}": value for key, value in load_file(place).items()}, place)
    assert torch.equal(load(checkpoint).encode([picture(1)]), found)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_missing_and_an_unknown_weight_are_named(checkpoint: Path, prefix: str) -> None:
    place = checkpoint / "image_encoder" / "model.safetensors"
    weights = {prefix + key: value for key, value in load_file(place).items()}
    del weights[f"{prefix}encoder.layers.1.mlp.fc1.bias"]
    save_file({**weights, f"{prefix}visual_projection.weight": torch.zeros(2)}, place)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc1\.bias.*visual_projection\.weight"):
        load(checkpoint)


def test_another_kind_of_encoder_and_a_missing_processor_are_refused(checkpoint: Path) -> None:
    (checkpoint / "image_processor" / "preprocessor_config.json").rename(checkpoint / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"image_processor has none of preprocessor_config\.json"):
        load(checkpoint)
    (checkpoint / "image_encoder" / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(CheckpointError, match="'siglip_vision_model'; allowed: clip_vision_model"):
        load(checkpoint)


def test_a_file_that_cannot_be_read_is_named(checkpoint: Path) -> None:
    (checkpoint / "image_encoder" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"image_encoder/model\.safetensors cannot be read"):
        load(checkpoint)


def test_embeddings_have_the_dtype_that_was_asked_for(checkpoint: Path) -> None:
    assert load(checkpoint, torch.bfloat16).encode([picture(1)]).dtype == torch.bfloat16
