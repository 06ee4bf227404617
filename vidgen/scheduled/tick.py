"""One tick: what is in the source and in no earlier tick becomes a run, and every run is driven to its end.

The new rows are planned first, which costs no GPU; then the runs that have not finished are driven, the one with the
highest priority first, then the oldest: so what an earlier tick left comes before what this one found. How a run is
driven is given. Refuses to know the command line, clusters, and when the next tick is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime

import fsspec

from vidgen import faults
from vidgen.config import JobConfig, to_dict
from vidgen.errors import PlanError
from vidgen.fleet.driver import Outcome
from vidgen.fleet.opening import deadline_of, open_store
from vidgen.plan import files, forecast
from vidgen.plan.earlier import SCHEDULED
from vidgen.plan.frozen import EXTENDABLE, frozen_differences
from vidgen.prompts import SUFFIXES
from vidgen.scheduled import runs as scheduled
from vidgen.scheduled import seen, turn, view
from vidgen.scheduled.difference import Difference, NothingNew, Policy, Tally
from vidgen.scheduled.runs import ScheduledRun
from vidgen.store import epochs
from vidgen.store.epochs import Held
from vidgen.store.objects import Objects, new_token

Drive = Callable[[str, Sequence[str]], Outcome]
"""Runs or resumes the run that lies there, with these `key=value`, to its end: `vidgen.fleet.run.generate`."""
SOME_FAILED, BREAKER, LIMIT, HELD, INTERRUPTED = 3, 4, 5, 75, 130
LAST = "last_tick.json"


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the command line adds to a job. `overlap`: what a tick does while the last one still runs: skip its turn
    (exit code 75), or join in."""

    policy: Policy = field(default_factory=Policy)
    overlap: str = "skip"
    takeover: bool = False


@dataclass(frozen=True, slots=True)
class Driven:
    """How a run went in this tick; `code` 75: another driver holds it."""

    run: int
    code: int
    reason: str
    counts: dict[str, int]


@dataclass(slots=True)
class Report:
    """What a tick did. `run` is the one it made (None: nothing was new), `items` and `rejected` are that run's, `rows`
    those of the source by what became of them, `counts` those of the view over all runs."""

    output: str
    exit: int = 0
    run: int | None = None
    items: int = 0
    rejected: int = 0
    rows: Tally = field(default_factory=Tally)
    driven: list[Driven] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tick(
    config: JobConfig,
    schedule: Schedule,
    drive: Drive,
    *,
    say: Callable[[str], None],
    now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
) -> Report:
    """Does one tick of the schedule at `output.path`. Raises UserError (exit code 2), before anything is driven, and
    Held (75) where it is another's turn."""
    root = open_store(config)
    limits = _Limits(config, now)
    if epochs.current(root) is None:
        with faults.around("probe"):
            root.probe(new_token())
    own = turn.take(root, config.run.lease, schedule.takeover, schedule.overlap, say)
    try:
        report = Report(root.url)
        runs = _plan(root, config, schedule, own, report, say)
        _drive(config, runs, own, limits, drive, report, say)
        if report.exit != INTERRUPTED:
            report.counts = view.update(root, runs)["counts"]
            with faults.around("tick report"):
                root.put(LAST, json.dumps(asdict(report), indent=1).encode())
        return report
    finally:
        if own is not None:
            own.release()


# ---------------------------------------------------------------- planning


def _plan(
    root: Objects,
    config: JobConfig,
    schedule: Schedule,
    own: turn.Turn | None,
    report: Report,
    say: Callable[[str], None],
) -> list[ScheduledRun]:
    """Freezes what is new as the next run; returns all runs. Who loses the creation of run n to another tick works out
    its difference again, against run n too."""
    token = new_token()
    runs = scheduled.read_runs(root, at_least=len(view.read(root)["runs"]))
    while True:
        _refuse_unresumable(runs, schedule)
        objects = Objects(scheduled.url_of(root, len(runs)), single_writer=root.single_writer)
        found = _difference(config, objects, runs, schedule.policy, say)
        if found is None:
            report.notes.append(f"{config.dataset.path} has no files yet")
            return runs
        try:
            plan = found.run(say)
        except NothingNew:
            _account(found, config, report, say)
            return runs
        assert plan is not None, "nothing new is told apart above"
        plan = replace(plan, resolved={**plan.resolved, SCHEDULED: found.facts()})
        if own is not None:
            own.check()
        if files.freeze(objects, plan, token):
            forecast.write(objects, (plan,), config)
            _account(found, config, report, say)
            report.run, report.items, report.rejected = len(runs), plan.counts["items"], plan.counts["rejected"]
            return [*runs, ScheduledRun(len(runs), objects, plan)]
        say(f"another tick made run {len(runs)} first; looking again at what is new")
        runs = scheduled.read_runs(root, runs)


def _difference(
    config: JobConfig, objects: Objects, runs: Sequence[ScheduledRun], policy: Policy, say: Callable[[str], None]
) -> Difference | None:
    """The planning of the next run; None where there is no file at all yet, or any more."""
    known = seen.read([(run.objects, run.seen) for run in runs])
    say(f"comparing {config.dataset.path} with {len(known):,} rows of {len(runs)} earlier runs")
    own = replace(config, output=replace(config.output, path=objects.url))
    try:
        return Difference(own, objects, runs, known, policy)
    except PlanError:
        if _is_empty_folder(config.dataset.path):
            return None
        raise


def _refuse_unresumable(runs: Sequence[ScheduledRun], schedule: Schedule) -> None:
    if schedule.policy.on_spec_change == "regenerate":
        return
    for run in scheduled.unfinished(runs):
        if any(str(run.number) in later.facts["again"] for later in runs):
            continue  # its rows were made again
        if (reason := scheduled.unresumable(run)) is not None:
            raise PlanError(reason)


def _account(found: Difference, config: JobConfig, report: Report, say: Callable[[str], None]) -> None:
    """What became of the rows, in words."""
    rows = report.rows = found.tally
    report.notes += found.notes
    again = {"regenerate": "made again"}
    policy = found.policy
    told = [
        (rows.changed, "say something else than before", again.get(policy.on_change, "left as they were made")),
        (rows.respec, "would now be made otherwise", again.get(policy.on_spec_change, "left as they were made")),
        (rows.gone, "of earlier ticks are no longer in the source, or not selected", "kept"),
    ]
    report.notes += [f"{count:,} rows {what}: {then}" for count, what, then in told if count]
    if rows.respec and found.runs:
        last = found.runs[-1]
        differing = frozen_differences(last.plan.config, to_dict(config), resolved=last.plan.resolved)
        passed_over = ("output.path", *EXTENDABLE)
        report.notes += [f"since run {last.number}: {d}" for d in differing if not d.startswith(passed_over)]
        if last.plan.checkpoint_hash != found.model.checkpoint_hash:
            hashes = f"{last.plan.checkpoint_hash[:12]} then, {found.model.checkpoint_hash[:12]} now"
            report.notes.append(f"since run {last.number}: the checkpoint, {hashes}")
        if last.plan.spec_revision != found.model.spec.REVISION:
            revisions = f"{last.plan.spec_revision} then, {found.model.spec.REVISION} now"
            report.notes.append(f"since run {last.number}: the family's revision, {revisions}")
    for note in report.notes:
        say(f"note: {note}")


def _is_empty_folder(path: str) -> bool:
    """Whether a source is there and has no file yet: somebody will deliver one. A path that names nothing is not."""
    try:
        fs, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
        if any(mark in path for mark in "*?[") or not fs.isdir(root):
            return False
    except (ValueError, ImportError, OSError):
        return False
    names = (name[len(root) :].strip("/").split("/") for name in fs.find(root))
    return not any(
        parts[-1].lower().endswith(SUFFIXES) and not any(part.startswith(("_", ".")) for part in parts)
        for parts in names
    )


# ---------------------------------------------------------------- driving


class _Limits:
    """What one tick may spend, over all the runs it drives."""

    def __init__(self, config: JobConfig, now: Callable[[], datetime]) -> None:
        hours, deadline = config.run.max_gpu_hours, config.run.deadline
        self.now, self.gpu_seconds = now, None if hours is None else hours * 3600
        self.deadline = None if deadline is None else deadline_of(deadline, now())

    def reached(self) -> str | None:
        """Why nothing more is to be started, or None."""
        if self.gpu_seconds is not None and self.gpu_seconds <= 0:
            return "run.max_gpu_hours of this tick is spent"
        if self.deadline is not None and self.now().timestamp() >= self.deadline:
            return "run.deadline is reached"
        return None

    def of(self, config: JobConfig, spent: float) -> JobConfig:
        """The configuration with limits as a run that has spent so much takes them: its budget counts over its whole
        life, and a time of day has become a date."""
        hours = None if self.gpu_seconds is None else (spent + self.gpu_seconds) / 3600
        until = None if self.deadline is None else datetime.fromtimestamp(self.deadline).astimezone().isoformat()
        return replace(config, run=replace(config.run, max_gpu_hours=hours, deadline=until))


def _drive(
    config: JobConfig,
    runs: Sequence[ScheduledRun],
    own: turn.Turn | None,
    limits: _Limits,
    drive: Drive,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Drives what has not finished; `report.exit` is the tick's code."""
    todo = [run for run in scheduled.unfinished(runs) if scheduled.unresumable(run) is None]
    if len(todo) > 1:
        first = {run.number: run.top_priority() for run in todo}
        todo.sort(key=lambda run: (-first[run.number], run.number))
    codes: set[int] = set()
    while todo:
        run = todo[0]
        stopping = own is not None and own.stopping
        if stopping or (reached := limits.reached()) is not None:
            say("stopped by `vidgen stop`" if stopping else f"{reached}; what is left is for the next tick")
            codes.add(INTERRUPTED if stopping else LIMIT)
            break
        outcome = _one(config, run, own, limits, drive, say)
        report.driven.append(Driven(run.number, outcome.code, outcome.reason, outcome.counts))
        codes.add(outcome.code)
        todo.pop(0)
        if outcome.code in (BREAKER, LIMIT, INTERRUPTED):
            todo.insert(0, run)
            break
    report.waiting = sorted(run.number for run in todo)
    joined = own is None
    report.exit = next((code for code in (INTERRUPTED, BREAKER, LIMIT, SOME_FAILED) if code in codes), 0)
    if report.exit == 0 and HELD in codes and not joined:
        report.exit = HELD


def _one(
    config: JobConfig,
    run: ScheduledRun,
    own: turn.Turn | None,
    limits: _Limits,
    drive: Drive,
    say: Callable[[str], None],
) -> Outcome:
    """Drives one run, and takes from the tick's budget what that cost."""
    spent = run.gpu_seconds()
    options = scheduled.overrides(limits.of(config, spent), run)
    say(f"run {run.number}: {run.items:,} items, {run.objects.url}")
    try:
        if own is not None:
            own.driven = run.objects
        return drive(run.objects.url, options)
    except Held as held:
        say(f"run {run.number}: {held}")
        return Outcome(HELD, str(held), {}, 0.0)
    finally:
        if own is not None:
            own.driven = None
        if limits.gpu_seconds is not None:
            limits.gpu_seconds -= run.gpu_seconds() - spent
