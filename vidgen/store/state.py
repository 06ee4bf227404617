"""What is settled and what is still to do: one byte an item, loaded from the ledger and the commits no part names.

Memory is one byte a planned item and 16 a commit, whatever the plan's size. Refuses to know what the items are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vidgen.store import commits, ledger
from vidgen.store.objects import Objects
from vidgen.types import Record

PENDING, DONE, FAILED, QUARANTINED = range(4)
STATUS = {"done": DONE, "failed": FAILED, "quarantined": QUARANTINED}
NAMES = {code: name for name, code in STATUS.items()} | {PENDING: "pending"}
CHUNK = 50_000


class State:
    """Status of every item by ordinal. `generations` names the generation of reopened items; all others are in 0."""

    def __init__(self, items: int) -> None:
        self.status = np.zeros(items, np.uint8)
        self.generations: dict[str, int] = {}
        self.generation = 0

    def generation_of(self, item_id: str) -> int:
        return self.generations.get(item_id, 0)

    def settle(self, record: Record) -> bool:
        """Takes a commit into account; False if it belongs to a generation that has been reopened since."""
        if record.generation != self.generation_of(record.item_id) or record.ordinal >= len(self.status):
            return False
        self.status[record.ordinal] = STATUS[record.status]
        return True

    def is_pending(self, ordinal: int) -> bool:
        return bool(self.status[ordinal] == PENDING)

    def count(self, name: str) -> int:
        code = PENDING if name == "pending" else STATUS[name]
        return int(np.count_nonzero(self.status == code))

    def counts(self) -> dict[str, int]:
        """Items by state: pending, done, failed, quarantined."""
        return {name: int(n) for name, n in zip(NAMES.values(), self._bins(), strict=True)}

    def _bins(self) -> list[int]:
        bins = np.bincount(self.status, minlength=4)
        return [int(bins[code]) for code in NAMES]


def load(objects: Objects, items: int, *, compact: bool = False) -> State:
    """State of a run with `items` planned items. `compact` writes the commits that no ledger part named into new parts
    (the driver does; a reader does not)."""
    state = State(items)
    all_generations = [0, *commits.list_generations(objects)]
    state.generations = commits.read_generations(objects, all_generations[1:])
    state.generation = all_generations[-1]
    named: dict[int, list[np.ndarray]] = {generation: [] for generation in all_generations}
    for table in ledger.read_tables(objects):
        ids = table.column("item_id").to_pylist()
        raw = np.frombuffer(bytes.fromhex("".join(ids)), "S16")
        generations = table.column("generation").to_numpy()
        for generation in np.unique(generations):
            named.setdefault(int(generation), []).append(raw[generations == generation])
        codes = np.array([STATUS[name] for name in table.column("status").to_pylist()], np.uint8)
        current = _current(ids, generations, state)
        ordinals = table.column("ordinal").to_numpy()
        current &= ordinals < items
        state.status[ordinals[current]] = codes[current]
    for generation in all_generations:
        parts = named[generation]
        known = np.sort(np.concatenate(parts)) if parts else np.empty(0, "S16")
        for chunk in _chunks(commits.list_commits(objects, generation)):
            fresh = list(ledger.read_commits(objects, generation, _unknown(chunk, known)))
            for record in fresh:
                state.settle(record)
            if compact and fresh:
                ledger.write_part(objects, fresh)
    return state


def _current(ids: list[str], generations: np.ndarray, state: State) -> np.ndarray:
    if not state.generations:
        return generations == 0
    wanted = np.array([state.generation_of(item_id) for item_id in ids])
    return generations == wanted


def _unknown(chunk: list[str], known: np.ndarray) -> list[str]:
    if not len(known):
        return chunk
    raw = np.frombuffer(bytes.fromhex("".join(chunk)), "S16")
    place = np.minimum(np.searchsorted(known, raw), len(known) - 1)
    return [item_id for item_id, seen in zip(chunk, known[place] == raw, strict=True) if not seen]


def _chunks(ids: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item_id in ids:
        chunk.append(item_id)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
