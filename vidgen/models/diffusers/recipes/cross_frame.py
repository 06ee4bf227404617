"""Cross-frame attention: an image model makes a video when all frames look at the first (Khachatryan et al. 2023).

Text2Video-Zero, section 3.3.2: keys and values of self-attention are those of the first frame. Refuses to know
pipelines.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers


@contextmanager
def cross_frame_attention(branches: int, *networks: Any) -> Iterator[None]:
    """For the length of the block, the networks' self-attention sees the first frame; a batch is `branches` x frames.

    The processor is the library's own, found where its Text2Video-Zero pipeline is (a place that changed between
    releases).
    """
    home = importlib.import_module(diffusers.TextToVideoZeroPipeline.__module__)
    before = [network.attn_processors for network in networks]
    for network in networks:
        network.set_attn_processor(home.CrossFrameAttnProcessor2_0(batch_size=branches))
    try:
        yield
    finally:
        for network, processors in zip(networks, before, strict=True):
            network.set_attn_processor(dict(processors))
