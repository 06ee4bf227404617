"""The most that one conditioning medium may be: each limit holds before the memory or the time would be spent.

Refuses to know formats. PIL's own limit on pixels is a global that any library may have changed: it is not relied on.
"""

from __future__ import annotations

IMAGE_BYTES = 128 * 2**20
"""Of an image file, and of one frame of a zip or folder: a picture of PIXELS pixels as PNG is about as large."""
VIDEO_BYTES = 2 * 2**30
"""Of a video file or a zip: ten seconds of 4K as an editor keeps them (ProRes) are half of it."""
PIXELS = 2**26
"""Of an image or a frame: 67 megapixels, more than cameras and 8K have; decoded they are 192 MiB."""
ENTRIES = 50_000
"""Files in a zip or folder of frames: half an hour of frames, beyond any model; what lists them stays small."""
DIRECTORY_BYTES = 8 * 2**20
"""Of a zip's directory, which is read whole when the zip is opened: ENTRIES names of 100 letters."""
CELL_BATCH_BYTES = 32 * 2**20
"""Of a Parquet file's cells held at a time, by their average size."""
CELL_BATCH_ROWS = 64
"""Rows of a binary column held at a time: a value that many rows share is stored once and read once a row."""
