"""Where a process puts what it has not stored yet: a folder of its own on the local disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

from vidgen.store.epochs import start_time
from vidgen.store.objects import new_token


def folder() -> Path:
    """A folder of this process below the system's temporary one; those of processes that died are swept."""
    root = Path(tempfile.gettempdir()) / f"vidgen-{os.getuid() if hasattr(os, 'getuid') else 0}"
    root.mkdir(exist_ok=True)
    for other in root.iterdir():
        with contextlib.suppress(ValueError):
            host, pid, begun, _ = other.name.rsplit("_", 3)
            if host == socket.gethostname() and start_time(int(pid)) != begun:
                shutil.rmtree(other, ignore_errors=True)
    own = root / f"{socket.gethostname()}_{os.getpid()}_{start_time(os.getpid()) or 0}_{new_token()}"
    own.mkdir()
    return own
