"""What an Allegro request takes of a GPU, in numbers alive. Standard library only; the constants are counts.

Counted on this family's networks without weights at 720 x 1280; a test repeats the count.
"""

from __future__ import annotations

from vidgen.models.allegro.params import Params
from vidgen.models.allegro.spec import grid, tokens
from vidgen.specs import footprint
from vidgen.specs.limits import branches
from vidgen.types import Request

WIDTHS = 5.2
"""Beside the two inner activations of the feed-forward: the stream, its normed copies, and the angles of the positions
in fp32."""
WORK = 10.3
"""Of the finest level's channels and the frames of a tile: a residual block over time and its convolution's buffers."""


def footprint_of(request: Request, params: Params) -> footprint.Footprint:
    t, vae = params.transformer, params.vae
    return footprint.Footprint(
        tokens=tokens(request, params),
        width=t.width,
        token=4 * 2 * t.width + WIDTHS * t.width,
        branches=branches(request),
        latents=footprint.latents(t.in_channels, *grid(request, params)),
        frames=vae.tile[0],
        work=WORK * vae.block_out_channels[0] * vae.tile[0],
        kept=2 * t.num_layers * t.width * params.text_tokens,
    )
