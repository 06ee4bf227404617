"""Sizes of CLIP's vision model, and how many numbers the weights of CLIP's models hold. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClipVisionParams:
    """Sizes of the vision model, named as in its config.json (or in the vision_config of a Llava)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    num_channels: int

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


def clip_vision_weights(v: ClipVisionParams) -> int:
    """Numbers in the weights of the vision model."""
    d = v.hidden_size
    embeddings = d + d * v.num_channels * v.patch_size**2 + v.tokens * d
    return embeddings + v.num_hidden_layers * clip_layer_weights(d, v.intermediate_size) + 2 * 2 * d


def clip_layer_weights(width: int, inner: int) -> int:
    """Numbers in the weights of one layer, the same for text and vision: attention, two norms, and a feed-forward of
    `inner` features."""
    return 4 * (width * width + width) + 2 * width * inner + inner + width + 2 * 2 * width
