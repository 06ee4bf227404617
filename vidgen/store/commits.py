"""The terminal state of each item: commits, the attempts before them, and the generations that reopen them.

State of an item = its commit in the highest generation that lists it (generation 0 lists all), else pending. Everything
here is create-only, so whoever is first decides and nobody can take it back. Names that nobody here writes (a
`.DS_Store`, a copy that a file manager made) are passed over. Refuses to know who drives and why.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vidgen import faults
from vidgen.errors import DamagedError
from vidgen.store.objects import Objects
from vidgen.types import Record

_COMMIT = re.compile(r"(?P<item>[0-9a-f]{32})\.json")
_GENERATION = re.compile(r"(?P<number>[1-9]\d*)\.parquet")
_ATTEMPT = re.compile(r"g(?P<generation>\d+)-(?P<class>\w+)-(?P<count>[\d.]+)-(?P<token>\w+)\.json")


def commit_path(generation: int, item_id: str) -> str:
    return f"commits/g{generation}/{item_id[:2]}/{item_id}.json"


def video_path(item_id: str, sha256: str, extension: str) -> str:
    return f"data/{item_id[:2]}/{item_id}-{sha256[:12]}.{extension}"


def commit(objects: Objects, record: Record, token: str) -> tuple[bool, Record]:
    """Creates the commit of an item. Returns (ours, the record that counts): whoever was first is the truth."""
    path = commit_path(record.generation, record.item_id)
    data = json.dumps({**record.to_dict(), "token": token}).encode()
    with faults.around("commit"):
        ours = objects.create(path, data, token)
    if ours:
        return True, record
    return False, _read(objects, path)


def read_commit(objects: Objects, generation: int, item_id: str) -> Record | None:
    """The commit of an item in one generation, or None."""
    try:
        return _read(objects, commit_path(generation, item_id))
    except FileNotFoundError:
        return None


def list_commits(objects: Objects, generation: int) -> Iterator[str]:
    """Item ids committed in one generation, from a listing alone."""
    for entry in objects.list(f"commits/g{generation}"):
        if (found := _COMMIT.fullmatch(_name(entry.path))) is not None:
            yield found["item"]


def list_generations(objects: Objects) -> list[int]:
    """Generations after 0, ascending."""
    found = (_GENERATION.fullmatch(_name(entry.path)) for entry in objects.list("generations"))
    return sorted(int(one["number"]) for one in found if one is not None)


def read_generations(objects: Objects, numbers: Iterable[int] | None = None) -> dict[str, int]:
    """Item id -> the highest generation that lists it; items that no generation reopened are absent. `numbers` are what
    `list_generations` said, if it was asked already."""
    highest: dict[str, int] = {}
    for generation in list_generations(objects) if numbers is None else numbers:
        table = pq.read_table(io.BytesIO(objects.read(f"generations/{generation}.parquet")), columns=["item_id"])
        for item_id in table.column("item_id").to_pylist():
            highest[item_id] = generation
    return highest


def create_generation(objects: Objects, generation: int, item_ids: Iterable[str], token: str) -> bool:
    """Reopens items in a new generation; False if that generation exists already and is somebody else's."""
    table = pa.table({"item_id": pa.array(sorted(item_ids), pa.string())})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"token": token}), sink)
    with faults.around("generation"):
        return objects.create(f"generations/{generation}.parquet", sink.getvalue(), token)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Evidence of one failed attempt. `count` is what it weighs: 1, 0.5 (a crash of the replica) or 0 (withheld)."""

    item_id: str
    generation: int
    error_class: str
    count: float
    token: str

    @property
    def path(self) -> str:
        return f"attempts/{self.item_id}/g{self.generation}-{self.error_class}-{self.count:g}-{self.token}.json"

    @classmethod
    def from_path(cls, path: str) -> Attempt | None:
        """The attempt of a path below attempts/; None for a name that nobody here wrote."""
        item_id, name = path.rsplit("/", 2)[-2:]
        found = _ATTEMPT.fullmatch(name)
        if found is None:
            return None
        return cls(item_id, int(found["generation"]), found["class"], float(found["count"]), found["token"])


def record_attempt(objects: Objects, attempt: Attempt, evidence: Mapping[str, object]) -> None:
    """Writes the evidence of an attempt; the name alone says what it counts."""
    data = json.dumps({**evidence, "count": attempt.count, "token": attempt.token}).encode()
    with faults.around("evidence"):
        objects.create(attempt.path, data, attempt.token)


def read_attempts(objects: Objects, item_id: str = "") -> Iterator[Attempt]:
    """All attempts ever recorded, or those of one item, from a listing alone."""
    for entry in objects.list(f"attempts/{item_id}".rstrip("/")):
        if (attempt := Attempt.from_path(entry.path)) is not None:
            yield attempt


def read_evidence(objects: Objects, attempt: Attempt) -> dict[str, Any]:
    """What was said of an attempt: `error`, and `node`, `rungs`, `next` where they are known; {} if it is damaged."""
    try:
        evidence = json.loads(objects.read(attempt.path))
    except ValueError:
        return {}
    return evidence if isinstance(evidence, dict) else {}


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _read(objects: Objects, path: str) -> Record:
    data = objects.read(path)
    try:
        return Record.from_dict(json.loads(data))
    except (ValueError, AttributeError, TypeError) as error:
        raise DamagedError(
            f"{objects.url}: {path} is damaged ({error}); restore it, or delete it, and its item is made again"
        ) from error
