"""A fleet of workers in threads of this process: the driver's whole path without a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidgen import config as configuration
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.driver import Driver, Interrupt, Limits, Outcome, replica_names
from vidgen.fleet.gang import Entry
from vidgen.fleet.progress import Progress
from vidgen.fleet.replica import Pulse, Settings, Worker
from vidgen.plan.build import build
from vidgen.plan.files import read_plan
from vidgen.store import commits, epochs, state
from vidgen.store.objects import Objects
from vidgen.types import ModelSettings, Plan


class InlineFleet:
    """Workers by name; `start` loads at once."""

    def __init__(self, settings: Settings, nodes: int = 1, entry: Entry | None = None) -> None:
        self.settings, self.nodes, self.entry = settings, nodes, entry
        self.workers: dict[str, Worker] = {}
        self.last: dict[str, Pulse | None] = {}
        self.waiting: list[ev.Event] = []
        self.sent: list[tuple[str, tuple[ev.Work, ...]]] = []

    def start(self, name: str, avoid: Sequence[str] = ()) -> None:
        worker = Worker(name, f"node{len(self.workers) % self.nodes}", self.settings, self.entry)
        self.workers[name], self.last[name] = worker, None
        self.waiting.append(ev.ReplicaReady(name, worker.start()))

    def enlist(self, name: str, band: int, avoid: Sequence[str] = ()) -> None:
        self.start(name)

    def dismiss(self, name: str) -> None:
        del self.last[name]
        self.workers.pop(name).close()

    def send(self, name: str, batch: int, works: tuple[ev.Work, ...]) -> None:
        self.sent.append((name, works))
        self.workers[name].submit(batch, works)

    def recall(self, name: str, within: float | None = None) -> None:
        self.workers[name].leave(within)

    def reclaim(self, name: str) -> None:
        self.workers[name].recall()

    def pulses(self) -> dict[str, Pulse | None]:
        return dict(self.last)

    def poll(self, timeout: float) -> list[ev.Event]:
        events, self.waiting = self.waiting, []
        for name, worker in self.workers.items():
            pulse = self.last[name] = worker.poll(0.01)
            events += pulse.events
        return events

    def close(self) -> None:
        for worker in self.workers.values():
            worker.recall(abandon=True)
            worker.close()
        self.workers.clear()


def write_prompts(path: Path, rows: int | Sequence[str], **columns: list[Any]) -> str:
    """A Parquet file of prompts; returns its path."""
    prompts = [f"prompt number {i}" for i in range(rows)] if isinstance(rows, int) else list(rows)
    pq.write_table(pa.table({"prompt": prompts, **columns}), path)
    return str(path)


def config_for(dataset: str, output: str, **overrides: Any) -> configuration.JobConfig:
    """A test card job; overrides are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "name": "test",
        "model": {"family": "testcard"},
        "dataset": {"path": dataset},
        "sampling": {"num_frames": 5, "num_inference_steps": 2},
        "output": {"path": output},
    }
    return configuration.from_dict(
        values, "test", [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    )


def planned(
    folder: Path, sides: Sequence[int], **overrides: Any
) -> tuple[configuration.JobConfig, Objects, tuple[Plan, ...]]:
    """A job in `folder` whose rows are squares of these sides, its output, and its plan."""
    prompts = write_prompts(folder / "p.parquet", len(sides), h=list(sides), w=list(sides))
    config = config_for(prompts, str(folder / "out"), **overrides)
    config.dataset.columns |= {"height": "h", "width": "w"}
    objects = Objects(config.output.path)
    return config, objects, build(config, objects).plans


def drive(
    config: configuration.JobConfig,
    *,
    replicas: int = 2,
    rules: Rules | None = None,
    limits: Limits | None = None,
    interrupt_at: int | None = None,
    entry: Entry | None = None,
    only: np.ndarray | None = None,
) -> tuple[Outcome, InlineFleet]:
    """Plans if there is no plan, takes the lease, drives to the end, as `vidgen generate` does."""
    objects = Objects(config.output.path)
    build(config, objects)
    plans = read_plan(objects)
    lease = epochs.acquire(objects, lease=60)
    held = state.load(objects, sum(part.items for plan in plans for part in plan.parts), compact=True)
    objects.put("epochs/probe", b"seen")
    fleet = InlineFleet(settings_for(config, objects), entry=entry)
    driver = Driver(config.name, objects, plans, held, lease, fleet, Progress(objects, quiet=True))
    driver.interrupt, driver.only = Interrupt(), only
    if interrupt_at is not None:
        _interrupt_later(driver.interrupt, objects, interrupt_at)
    rules = rules or Rules(max_attempts=config.run.max_attempts, breaker_failures=config.run.breaker_failures)
    return driver.run(rules, replica_names(replicas), limits or Limits()), fleet


def settings_for(config: configuration.JobConfig, objects: Objects) -> Settings:
    return Settings(
        output=objects.root if objects.local else objects.url,
        single_writer=False,
        probe=("epochs/probe", "seen"),
        model=ModelSettings(
            checkpoint=config.model.checkpoint if config.model.family != "testcard" else "",
            family=config.model.family,
            task=config.model.task,
            loras=configuration.loras(config),
            pipeline=config.model.pipeline,
            options=configuration.model_options(config),
            dtype=config.model.dtype,
            device="cpu",
            threads=1,
        ),
        format=config.output.format,
        codec=config.output.codec,
        crf=config.output.crf,
        allow_constant=config.run.allow_constant,
        save_after=config.run.save_after,
        save_every=config.run.save_every,
    )


def _interrupt_later(interrupt: Interrupt, objects: Objects, commits_seen: int) -> None:
    """As a signal would, once so many items are committed."""

    def later() -> None:
        while sum(1 for _ in commits.list_commits(objects, 0)) < commits_seen:
            time.sleep(0.01)
        interrupt.grace, interrupt.asked = 0.0, True

    threading.Thread(target=later, daemon=True).start()
