"""Garbage collection: objects below data/ that no commit names, and saved states that nobody can go on from.

An orphan of a terminal item may go at any age, an object of a pending item never below two hours: a replica may be
about to commit it. The saved state of a pending item stays, whatever its age. Generations, commit and age are read
again just before each deletion; ages are by the store's clock, since this machine's may be wrong. What killed processes
left behind unread goes too: half-written local files, and the objects by which a start asked the store something.
Nothing else is ever deleted.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from vidgen import faults
from vidgen.store import commits, ledger, resume
from vidgen.store.objects import Objects, is_question, new_token

SAFE_SECONDS = 2 * 3600.0


@dataclass(frozen=True, slots=True)
class Swept:
    """What gc saw and took. `temporaries` are half-written local files, and questions to the store, of processes that
    died."""

    seen: int
    removed: int
    bytes: int
    temporaries: int


def collect(
    objects: Objects,
    older_than: float,
    *,
    before_delete: Callable[[], None] = lambda: None,
    dry_run: bool = False,
    now: Callable[[], float] | None = None,
) -> Swept:
    """Deletes orphans at least `older_than` seconds old. Below two hours the caller must hold the lease;
    `before_delete` is called before each deletion and may raise. `now` is the store's time (None: it is asked; a
    `dry_run`, which writes nothing, believes this machine)."""
    seen = removed = size = 0
    now = now or (time.time if dry_run else _store_clock(objects))
    named = _named(objects)
    for entry in itertools.chain(objects.list("data"), objects.list(resume.FOLDER)):
        seen += 1
        old = now() - entry.mtime >= older_than
        if not old or named(entry.path):
            continue
        useless = partial(_useless, objects, entry.path, older_than, now)
        if useless() if dry_run else _deleted(objects, entry.path, useless, before_delete):
            removed += 1
            size += entry.size
    temporaries = 0 if dry_run else _sweep_questions(objects, before_delete, max(older_than, SAFE_SECONDS), now)
    temporaries += 0 if dry_run else objects.sweep_temporaries("", now() - max(older_than, SAFE_SECONDS))
    return Swept(seen, removed, size, temporaries)


def _deleted(objects: Objects, path: str, useless: Callable[[], bool], before_delete: Callable[[], None]) -> bool:
    def still() -> bool:
        if wanted := useless():
            before_delete()
        return wanted

    with faults.around("gc delete"):
        return objects.delete(path, still)


def _sweep_questions(
    objects: Objects, before_delete: Callable[[], None], older_than: float, now: Callable[[], float]
) -> int:
    left = [entry for entry in objects.list("epochs") if is_question(entry.path) and now() - entry.mtime >= older_than]
    for entry in left:
        before_delete()
        with faults.around("gc delete"):
            objects.delete(entry.path)
    return len(left)


def item_of(path: str) -> str:
    """The item whose video an object below data/ is, by its name."""
    return path.rsplit("/", 1)[-1].split("-", 1)[0]


def _named(objects: Objects) -> Callable[[str], bool]:
    """Whether the ledger's current rows name a video: then it is no orphan, and no commit need be read to know it.
    8 bytes of memory a video; of two that share a digest, one orphan may stay."""
    generations = commits.read_generations(objects)
    known = [np.empty(0, np.uint64)]
    for table in ledger.read_tables(objects):
        columns = (table.column(name).to_pylist() for name in ("item_id", "generation", "video"))
        current = [
            _digest(video)
            for item_id, generation, video in zip(*columns, strict=True)
            if generation == generations.get(item_id, 0)
        ]
        known.append(np.array(current, np.uint64))
    digests = np.sort(np.concatenate(known))

    def named(path: str) -> bool:
        digest = np.uint64(_digest(path))
        place = np.searchsorted(digests, digest)
        return bool(place < len(digests) and digests[place] == digest)

    return named


def _digest(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def _useless(objects: Objects, path: str, older_than: float, now: Callable[[], float]) -> bool:
    if not path.startswith(f"{resume.FOLDER}/"):
        return _orphan(objects, path, older_than, now)
    if (named := resume.of_path(path)) is None:
        return False
    generation, item_id = named
    current = commits.read_generations(objects).get(item_id, 0)
    return generation < current or commits.read_commit(objects, current, item_id) is not None


def _orphan(objects: Objects, path: str, older_than: float, now: Callable[[], float]) -> bool:
    item_id = item_of(path)
    generation = commits.read_generations(objects).get(item_id, 0)
    record = commits.read_commit(objects, generation, item_id)
    entry = objects.head(path)
    if entry is None or (record is not None and record.video == path):
        return False
    return now() - entry.mtime >= (older_than if record is not None else max(older_than, SAFE_SECONDS))


def _store_clock(objects: Objects) -> Callable[[], float]:
    with faults.around("clock"):
        ahead = objects.now(new_token()) - time.time()
    return lambda: time.time() + ahead
