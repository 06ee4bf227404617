"""The ffmpeg binary that imageio-ffmpeg ships: where it is, and what its failures mean."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal

import imageio_ffmpeg

from vidgen.errors import GenerationError, InfrastructureError, ItemError, UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a disk, with which ffmpeg ends as 256 less the number."""


def failure(what: str, status: int, log: str) -> GenerationError:
    """The error to raise for an ffmpeg that ended with `status`, with the first line that its log has on it:
    InfrastructureError for a full disk, one that fails, or a process that was ended from outside, else ItemError."""
    # "[mov @ 0x55d0c3] [error] moov atom not found": the address differs each time and would split equal failures.
    errors = [line for line in log.splitlines() if "[error]" in line or "[fatal]" in line]
    lines = [re.sub(r" @ 0x[0-9a-f]+|\[(error|fatal)\] ", "", line).strip() for line in errors or log.splitlines()]
    # What came first is the cause; what follows comes from several threads, in an order of its own each time.
    # A full disk may hold no log either; of a file that is cut, EIO is what ffmpeg ends with, too, after a word on it.
    disk = [number for number in _DISK if number != errno.EIO or not lines]
    full = next((os.strerror(number) for number in disk if status == 256 - number), "")
    message = f"{what} (exit status {status}): {lines[0] if lines else full or 'no message'}"
    if full or os.strerror(errno.ENOSPC) in log or status in (-signal.SIGKILL, -signal.SIGTERM):
        return InfrastructureError(message)
    return ItemError(message)


@functools.lru_cache(maxsize=1)
def executable() -> str:
    """Its path; UserError where there is none."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"no ffmpeg: {error}") from error
