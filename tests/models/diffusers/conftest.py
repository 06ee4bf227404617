"""Checkpoints made once, and the engine over the diffusers backend."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.diffusers import tiny_checkpoint
from vidgen import engine, media
from vidgen.types import Request

Checkpoint = Callable[..., Path]
MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_checkpoint.stable_diffusion,
    "ip2p": tiny_checkpoint.instruct_pix2pix,
    "controlnet": tiny_checkpoint.controlnet,
    "motion_adapter": tiny_checkpoint.motion_adapter,
    "svd": lambda folder: tiny_checkpoint.stable_video_diffusion(folder, 14),
    "svd_xt": lambda folder: tiny_checkpoint.stable_video_diffusion(folder, 25),
    "i2vgen_xl": tiny_checkpoint.i2vgen_xl,
}


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return once


def load(folder: Path, *, options: dict[str, Any] | None = None, **settings: Any) -> engine.Engine:
    """The engine over a checkpoint, with `options` as a configuration has them."""
    given = tuple(sorted((options or {}).items()))
    return engine.load(str(folder), family="diffusers", device="cpu", options=given, **settings)


def frames(loaded: engine.Engine, *requests: Request) -> list[np.ndarray]:
    return [np.concatenate(list(video.chunks)) for video in loaded.generate(requests)]


def written(loaded: engine.Engine, request: Request, place: Path, format: str = "mp4") -> media.Encoded:
    """One request as far as a file on the disk."""
    (video,) = loaded.generate([request])
    return media.write(video, place, format=format)


def picture(height: int, width: int, shade: int = 0) -> Image.Image:
    """A disc on a ramp: something to recognise."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60 + shade)], -1).astype(np.uint8)
    pixels[np.hypot(y - height / 2, x - width / 2 - shade) < height / 4] = (250, 240, 20)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def clip(count: int, height: int, width: int) -> tuple[list[Image.Image], bytes]:
    """Frames, and the zip of PNGs that holds them."""
    pictures = [picture(height, width, shade=2 * index) for index in range(count)]
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for index, image in enumerate(pictures):
            archive.writestr(f"{index:05}.png", png(image))
    return pictures, data.getvalue()


def same(uint8: np.ndarray, floats: Any, tolerance: float = 1e-5) -> None:
    """Our frames are the library's own call's: nothing but the rounding to uint8 (0.5) lies between."""
    expected = floats.numpy() if isinstance(floats, torch.Tensor) else np.asarray(floats)
    assert uint8.shape == expected.shape
    assert expected.std() > 0.02, "the oracle's frames are flat, so that they would prove nothing"
    assert np.abs(uint8.astype(np.float64) - expected * 255).max() <= 0.5 + tolerance * 255
