"""The ledger by ordinal: the same records, however they are spread over its parts and whatever is sorted at a time."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from vidgen.errors import InfrastructureError
from vidgen.store import ledger, ordered
from vidgen.store.objects import Objects
from vidgen.types import Record

ITEMS = 300


def fill(objects: Objects) -> None:
    """Parts in a random order of the plan, as longest first settles them; every tenth item was reopened."""
    records = [Record(f"{n:032x}", n, "done", 0, 1, error=f"e{n}") for n in range(ITEMS)]
    records += [Record(f"{n:032x}", n, "failed", 1, 2) for n in range(0, ITEMS, 10)]
    random.Random(0).shuffle(records)
    for first in range(0, len(records), 25):
        ledger.write_part(objects, records[first : first + 25])


@pytest.mark.parametrize("at_a_time", [1, 60, 1_000_000])
def test_every_record_is_found_once_between_its_ordinals_and_each_part_is_read_once(
    at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(str(tmp_path / "out"))
    fill(objects)
    reads: list[str] = []
    read = objects.read
    monkeypatch.setattr(objects, "read", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(ordered, "RUN", at_a_time)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = ordered.Ordered(objects)
    for first in range(0, ITEMS, 100):
        found = ledger.to_records(held.between(first, first + 99))
        assert sorted((one.ordinal, one.generation) for one in found) == sorted(
            (n, generation) for n in range(first, first + 100) for generation in ((0, 1) if n % 10 == 0 else (0,))
        )
        assert all(one.error == f"e{one.ordinal}" for one in found if not one.generation)
    assert held.between(ITEMS, ITEMS + 5).num_rows == 0
    assert len(reads) == len(set(reads)) == len(list(objects.list("ledger")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left on the disk"


def test_without_a_ledger_there_is_nothing(tmp_path: Path) -> None:
    assert ordered.Ordered(Objects(str(tmp_path))).between(0, 9).num_rows == 0


def test_a_full_disk_of_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(str(tmp_path / "out"))
    fill(objects)
    monkeypatch.setattr(ordered, "RUN", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InfrastructureError, match=r"gone: the ledger could not be sorted there .*TMPDIR"):
        ordered.Ordered(objects)
