"""The runs below a scheduled output: `OUTPUT/runs/{n}/`, each a complete run of its own, numbered from 0 without gaps.

What a run's tick knew stands in its plan, under `resolved.scheduled`. Refuses to know how a run is planned and driven.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vidgen import manifest
from vidgen.config import JobConfig, to_dict
from vidgen.config_rules import leaves
from vidgen.errors import ConfigError, PlanError
from vidgen.family import spec as family_spec
from vidgen.plan.earlier import SCHEDULED
from vidgen.plan.files import part_table, read_plan
from vidgen.plan.frozen import FREE, FROZEN, INEXACT_ATTENTION
from vidgen.report.why import Place
from vidgen.store import epochs
from vidgen.store import state as states
from vidgen.store.objects import Objects
from vidgen.types import Part, Plan

READERS = 16


@dataclass(frozen=True, slots=True)
class ScheduledRun:
    """One run: its number, its store, its frozen plan. A run that a tick made has one plan and no other."""

    number: int
    objects: Objects
    plan: Plan

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its tick wrote down: spec, fields, id_column, seen (parts), rows (counts), again (run -> rows)."""
        found: Mapping[str, Any] = self.plan.resolved[SCHEDULED]
        return found

    @property
    def seen(self) -> tuple[Part, ...]:
        return tuple(Part(**part) for part in self.facts["seen"])

    @property
    def items(self) -> int:
        return self.plan.counts["items"]

    def is_finished(self) -> bool:
        """Whether every item is terminal and the manifest is written; `vidgen retry` undoes it."""
        return self.objects.exists(manifest.SUCCESS)

    def gpu_seconds(self) -> float:
        """What its drivers have spent so far."""
        epoch = epochs.current(self.objects)
        return float(epochs.read_beat(self.objects, epoch).get("gpu_seconds", 0.0)) if epoch is not None else 0.0

    def top_priority(self) -> int:
        """The highest priority among its pending items; 0 where no row has one."""
        if "priority" not in self.plan.config["dataset"]["columns"]:
            return 0
        state = states.load(self.objects, self.items)
        highest = []
        for part in self.plan.parts:
            pending = state.status[part.first : part.first + part.items] == states.PENDING
            if pending.any():
                highest.append(int(part_table(self.objects, part).column("priority").to_numpy()[pending].max()))
        return max(highest, default=0)


def url_of(root: Objects, number: int) -> str:
    """Where run `number` lies."""
    return f"{root.url.rstrip('/')}/runs/{number}"


def read_runs(root: Objects, known: Sequence[ScheduledRun] = (), at_least: int = 0) -> list[ScheduledRun]:
    """Every run below an output, in order: those `known` and what came after. `at_least`: how many there have been;
    PlanError if one of them is gone, for without its plan its rows would be taken for new."""
    if not known and root.exists("plan/0/PLAN.json"):
        raise ConfigError(f"output.path: {root.url} is a run itself; a schedule needs a folder of its own")
    found = list(known)
    with ThreadPoolExecutor(READERS) as pool:
        while True:
            first = len(found)
            runs = list(pool.map(lambda number: _read(root, number), range(first, first + READERS)))
            for run in runs:
                if run is None:
                    if len(found) < at_least:
                        where = url_of(root, len(found))
                        raise PlanError(f"{where}/plan/0/PLAN.json is gone: without it its rows would be made again")
                    return found
                found.append(run)


def below(output: str) -> list[ScheduledRun]:
    """The runs of the schedule that lies there, in order; [] if a run lies there, or nothing."""
    root = Objects(output)
    return [] if root.exists("plan/0/PLAN.json") else read_runs(root)


def places(output: str) -> list[Place]:
    """Where a question about an item is asked: a run itself, or every run of a schedule, newest first. PlanError if
    there is neither."""
    return [Place(run.objects, run.number) for run in reversed(below(output))] or [Place(Objects(output))]


def unfinished(runs: Sequence[ScheduledRun]) -> list[ScheduledRun]:
    """The runs with something to do, oldest first."""
    with ThreadPoolExecutor(READERS) as pool:
        finished = list(pool.map(ScheduledRun.is_finished, runs))
    return [run for run, done in zip(runs, finished, strict=True) if not done]


def unresumable(run: ScheduledRun) -> str | None:
    """Why this version cannot finish a run, or None."""
    revision = family_spec(run.plan.family).REVISION
    if revision == run.plan.spec_revision:
        return None
    return (
        f"run {run.number} has not finished and was planned by vidgen {run.plan.vidgen_version} with {run.plan.family} "
        f"at revision {run.plan.spec_revision}; here it is {revision} and makes other pixels. Finish it with vidgen "
        f"{run.plan.vidgen_version}, or make its rows again with --on-spec-change regenerate"
    )


def overrides(config: JobConfig, run: ScheduledRun) -> list[str]:
    """What of today's configuration a run may be resumed with, as `key=value`: all that its plan does not hold fast."""
    frozen = dict(leaves(run.plan.config))
    found = []
    for key, value in leaves(to_dict(config)):
        if _is_free(key, value, frozen.get(key)) and value != frozen.get(key):
            found.append(f"{key}={json.dumps(value)}")
    return found


def _is_free(key: str, now: Any, before: Any) -> bool:
    if key == "engine.attention":
        return now not in INEXACT_ATTENTION and before not in INEXACT_ATTENTION
    return key in FREE or not any(key == room or key.startswith(f"{room}.") for room in FROZEN)


def _read(root: Objects, number: int) -> ScheduledRun | None:
    objects = Objects(url_of(root, number), single_writer=root.single_writer)
    plans = read_plan(objects)
    if not plans:
        return None
    if len(plans) > 1 or SCHEDULED not in plans[0].resolved:
        raise PlanError(f"{objects.url}: not planned by a scheduled tick alone; a schedule needs a folder of its own")
    return ScheduledRun(number, objects, plans[0])
