"""Conditioning media of a request: read, checked against the plan, decoded, and fitted to the request's size.

    places     what a cell's text means as a URL          sources    bytes and digests
    cells      bytes that stand in a Parquet cell         pictures   one still picture
    clips      videos, zips and folders of frames         limits     the most a medium may be
    inspect    what a plan learns without decoding

numpy and PIL, no torch. Refuses to know what a model does with the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vidgen.conditioning import clips, pictures
from vidgen.conditioning.places import shown
from vidgen.conditioning.sources import open_video, read_image
from vidgen.errors import ItemError
from vidgen.types import Media, Request


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Decoded conditioning media of one request, at its size: uint8 RGB [H, W, 3], and [F, H, W, 3] for the video."""

    image: np.ndarray | None = None
    last_image: np.ndarray | None = None
    video: np.ndarray | None = None


def read(request: Request) -> Conditioning:
    """The media of a request. ItemError names the medium, where it is, and what is wrong with it: gone, not what was
    planned (its digest), damaged, too large, of another size than `request.resize` lets pass, another number of frames
    than `num_frames`. InfrastructureError if its store cannot be reached."""
    size = (request.height, request.width)
    images: dict[str, np.ndarray | None] = {"image": None, "last_image": None}
    for name in images:
        if (media := getattr(request, name)) is not None:
            with _naming(name):
                data = read_image(media)
            with _naming(name, media):
                images[name] = pictures.fitted(pictures.decode(data), size, request.resize)
    video = None
    if request.video is not None:
        with _naming("video"), open_video(request.video) as clip, _naming("", request.video):
            video = clips.decode(clip, request.num_frames, size, request.resize)
    return Conditioning(images["image"], images["last_image"], video)


@contextmanager
def _naming(name: str, media: Media | None = None) -> Iterator[None]:
    """ItemErrors of the body begin with the medium's field, and its place where the body does not know it."""
    try:
        yield
    except ItemError as error:
        place = "" if media is None else f"{shown(media.url) or 'the data'} "
        raise ItemError(f"{name}: {place}{error}" if name else f"{place}{error}") from error
