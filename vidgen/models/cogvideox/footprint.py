"""What a CogVideoX request takes of a GPU, in numbers alive. Standard library only; the constants are counts.

Counted on this family's networks without weights at published sizes (2B, 5B and 1.5; 480 x 720 and 768 x 1360); a test
repeats the count.
"""

from __future__ import annotations

from vidgen.models.cogvideox.params import Params
from vidgen.models.cogvideox.spec import CHUNK, added_frames, latent_frames, tokens
from vidgen.specs import footprint
from vidgen.specs.limits import branches
from vidgen.types import Request

WIDTHS = 4.0
"""Beside the two inner activations of the feed-forward: the stream, its normed copy, and what attention returned."""
WORK = 104.0
"""Of the finest level's channels: eight frames in a residual block, with the modulation of its spatial norm."""
HELD = 32.0
"""Of the same: two frames before each convolution."""


def footprint_of(request: Request, params: Params) -> footprint.Footprint:
    t, vae = params.transformer, params.vae
    frames = latent_frames(request, params) + added_frames(request, params)
    finest = vae.block_out_channels[0]
    height, width = request.height // vae.spatial_factor, request.width // vae.spatial_factor
    return footprint.Footprint(
        tokens=tokens(request, params),
        width=t.width,
        token=4 * 2 * t.width + WIDTHS * t.width,
        branches=branches(request),
        latents=footprint.latents(t.in_channels, frames, height, width),
        frames=CHUNK,
        work=finest * WORK,
        held=finest * HELD,
        kept=params.text_tokens * t.width,
        text=params.text_tokens,
    )
