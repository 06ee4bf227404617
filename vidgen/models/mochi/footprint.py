"""What a Mochi 1 request takes of a GPU, in numbers alive. Standard library only; the constants are counts.

Counted on this family's networks without weights at 480 x 848; a test repeats the count.
"""

from __future__ import annotations

from vidgen.models.mochi.params import Params
from vidgen.models.mochi.spec import tokens
from vidgen.specs import footprint
from vidgen.specs.limits import branches
from vidgen.types import Request

INNER, WIDTHS = 4.0, 5.9
"""Gate, value and both their products in the feed-forward; beside them the stream, its normed copies, and the angles of
every head in fp32."""
WORK = 14.3
"""Of the finest level's channels and the frames of a latent frame: a residual block and its convolution's buffers."""
HELD = 25.5
"""Of the finest level's channels: two frames before each convolution."""


def footprint_of(request: Request, params: Params) -> footprint.Footprint:
    t, vae = params.transformer, params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_factor
    finest = vae.decoder_block_out_channels[0]
    height, width = request.height // vae.spatial_factor, request.width // vae.spatial_factor
    return footprint.Footprint(
        tokens=tokens(request, params),
        width=t.width,
        token=INNER * t.ffn_dim + WIDTHS * t.width,
        branches=branches(request),
        latents=footprint.latents(t.in_channels, frames, height, width),
        frames=vae.temporal_factor,
        work=finest * WORK * vae.temporal_factor,
        held=finest * HELD,
        kept=params.text_tokens * t.pooled_projection_dim,
        text=params.text_tokens,
    )
