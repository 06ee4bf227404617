"""CLIP vision encoders, from transformers: what cross-attention to an image looks at.

Refuses to know what a video is, how images are fitted to a size, and the network: everything is read from a local
folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import load_weights
from vidgen.errors import CheckpointError
from vidgen.text.configs import load_config

FILES = frozenset({"preprocessor_config.json", "processor_config.json"})
"""Files of which an image processor has one at least."""
PREFIX = "vision_model."
"""What transformers before version 5 put before the encoder's keys: all of the published Wan checkpoints have it."""


@dataclass
class ImageEncoder:
    """A CLIP vision model and the processor that fits a picture to its size and normalises it. The processor is the
    one that works on PIL pictures, whatever else is installed, so that its pixels are the same everywhere."""

    model: nn.Module
    processor: CLIPImageProcessorPil

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Pictures, uint8 RGB [H, W, 3] each -> [pictures, L, D] in the encoder's dtype: the hidden states before the
        last layer, of the class token and then of the patches. Each picture is encoded alone."""
        place = next(self.model.parameters())
        found = []
        for image in images:
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(place.device)
            found.append(self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2])
        return torch.cat(found)


def load_image_encoder(
    folder: CheckpointFolder,
    *,
    component: str = "image_encoder",
    processor: str = "image_processor",
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ImageEncoder:
    """The encoder and processor of a local checkpoint; CheckpointError names what is missing, extra or unsupported."""
    assert folder.local is not None, "an image encoder is loaded from a local folder"
    name = folder.resolved.name
    config = load_config(folder, component, ("clip_vision_model",))
    if not {path.rpartition("/")[2] for path in folder.files(processor)} & FILES:
        raise CheckpointError(f"{name}: {processor} has none of {', '.join(sorted(FILES))}")
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    # Computed, not stored.
    positions = torch.arange(model.embeddings.num_positions, device=device).unsqueeze(0)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    holder = nn.Module()
    holder.vision_model = model
    load_weights(holder if _prefixed(folder, component) else model, folder, component, dtype=dtype, device=device)
    fitted = CLIPImageProcessorPil.from_pretrained(folder.local / processor, local_files_only=True)
    return ImageEncoder(model, fitted)


def _prefixed(folder: CheckpointFolder, component: str) -> bool:
    assert folder.local is not None
    for path in folder.weights(component):
        try:
            with safe_open(str(folder.local / path), framework="pt", device="cpu") as file:
                return any(key.startswith(PREFIX) for key in file.keys())  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError):
            break  # loading says which file cannot be read
    return False
