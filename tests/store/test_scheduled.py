"""A schedule whose source and output are on S3, ticking twice in one process, as `--every` does."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.scheduled.schedule import Runs, values
from vidgen import config as configuration
from vidgen.prompts import open_dataset
from vidgen.report.verify import verify
from vidgen.scheduled.tick import Report, Schedule, tick
from vidgen.store.objects import Objects


def test_a_long_lived_process_sees_the_files_that_came_since_its_last_tick(s3: str) -> None:
    source, output = f"{s3}/prompts", f"{s3}/clips"

    def deliver(name: str, *prompts: str) -> None:
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": prompts}), sink)
        Objects(source).put(f"day={name}/new.parquet", sink.getvalue())  # by another client than the one that plans

    def ticks() -> Report:
        job = configuration.from_dict(values(source, output, {}), "test")
        return tick(job, Schedule(), Runs(), say=lambda text: None)

    deliver("1", "a red circle", "a blue square")
    first = ticks()
    assert (first.run, first.items, first.exit) == (0, 2, 0)
    assert ticks().run is None
    deliver("2", "a green circle")
    second = ticks()
    assert (second.run, second.items, second.counts["done"]) == (1, 1, 3)
    for run in (0, 1):
        verdict = verify(f"{output}/runs/{run}")
        assert verdict.ok and not verdict.orphans, verdict.problems


@pytest.mark.parametrize("named", ["", "/*.parquet"])
def test_a_dataset_is_listed_anew_each_time_it_is_opened(named: str, s3: str) -> None:
    def deliver(name: str) -> None:
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["a red circle"]}), sink)
        Objects(s3).put(name, sink.getvalue())

    def files() -> list[str]:
        return [file.name.removeprefix(f"{s3}/") for file in open_dataset(f"{s3}{named}").files]

    deliver("a.parquet")
    assert files() == ["a.parquet"]
    deliver("b.parquet")
    assert files() == ["a.parquet", "b.parquet"]
