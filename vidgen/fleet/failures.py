"""What an exception says of the item that it ended: its failure class, and one line for whoever reads of it.

Refuses to know what a class counts: `vidgen.fleet.judgement` does.
"""

from __future__ import annotations

import errno

from vidgen.errors import GenerationError, InfrastructureError, printable
from vidgen.redaction import clean

CONNECTION_ERRORS = (ConnectionError, TimeoutError)
STORAGE_ERRORS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE}
"""Of disks and shared folders, none of which is the item's fault."""


def classify(error: BaseException) -> str:
    """The failure class of an exception: item, capacity or infrastructure."""
    if isinstance(error, GenerationError):
        return error.error_class
    if isinstance(error, MemoryError):
        return "capacity"
    if isinstance(error, CONNECTION_ERRORS) or (isinstance(error, OSError) and error.errno in STORAGE_ERRORS):
        return InfrastructureError.error_class
    return "item"


def describe(error: BaseException) -> str:
    """One line that no terminal obeys, and no secret in it: the message, with the type's name unless the error is one
    of ours."""
    text = printable(clean(" ".join(str(error).split())))
    named = isinstance(error, GenerationError) and bool(text)
    return text[:2000] if named else f"{type(error).__name__}: {text}"[:2000]
