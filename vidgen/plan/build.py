"""A configuration and a dataset become a frozen plan: every row an item or a rejection, all values resolved.

Freezes exactly one plan however many planners there are. Refuses to know Ray, GPUs and who will run it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vidgen.config import JobConfig
from vidgen.errors import PlanError
from vidgen.plan import forecast, placing
from vidgen.plan.earlier import SCHEDULED, read_earlier
from vidgen.plan.files import Objects, check_resume, freeze, read_plan, rejected_reasons, total_rejected
from vidgen.plan.planning import Planning
from vidgen.prompts import open_dataset
from vidgen.types import Plan


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What `build` made or found. `plan` is the newest of `plans`, the run's whole plan (after a dry run: what would
    be frozen, without parts). `made` is False for a plan that was there already, somebody else's just now included,
    and for a dry run. `reasons` counts rejections by reason (most frequent first), `notes` are remarks for a person."""

    plan: Plan
    plans: tuple[Plan, ...]
    made: bool
    reasons: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def items(self) -> int:
        return sum(plan.counts["items"] for plan in self.plans)

    @property
    def rejected(self) -> int:
        return total_rejected(self.plans)


def build(
    config: JobConfig,
    objects: Objects | None,
    *,
    token: str | None = None,
    dry_run: bool = False,
    extend: bool = False,
    say: Callable[[str], None] = lambda text: None,
    before_freeze: Callable[[], None] = lambda: None,
) -> PlanResult:
    """Plans the dataset and freezes the plan, or returns the one there is if the configuration agrees with it.

    `dry_run` validates everything and freezes nothing (`objects` may then be None, and a plan that is there is passed
    over). `extend` adds plan k+1 with the items and rejections that no earlier plan has. `say` hears of progress and
    remarks, `before_freeze()` is called just before PLAN.json is created and may raise. Who loses that creation reads
    the winner's plan; an extension that loses starts over for the next k.

    Raises ConfigError, PlanError or CheckpointError; each names what is wrong and where.
    """
    if objects is None:
        assert dry_run and not extend, "a plan is frozen somewhere, and extended where it lies"
        return _dry(config, None, (), say)
    plans = tuple(read_plan(objects)) if extend or not dry_run else ()
    if extend and not plans:
        raise PlanError("--extend: there is no frozen plan to extend; plan without it first")
    if extend and SCHEDULED in plans[0].resolved:
        raise PlanError("--extend: this run is one tick of a schedule; the next tick makes what is new")
    if dry_run:
        return _dry(config, objects, plans, say)
    token = token or secrets.token_hex(8)
    while True:
        if plans:
            check_resume(plans, config, extend)
            placing.check(plans, config)
        if plans and not extend:
            return PlanResult(plans[-1], plans, False, rejected_reasons(objects, plans))
        planning = Planning(config, objects, plans, read_earlier(objects, plans) if plans else None)
        plan = planning.run(say)
        if plan is None:
            return _nothing_new(planning, plans, say)
        before_freeze()
        if freeze(objects, plan, token):
            forecast.write(objects, (*plans, plan), config)
            return PlanResult(plan, (*plans, plan), True, planning.reasons, _said(planning, say))
        say(f"another planner froze plan {plan.k} first; reading it")
        plans = tuple(read_plan(objects))


def changed_dataset(plans: Sequence[Plan], config: JobConfig) -> str | None:
    """A remark if the dataset is no longer the one the newest plan was made from; None if it is, or if it cannot be
    read (a frozen plan does not need it), or if later ticks look after it."""
    if SCHEDULED in plans[-1].resolved:
        return None
    before = plans[-1].resolved["dataset"]
    try:
        now = open_dataset(config.dataset.path)
    except PlanError:
        return None
    if now.digest == before["digest"]:
        return None
    sizes = f"{len(now.files):,} files with {now.rows:,} rows, then {before['files']:,} with {before['rows']:,}"
    return f"{config.dataset.path} has changed since it was planned (now {sizes}); `vidgen plan --extend` adds new rows"


def _dry(config: JobConfig, objects: Objects | None, plans: Sequence[Plan], say: Callable[[str], None]) -> PlanResult:
    if plans:
        check_resume(plans, config, extend=True)
    earlier = read_earlier(objects, plans) if objects is not None and plans else None
    planning = Planning(config, None, plans, earlier)
    plan = planning.run(say)
    if plan is None:
        return _nothing_new(planning, plans, say)
    return PlanResult(plan, (*plans, plan), False, planning.reasons, _said(planning, say))


def _nothing_new(planning: Planning, plans: Sequence[Plan], say: Callable[[str], None]) -> PlanResult:
    planning.notes.append("nothing new: every row is in an earlier plan")
    return PlanResult(plans[-1], tuple(plans), False, {}, _said(planning, say))


def _said(planning: Planning, say: Callable[[str], None]) -> tuple[str, ...]:
    for note in planning.notes:
        say(f"note: {note}")
    return tuple(planning.notes)
