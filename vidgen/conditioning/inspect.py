"""What a plan learns of a medium without decoding it: that it is there, within the limits, its digest, and what its
header says. Refuses to know rows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO

from vidgen.conditioning import clips, pictures
from vidgen.conditioning.limits import IMAGE_BYTES, VIDEO_BYTES
from vidgen.conditioning.sources import find, folder_digest, frames_in
from vidgen.errors import ItemError
from vidgen.types import Media, Request


@dataclass(frozen=True, slots=True)
class Seen:
    """A medium, and what its header says of it: `size` (height, width) and `frames` where that is cheap to know.
    `name` is how messages call it, "" for bytes in a cell."""

    media: Media
    name: str
    size: tuple[int, int] | None = None
    frames: int | None = None

    def misfits(self, request: Request) -> list[str]:
        """Why it cannot condition this request, as far as the header tells."""
        found = []
        if self.frames is not None:
            found.append(clips.wrong_count(self.frames, request.num_frames))
        if self.size is not None:
            found.append(pictures.misfit(self.size, (request.height, request.width), request.resize))
        return [f"{self.name} {problem}".lstrip() for problem in found if problem is not None]


def at(url: str, video: bool) -> Seen:
    """The image or video at a URL or absolute path; ItemError, with the name, says what is wrong with it. Of a remote
    video whose store names its content nothing is read."""
    file = find(url)
    if file.folder:
        if not video:
            raise ItemError(f"{file.name} is a folder, not a picture")
        frames = frames_in(file)
        with frames[0].open() as handle:
            size = _named(frames[0].name, handle, False)[1]
        return Seen(Media(url, folder_digest(frames)), file.name, size, len(frames))
    media = Media(url, file.digest(VIDEO_BYTES if video else IMAGE_BYTES))
    if video and file.tag:
        return Seen(media, file.name)
    with file.open() as handle:
        count, size = _named(file.name, handle, video)
    return Seen(media, file.name, size, count)


def held(data: bytes, digest: str, url: str, video: bool) -> Seen:
    """The image or video whose bytes, of this sha256, stand in the cell at `url`; ItemError, without a name, as for
    `at`."""
    most = VIDEO_BYTES if video else IMAGE_BYTES
    if len(data) > most:
        raise ItemError(f"has {len(data):,} bytes; allowed: at most {most:,}")
    with io.BytesIO(data) as file:  # closed at once: what PIL made of it may live until the next garbage collection
        count, size = _header(file, video)
    return Seen(Media(url, digest), "", size, count)


def _named(name: str, file: IO[bytes], video: bool) -> tuple[int | None, tuple[int, int] | None]:
    try:
        return _header(file, video)
    except ItemError as error:
        raise ItemError(f"{name} {error}") from error


def _header(file: IO[bytes], video: bool) -> tuple[int | None, tuple[int, int] | None]:
    """(frames, size) as far as they are cheap to know."""
    if not video:
        return None, pictures.header_size(file)
    return clips.header(file) or (None, None)
