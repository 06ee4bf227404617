"""Every fault point of a scheduled batch kills a tick once, and the next tick makes what is left, nothing twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.crash import points
from tests.crash.history import Fault, Job, Life, Server
from tests.scheduled.schedule import Scheduled, write

TICKS = [{"a": "one", "b": "two"}, {"c": "three"}]
"""Rows that each tick finds new."""


class Batch(Job):
    """A schedule whose source grows by a file a tick."""

    def tick(self, **options: object) -> Life:
        return self.start("scheduled", str(self.config), **options)  # type: ignore[arg-type]


def test_each_point_of_a_schedule_kills_a_tick_once_and_no_row_is_lost_or_made_twice(
    server: Server, tmp_path: Path, hits: Counter[str]
) -> None:
    schedule = Scheduled(tmp_path)
    batch = Batch(server, tmp_path, superseded=0)
    batch.config.write_text(json.dumps(_config(schedule)))
    passed: dict[tuple[str, str], int] = {}
    for number, rows in enumerate(TICKS):
        write(schedule.source / f"{number}.parquet", rows)
        batch.snapshot(tmp_path / f"kept-{number}")
        batch.since = len(batch.lives)
        assert batch.tick(watch=True).gone() == 0, batch.log()
        for _, role, point in batch.trail("point"):
            passed.setdefault((role, point), number)
    own = {point for file, found in points.by_file().items() if file.startswith("scheduled/") for point in found}
    assert own <= {point for role, point in passed if role == "driver"}
    for point in sorted(own):
        tick = passed["driver", point]
        for number in range(len(TICKS)):
            (schedule.source / f"{number}.parquet").unlink(missing_ok=True)
            if number <= tick:
                write(schedule.source / f"{number}.parquet", TICKS[number])
        batch.restore(tmp_path / f"kept-{tick}")
        assert batch.tick(faults=[Fault("driver", point)]).gone() == -9, f"{point}: {batch.log()}"
        hits[f"driver: {point}"] += 1
        assert batch.tick().gone() == 0, f"{point}: {batch.log()}"
        schedule.prove()
        wanted = sorted((name, text, 0) for rows in TICKS[: tick + 1] for name, text in rows.items())
        assert schedule.made() == wanted, point
        batch.check_work()


def _config(schedule: Scheduled) -> dict[str, object]:
    return {
        "model": {"family": "testcard"},
        "dataset": {"path": str(schedule.source), "id_column": "id"},
        "sampling": {"num_frames": 2, "num_inference_steps": 1, "height": 16, "width": 16},
        "output": {"path": str(schedule.output), "format": "png"},
    }
