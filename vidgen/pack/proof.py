"""`vidgen verify` of a pack: every object that `vidgen pack` wrote is there, byte for byte, from the last word down.

`_SUCCESS.json` names index.json by its hash, that names each shard, a shard's entry its files. Reads only; refuses to
know the run that was packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vidgen.pack.job import INDEX, PACK, SUCCESS, Entry
from vidgen.pack.layouts import File, sha256_of
from vidgen.store.objects import Objects

AGAIN = "the same `vidgen pack` makes again what is missing"


@dataclass(slots=True)
class Proof:
    """What was found. `problems` name the object, and what makes it again; `files` are those of shards, `read` how many
    of them were read."""

    videos: int = 0
    shards: int = 0
    files: int = 0
    read: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def is_pack(place: str) -> bool:
    """Whether a pack lies there, finished or not."""
    return Objects(place).exists(PACK)


def prove(place: str, *, fast: bool = False, sample: float = 1.0, seed: int = 0) -> Proof:
    """Holds a pack against its own index. `fast`: files by their size alone; `sample`: share of the files that are
    read. A shard's file is read whole: on a store that is no disk, into memory."""
    objects, proof, chosen = Objects(place), Proof(), random.Random(seed)
    try:
        hashes = json.loads(objects.read(SUCCESS))["sha256"]
    except FileNotFoundError:
        proof.problems.append(f"{SUCCESS} is not there: the pack was not finished; {AGAIN}")
        return proof
    for name, digest in hashes.items():
        if _sha256(objects, name) != digest:
            proof.problems.append(f"{name} is not what {SUCCESS} names; {AGAIN}")
    if proof.problems:
        return proof
    entries = {entry.line()["name"]: entry for entry in _entries(objects)}
    for line in json.loads(objects.read(INDEX))["shards"]:
        proof.shards += 1
        entry = entries.get(line["name"])
        if entry is None or entry.line() != line:
            proof.problems.append(f"{line['name']}: its entry below index/ is gone or another; {AGAIN}")
            continue
        proof.videos += entry.videos
        for file in entry.files:
            proof.files += 1
            whole = not fast and (sample >= 1 or chosen.random() < sample)
            proof.read += whole
            if wrong := _wrong(objects, file, whole):
                proof.problems.append(f"{wrong}; delete index/{entry.shard}.json, and {AGAIN}")
    return proof


def _entries(objects: Objects) -> Iterator[Entry]:
    for found in objects.list("index"):
        if found.path.endswith(".json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged one is missed by index.json
                yield Entry.from_bytes(objects.read(found.path))


def _wrong(objects: Objects, file: File, whole: bool) -> str:
    size = objects.size(file.name)
    if size is None:
        return f"{file.name} is not there"
    if size != file.bytes:
        return f"{file.name} has {size} bytes, its entry says {file.bytes}"
    same = not whole or _sha256(objects, file.name) == file.sha256
    return "" if same else f"{file.name} has another sha256 than its entry says"


def _sha256(objects: Objects, name: str) -> str:
    """Of an object; "" if there is none."""
    try:
        if objects.local:
            return sha256_of(Path(objects.path(name)))
        return hashlib.sha256(objects.read(name)).hexdigest()
    except FileNotFoundError:
        return ""
