"""What was saved in the middle of denoising: one object for an item and generation, written over as it goes on.

Whatever is here may be lost, torn or old without harm: an item that finds nothing begins at its start. Refuses to know
what a state is, and when one is worth keeping.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vidgen.store.objects import Objects

FOLDER = "resume"
_NAME = re.compile(r"(?P<item>[0-9a-f]+)-g(?P<generation>\d+)\.safetensors")


def resume_path(generation: int, item_id: str) -> str:
    return f"{FOLDER}/{item_id}-g{generation}.safetensors"


def of_path(path: str) -> tuple[int, str] | None:
    """(generation, item id) of an object below resume/; None for one that nobody here wrote."""
    found = _NAME.fullmatch(path.rsplit("/", 1)[-1])
    return None if found is None else (int(found["generation"]), found["item"])


def list_saved(objects: Objects) -> Iterator[tuple[int, str]]:
    """(generation, item id) of every saved state, from a listing alone."""
    for entry in objects.list(FOLDER):
        if (found := of_path(entry.path)) is not None:
            yield found
