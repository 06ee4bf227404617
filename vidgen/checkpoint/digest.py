"""The digest of a safetensors file: its size, its header, and blocks of it at places that name and size decide.

Read in small ranges, so that a shard of many gigabytes on another machine has one too. Refuses to know what a header
says.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import fsspec

BLOCKS, BLOCK_BYTES = 64, 4096


def block_digest(fs: fsspec.AbstractFileSystem, where: str, name: str, size: int) -> bytes:
    """SHA-256 over size, header and blocks of the file of `size` bytes that lies at `where`, and is called `name`
    wherever it lies."""
    header = 8 + int.from_bytes(fs.cat_file(where, start=0, end=8), "little")
    starts = [_place(name, size, k) for k in range(BLOCKS)]
    ends = [min(size, start + BLOCK_BYTES) for start in starts]
    starts, ends = [0, *starts], [min(size, header), *ends]
    digest = hashlib.sha256(str(size).encode())
    if fs.protocol == "hf":  # the one file system whose ranges come over the network and one after another
        with ThreadPoolExecutor(16) as pool:
            blocks = list(pool.map(fs.cat_file, [where] * len(starts), starts, ends))
    else:
        blocks = fs.cat_ranges([where] * len(starts), starts, ends, on_error="raise")
    for block in blocks:
        digest.update(block)
    return digest.digest()


def _place(name: str, size: int, k: int) -> int:
    """Where block k of a file starts, drawn from the file's name and size alone."""
    drawn = hashlib.sha256(f"{name}:{size}:{k}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") % max(1, size - BLOCK_BYTES + 1)
