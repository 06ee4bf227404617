"""Opening a run: its configuration, its store, its frozen plan. No ray, no torch: `vidgen plan` needs neither."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta

from vidgen import config as configuration
from vidgen import faults
from vidgen.config import JobConfig
from vidgen.config_rules import clock_or_moment
from vidgen.errors import ConfigError
from vidgen.plan import build as planning
from vidgen.plan import forecast, placing
from vidgen.plan.earlier import SCHEDULED
from vidgen.plan.files import check_resume, read_plan, require_plan, total_items
from vidgen.store.objects import Objects, new_token
from vidgen.types import Plan

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entry point of a submitted job."""


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run: configuration, store, frozen plan."""

    config: JobConfig
    objects: Objects
    plans: tuple[Plan, ...]

    @property
    def items(self) -> int:
        return total_items(self.plans)

    @property
    def shown_as(self) -> str:
        """The output as metrics name it: of a run of a schedule the schedule's, so that ticks make no new series."""
        url = self.objects.url.rstrip("/")
        return url.rsplit("/runs/", 1)[0] if SCHEDULED in self.plans[0].resolved else url


def is_output(source: str) -> bool:
    """Whether `source` is the folder of a run rather than a configuration file."""
    return not source.endswith((".yaml", ".yml")) and Objects(source).exists("plan/0/PLAN.json")


def open_store(config: JobConfig) -> Objects:
    """The store of a configuration's output; ConfigError for a missing path, or a relative one in a submitted job."""
    path = config.output.path
    if not path:
        raise ConfigError("output.path: missing; name a folder or an fsspec URL")
    if SUBMITTED in os.environ and "://" not in path and not os.path.isabs(path):
        raise ConfigError(
            f"output.path: {path!r} is relative, and a submitted job runs in a temporary folder; "
            "give an absolute path or a URL"
        )
    return Objects(path, single_writer=config.run.single_writer)


def prepare(source: str, overrides: Sequence[str], say: Callable[[str], None]) -> Run:
    """Opens a run: from OUTPUT its frozen configuration, from a configuration file its plan, made if there is none."""
    if is_output(source):
        objects = Objects(source)
        plans = read_plan(objects)
        config = configuration.from_dict(plans[-1].config, f"the frozen plan of {source}", overrides)
    else:
        if os.path.isdir(source):
            require_plan(Objects(source))
        config = configuration.load(source, overrides)
        objects = open_store(config)
        plans = read_plan(objects)
    if plans:
        check_resume(plans, config)
        placing.check(plans, config)
        if not forecast.read(objects):  # who froze the plan died before it wrote what that will cost
            forecast.write(objects, plans, config)
        changed = planning.changed_dataset(plans, config)
        if changed:
            say(f"note: {changed}")
    else:
        with faults.around("probe"):
            objects.probe(new_token())
        plans = list(planning.build(config, objects, say=say).plans)
    objects = Objects(objects.url, single_writer=config.run.single_writer)
    return Run(config, objects, tuple(plans))


def deadline_of(text: str, now: datetime) -> float:
    """`run.deadline` as seconds since the epoch: an ISO 8601 time, or HH:MM for the next time the clock shows it.
    Times without a zone are in that of `now`. ConfigError for anything else."""
    moment = clock_or_moment(text)
    if isinstance(moment, time):
        moment = datetime.combine(now.date(), moment, now.tzinfo)
        moment += timedelta(days=1) if moment <= now else timedelta()
    return (moment if moment.tzinfo else moment.replace(tzinfo=now.tzinfo)).timestamp()
