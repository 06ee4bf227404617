"""What a Wan request takes of a GPU, in numbers alive. Standard library only; the constants are counts, see below.

Counted on this family's networks without weights at published sizes (1.3B, 14B; 480 x 832 and 720 x 1280); a test
repeats the count.
"""

from __future__ import annotations

from vidgen.models.wan.params import Params
from vidgen.specs import footprint
from vidgen.specs.limits import branches
from vidgen.types import Request

WIDTHS = 6.2
"""Beside the two inner activations of the feed-forward: the stream, its normed copies, the queries of cross-attention,
and the angles of the positions in fp32."""
WORK, WORK_RESIDUAL = 57.0, 68.0
"""Of the finest level's channels: the four frames of a latent frame in a residual block, their norm in fp32; the second
with the shortcuts of Wan 2.2 5B."""
HELD, HELD_RESIDUAL = 25.0, 28.0
"""Of the same: two frames before each convolution."""


def footprint_of(request: Request, params: Params) -> footprint.Footprint:
    """Text keys and values are those of the expert at work."""
    t, vae = params.transformer, params.vae
    frames = 1 + (request.num_frames - 1) // vae.temporal_factor
    height, width = request.height // vae.spatial_factor, request.width // vae.spatial_factor
    tokens = (frames // t.patch_size[0]) * (height // t.patch_size[1]) * (width // t.patch_size[2])
    images = params.images * params.image.tokens if params.image is not None else 0
    finest = vae.decoder_base_dim * vae.dim_mult[0] / vae.patch_size**2
    return footprint.Footprint(
        tokens=tokens,
        width=t.width,
        token=2 * t.ffn_dim + WIDTHS * t.width,
        branches=branches(request),
        latents=footprint.latents(t.in_channels, frames, height, width),
        frames=vae.temporal_factor,
        work=finest * (WORK_RESIDUAL if vae.is_residual else WORK),
        held=finest * (HELD_RESIDUAL if vae.is_residual else HELD),
        kept=2 * t.num_layers * t.width * (params.text_tokens + images),
    )
