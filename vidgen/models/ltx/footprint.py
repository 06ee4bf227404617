"""What an LTX-Video request takes of a GPU, in numbers alive. Standard library only; the constants are counts.

Counted on this family's networks without weights at published sizes (2B, 13B; autoencoders 0.9.0, 0.9.1, 0.9.5 at
512 x 768 and 704 x 1216); a test repeats the count.
"""

from __future__ import annotations

from vidgen.models.ltx.params import Params, VAEParams
from vidgen.specs import footprint
from vidgen.specs.limits import branches
from vidgen.types import Request

WIDTHS = 5.2
"""Beside the two inner activations of the feed-forward: the stream, its normed copies, and the angles of the positions
in fp32."""
PIECE_FRAMES = 16
"""Frames of a piece of the decoder's stream at the finest level: two latent frames."""
PIECES = 12.0
"""Pieces that a residual block of the decoder has alive while the stream waits in it: a norm, a convolution and a way
around, twice, some of them in fp32."""
HELD = 0.9
"""The share of these that waits between two pieces, for every tile."""


def footprint_of(request: Request, params: Params) -> footprint.Footprint:
    t, vae = params.transformer, params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_factor
    height, width = request.height // vae.spatial_factor, request.width // vae.spatial_factor
    alive = PIECES * _pieces(vae)
    return footprint.Footprint(
        tokens=frames * height * width,
        width=t.width,
        token=4 * 2 * t.width + WIDTHS * t.width,
        branches=branches(request),
        latents=footprint.latents(t.in_channels, frames, height, width),
        frames=PIECE_FRAMES,
        work=(1 - HELD) * alive,
        held=HELD * alive,
        kept=2 * t.num_layers * t.width * params.max_tokens,
    )


def _pieces(vae: VAEParams) -> float:
    """Numbers of one piece a pixel of the finished picture, times residual blocks, over all levels."""
    total, cells, frames = 0.0, vae.patch_size**2, PIECE_FRAMES
    for stage in reversed(vae.up_stages()):
        total += stage.resnets * stage.outputs * frames / cells
        if stage.upsample:
            cells, frames = cells * 4, max(1, frames // 2)
    return total
