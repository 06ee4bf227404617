"""How the server of the crash tests must be started: its libraries start threads of their own otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def environment(root: Path) -> dict[str, str]:
    """In which the server has one thread."""
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
