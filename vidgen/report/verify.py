"""`vidgen verify`: proves an output from what lies in the store, believing nobody.

Manifest == plan, every done item's video there once, of the recorded hash, size and frame count, no duplicate. Reads
only.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from vidgen import family, manifest, media
from vidgen.errors import GenerationError
from vidgen.plan.files import part_table, read_plan, total_items
from vidgen.store import commits
from vidgen.store import state as states
from vidgen.store.objects import Objects
from vidgen.types import Plan, Request

READERS = 4
MOST_PROBLEMS = 1000


@dataclass(slots=True)
class Verdict:
    """What was found. `problems` are sentences that name the item or object; at most MOST_PROBLEMS are kept, `failed`
    counts them all. `orphans` are objects below data/ that no commit names."""

    items: int = 0
    rejected: int = 0
    done: int = 0
    not_done: int = 0
    checked: int = 0
    orphans: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.failed == 0

    def problem(self, text: str) -> None:
        self.failed += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(text)


def verify(output: str, *, fast: bool = False, sample: float = 1.0, strict: bool = False, seed: int = 0) -> Verdict:
    """Checks an output. `fast`: listing and sizes only. `sample`: share of the videos read and decoded. `strict`:
    orphans are problems."""
    objects, verdict = Objects(output), Verdict()
    plans = read_plan(objects)
    if not plans:
        verdict.problem(f"{output}: no plan/0/PLAN.json, so there is no run here")
        return verdict
    state = states.load(objects, total_items(plans))
    pending = state.count("pending")
    if pending:
        verdict.problem(f"{pending} of {len(state.status)} items are pending: the run has not finished")
    if not manifest.is_valid(objects, plans, state):
        verdict.problem("_SUCCESS.json is missing or does not match the plan, the generation or the manifest's parts")
        return verdict
    sizes = {entry.path: entry.size for entry in objects.list("data")}
    named = _match(objects, plans, state, sizes, verdict)
    verdict.orphans = sum(path not in named for path in sizes)
    if strict and verdict.orphans:
        verdict.problem(f"{verdict.orphans} objects below data/ are named by no commit; `vidgen gc` removes them")
    if not fast:
        chosen = random.Random(seed)
        rows = (row for row in named.values() if row["video"] in sizes and (sample >= 1 or chosen.random() < sample))
        for item_id, text in check_videos(objects, rows):
            verdict.checked += 1
            if text:
                verdict.problem(f"item {item_id}: {text}")
    return verdict


def _match(
    objects: Objects, plans: Sequence[Plan], state: states.State, sizes: dict[str, int], verdict: Verdict
) -> dict[str, dict[str, Any]]:
    """Holds the manifest against plan, commits and listing. Returns the rows of done items by video."""
    found = manifest.read(objects)
    generations = (0, *commits.list_generations(objects))
    committed = {generation: set(commits.list_commits(objects, generation)) for generation in generations}
    named: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for plan in plans:
        for part in plan.parts:
            planned = part_table(objects, part).column("item_id").to_pylist()
            rows = _rows(next(found, None))
            if [row["item_id"] for row in rows] != planned:
                verdict.problem(f"the manifest's rows differ from the plan's items in {part.name}")
            for row in rows:
                _row(row, state, committed, sizes, named, seen, verdict)
    verdict.items = len(seen)
    for plan in plans:
        for part in plan.rejected:
            rows = _rows(next(found, None))
            verdict.rejected += len(rows)
            if len(rows) != part.items or any(row["status"] != "rejected" for row in rows):
                verdict.problem(f"{len(rows)} rejected rows in the manifest, {part.items} in {part.name}")
    return named


def _row(
    row: dict[str, Any],
    state: states.State,
    committed: dict[int, set[str]],
    sizes: dict[str, int],
    named: dict[str, dict[str, Any]],
    seen: set[str],
    verdict: Verdict,
) -> None:
    item_id, status, path = row["item_id"], row["status"], row["video"]
    if item_id in seen:
        verdict.problem(f"item {item_id} stands in the manifest twice")
    seen.add(item_id)
    generation = state.generation_of(item_id)
    if item_id not in committed[generation]:
        verdict.problem(f"item {item_id} has no commit in generation {generation}")
    if status != "done":
        verdict.not_done += 1
        return
    verdict.done += 1
    if path in named:
        verdict.problem(f"items {item_id} and {named[path]['item_id']} name the same video {path}")
    named[path] = row
    if path not in sizes:
        verdict.problem(f"item {item_id}: {path} is not there")
    elif sizes[path] != row["bytes"]:
        verdict.problem(f"item {item_id}: {path} has {sizes[path]} bytes, the manifest says {row['bytes']}")


def _rows(table: pa.Table | None) -> list[dict[str, Any]]:
    wanted = ["item_id", "status", "video", "sha256", "bytes", "num_frames", "family", "task", "params"]
    return [] if table is None else table.select(wanted).to_pylist()


def _frames_out(row: Mapping[str, Any]) -> int:
    """Frames that the video must have: of some families fewer than were asked for."""
    request = Request(
        task=row["task"],
        prompt="",
        negative_prompt="",
        seed=0,
        height=0,
        width=0,
        num_frames=row["num_frames"],
        fps=1.0,
        num_inference_steps=1,
        guidance_scale=1.0,
        sampler="",
        params=tuple(sorted(json.loads(row["params"] or "{}").items())),
    )
    return family.spec(row["family"]).frames_out(request)


def check_videos(objects: Objects, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Reads, hashes and decodes videos, several at a time: (item id, what is wrong or "") for each manifest row."""

    def check(row: dict[str, Any]) -> tuple[str, str]:
        item_id, path = row["item_id"], row["video"]
        try:
            data = objects.read(path)
        except FileNotFoundError:
            return item_id, f"{path} is not there"
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            return item_id, f"{path} has another sha256 than the manifest says"
        try:
            with _local(objects, path, data) as place:
                frames = media.probe(place).frames
        except GenerationError as error:
            return item_id, f"{path} cannot be decoded: {error}"
        expected = _frames_out(row)
        return item_id, "" if frames == expected else f"{path} has {frames} frames, not {expected}"

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(check, rows)


class _local:
    """A local path of an object: the file itself, or a temporary copy."""

    def __init__(self, objects: Objects, path: str, data: bytes) -> None:
        self._folder = None if objects.local else tempfile.TemporaryDirectory(prefix="vidgen-verify-")
        self.place = Path(objects.path(path)) if self._folder is None else Path(self._folder.name) / Path(path).name
        if self._folder is not None:
            self.place.write_bytes(data)

    def __enter__(self) -> Path:
        return self.place

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
