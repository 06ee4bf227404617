"""What a HunyuanVideo request takes of a GPU, in numbers alive. Standard library only; the constants are counts.

Counted on this family's networks without weights at 512 x 768 and 720 x 1280; a test repeats the count.
"""

from __future__ import annotations

from vidgen.models.hunyuan.params import TEXT_TOKENS, Params
from vidgen.models.hunyuan.spec import branches, tokens
from vidgen.specs import footprint
from vidgen.types import Request

WIDTHS = 5.1
"""Beside the two inner activations of the feed-forward: the stream, its normed copies, and the angles of the positions
in fp32."""
TILE_FRAMES = 17
"""The decoder works on tiles in time, always."""
WORK = 11.35
"""Of the finest level's channels and the frames of a tile: a residual block at twice that width, and as much as goes
into and comes out of its convolution again, which cuDNN lays out anew."""


def footprint_of(request: Request, params: Params) -> footprint.Footprint:
    t, vae = params.transformer, params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_compression_ratio
    ratio = vae.spatial_compression_ratio
    return footprint.Footprint(
        tokens=tokens(request, params),
        width=t.width,
        token=2 * t.ffn_dim + WIDTHS * t.width,
        branches=branches(request),
        latents=footprint.latents(t.in_channels, frames, request.height // ratio, request.width // ratio),
        frames=TILE_FRAMES,
        work=WORK * vae.block_out_channels[0] * TILE_FRAMES,
        kept=TEXT_TOKENS * t.width,
        text=TEXT_TOKENS,
    )
