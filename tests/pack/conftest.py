"""One run of the test card for all tests: twelve rows, two samples each; a row that fails and one that is rejected."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen import manifest
from vidgen.config import JobConfig
from vidgen.pack import job, source
from vidgen.pack.options import options
from vidgen.store.objects import Objects

ROWS = 12
DONE = 20


def a_job(folder: Path, output: str) -> JobConfig:
    prompts: list[Any] = [f"a card, number {i} | <b>*bold*</b>\n`code`" for i in range(ROWS)]
    prompts[5] = None
    path = write_prompts(
        folder / "prompts.parquet",
        prompts,
        id=[f"r{i:02d}" for i in range(ROWS)],
        fails=["item" if i == 3 else "" for i in range(ROWS)],
        topic=["sea" if i % 2 else "sky" for i in range(ROWS)],
        score=[float("nan") if i == 0 else i / 4 for i in range(ROWS)],
        day=[datetime.date(2026, 1, 1 + i) for i in range(ROWS)],
        late=[None] * (ROWS - 2) + ["now", "then"],
        shot_file_name=[f"shots/{i}.mov" for i in range(ROWS)],
    )
    config = config_for(path, output, dataset__id_column="id", dataset__samples_per_row=2)
    config.dataset.columns["params.fail"] = "fails"
    return config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished")
    drive(a_job(folder, str(folder / "out")))
    return str(folder / "out")


@pytest.fixture
def run(finished: str, tmp_path: Path) -> str:
    """A copy of the run, to change."""
    shutil.copytree(finished, tmp_path / "run")
    return str(tmp_path / "run")


@pytest.fixture
def packed(finished: str, tmp_path: Path) -> Callable[..., tuple[Path, job.Packed]]:
    """Packs the run (or another) as the command does."""

    def pack(format: str, dest: str = "pack", output: str = finished, **given: Any) -> tuple[Path, job.Packed]:
        replace, partial = given.pop("replace", False), given.pop("partial", False)
        place = tmp_path / dest
        wanted = options(format, **{"shard_size": "30KB", **given})
        return place, job.pack(source.of_run(output, partial=partial), str(place), wanted, replace=replace)

    return pack


def done_rows(output: str) -> dict[str, dict[str, Any]]:
    """Manifest rows of done items, by item."""
    found: dict[str, dict[str, Any]] = {}
    for table in manifest.read(Objects(output)):
        days = table.set_column(
            table.schema.get_field_index("day"), "day", table.column("day").cast(pa.string())
        ).to_pylist()
        found |= {row["item_id"]: row for row in days if row["status"] == "done"}
    return found


def tree(place: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
