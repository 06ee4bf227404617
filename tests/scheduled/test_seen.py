"""The digests of rows: found, kept, merged, in bounded memory."""

from __future__ import annotations

import tracemalloc
import uuid
from dataclasses import replace

import numpy as np
import pytest

from vidgen.errors import PlanError
from vidgen.scheduled import seen
from vidgen.scheduled.seen import Index, Keys, find, rejection_keys, row_keys, sample_keys
from vidgen.store.objects import Objects


@pytest.fixture
def objects() -> Objects:
    return Objects(f"memory://seen-{uuid.uuid4()}")


def of(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def test_a_key_is_found_even_where_its_first_half_is_another_ones() -> None:
    among = Keys(of(1, 5, 5, 5, 9), of(7, 1, 2, 3, 0))
    wanted = Keys(of(5, 5, 5, 5, 1, 9, 9, 0), of(1, 3, 4, 2, 7, 0, 1, 0))
    assert find(among, wanted).tolist() == [1, 3, -1, 2, 0, 4, -1, -1]
    assert find(Keys(of(), of()), wanted).tolist() == [-1] * 8


def test_names_of_rows_rejections_and_samples_never_meet() -> None:
    content = np.zeros(2, np.uint64)
    names = [row_keys(["a", "b"]), rejection_keys(["a", "b"], content), rejection_keys([None, "a"], content + 1)]
    names += [sample_keys(["a", "b"], [0, 0]), sample_keys(["a", "b"], [1, 1])]
    assert len({(int(h), int(l)) for keys in names for h, l in zip(keys.high, keys.low, strict=True)}) == 10


def test_what_is_written_is_read_and_the_newest_run_counts(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "PART_ROWS", 3)
    sources = []
    for run, ids in enumerate((["a", "b", "c", "d"], ["b", "e"], ["b", "d"])):
        index = Index()
        index.add(row_keys(ids), np.full(len(ids), run, np.uint64), run + 1)
        sources.append((objects, index.write(objects, f"{run}/seen")))
    assert [len(parts) for _, parts in sources] == [2, 1, 1]
    known = seen.read(sources)
    at = find(known.keys, row_keys(["a", "b", "c", "d", "e", "f"]))
    assert at[5] == -1 and sorted(at[:5]) == list(range(5))
    assert known.run[at[:5]].tolist() == [0, 2, 0, 2, 1]
    assert known.content[at[:5]].tolist() == [0, 2, 0, 2, 1] and known.samples[at[:5]].tolist() == [1, 3, 1, 3, 2]


def test_an_index_that_is_gone_or_damaged_is_named(objects: Objects) -> None:
    index = Index()
    index.add(row_keys(["a"]), np.zeros(1, np.uint64), 1)
    (part,) = index.write(objects, "seen")
    with pytest.raises(PlanError, match="sha256 differs"):
        seen.read([(objects, [replace(part, sha256="0" * 64)])])
    with pytest.raises(PlanError, match="is gone"):
        seen.read([(objects, [replace(part, name="nothing")])])
    assert Index().write(objects, "empty") == ()


def test_a_million_rows_seen_are_numbers_and_not_objects(objects: Objects) -> None:
    rows = 1_000_000
    random = np.random.default_rng(0)
    index = Index()
    halves = (random.integers(0, 2**63, rows, np.uint64) for _ in range(2))
    index.add(Keys(*halves), np.zeros(rows, np.uint64), 1)
    parts = index.write(objects, "seen")
    del index
    tracemalloc.start()
    known = seen.read([(objects, parts)])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(known) == rows
    assert held < 40 * rows and peak < 160 * rows  # 30 bytes a row, and copies while it is sorted
