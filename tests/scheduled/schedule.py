"""A schedule of test cards whose runs are driven by workers in threads: the tick's whole path without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fleet import inline
from vidgen import config as configuration
from vidgen import manifest
from vidgen.config import JobConfig
from vidgen.fleet.driver import Limits, Outcome
from vidgen.fleet.opening import deadline_of
from vidgen.plan.files import read_plan
from vidgen.report.verify import verify
from vidgen.scheduled.difference import Policy
from vidgen.scheduled.tick import Report, Schedule, tick
from vidgen.store import epochs, state
from vidgen.store.objects import Objects

SAMPLING = {"num_frames": 2, "num_inference_steps": 1, "height": 16, "width": 16}


def write(path: Path, rows: dict[str, str] | Sequence[str], **columns: list[Any]) -> None:
    """A Parquet file of prompts; a mapping gives them ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {"id": list(rows), "prompt": list(rows.values())} if isinstance(rows, dict) else {"prompt": list(rows)}
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table({**texts, **columns}), temporary)
    temporary.rename(path)


def values(source: Path | str, folder: Path | str, rooms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "model": {"family": "testcard"},
        "dataset": {"path": str(source)},
        "sampling": dict(SAMPLING),
        "output": {"path": str(folder)},
    }
    return {name: {**base.get(name, {}), **rooms.get(name, {})} for name in {**base, **rooms}}


class Runs:
    """Drives runs as `vidgen generate` does, and keeps account of what was asked of it."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.order: list[int] = []
        self.before: Callable[[], None] = lambda: None

    def __call__(self, source: str, overrides: Sequence[str]) -> Outcome:
        self.order.append(int(source.rsplit("/", 1)[1]))
        self.before()
        objects = Objects(source)
        plans = read_plan(objects)
        config = configuration.from_dict(plans[-1].config, "test", overrides)
        items = sum(part.items for part in plans[0].parts)
        held = state.load(objects, items)
        if not held.count("pending"):
            lease = epochs.acquire(objects, lease=60)
            manifest.write(objects, plans, held, lease.token)
            lease.release(**lease.inherited())
            return Outcome(0, "nothing to do", held.counts(), 0.0)
        hours, until = config.run.max_gpu_hours, config.run.deadline
        limits = Limits(
            gpu_seconds=None if hours is None else hours * 3600,
            deadline=None if until is None else deadline_of(until, datetime.now().astimezone()),
        )
        return inline.drive(config, replicas=1, limits=limits, interrupt_at=self.interrupt_at)[0]


class Scheduled:
    """One schedule below `folder`: its source, its output, its ticks."""

    def __init__(self, folder: Path, ids: bool = True) -> None:
        self.source, self.output = folder / "source", folder / "out"
        self.said: list[str] = []
        self.runs = Runs()
        self.dataset: dict[str, Any] = {"id_column": "id"} if ids else {}
        self.source.mkdir(exist_ok=True)

    def config(self, **rooms: dict[str, Any]) -> JobConfig:
        rooms["dataset"] = {**self.dataset, **rooms.get("dataset", {})}
        return configuration.from_dict(values(self.source, self.output, rooms), "test")

    def tick(
        self, *, change: str = "skip", spec: str = "skip", overlap: str = "skip", drive: Any = None, **rooms: Any
    ) -> Report:
        schedule = Schedule(Policy(change, spec), overlap)
        return tick(self.config(**rooms), schedule, drive or self.runs, say=self.said.append)

    def rows(self, run: int | None = None) -> list[dict[str, Any]]:
        """The view's rows, in order, or those of one run."""
        names = sorted((self.output / "manifest").glob("run-*.parquet"))
        rows = [row for name in names for row in pq.read_table(name).to_pylist()]
        return [row for row in rows if run is None or row["run"] == run]

    def made(self, run: int | None = None) -> list[tuple[str, str, int]]:
        """(id, prompt, sample) of what is done."""
        return sorted((r["row_id"], r["prompt"], r["sample"]) for r in self.rows(run) if r["status"] == "done")

    def prove(self) -> None:
        """Every run verifies, no row and sample is current twice, and the view names videos that are there."""
        view = json.loads((self.output / "manifest/_VIEW.json").read_text())
        for entry in view["runs"]:
            verdict = verify(str(self.output / f"runs/{entry['run']}"))
            assert verdict.ok, verdict.problems
        done = [row for row in self.rows() if row["status"] == "done"]
        current = [(row["row_id"], row["sample"]) for row in done if row["superseded_by"] is None]
        assert len(current) == len(set(current))
        assert all((self.output / row["video"]).is_file() for row in done)
