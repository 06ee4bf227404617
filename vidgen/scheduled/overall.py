"""What `vidgen status`, `verify`, `retry` and `gc` say of a schedule: of all its runs together.

Each run is looked at as by its own command. Nothing here changes a run but gc, which spares what it spares in a run.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vidgen.errors import printable
from vidgen.report import repair, status
from vidgen.report.status import MOST_COMMANDS, RUNNING, Failures, Status
from vidgen.report.verify import Verdict
from vidgen.report.verify import verify as verify_run
from vidgen.report.watch import REFRESH_SECONDS
from vidgen.scheduled import view
from vidgen.scheduled.runs import READERS, ScheduledRun, below, read_runs
from vidgen.store import epochs
from vidgen.store.epochs import Held
from vidgen.store.gc import Swept
from vidgen.store.objects import Objects

SUMMED = ("total", "done", "failed", "quarantined", "pending", "rejected")


@dataclass(slots=True)
class Overall:
    """All runs of a schedule: `runs` in order, their sums, and how the last tick is: running, stopped, died, none yet.
    `cost` is of the runs that have a price, `rate` and `eta` of those that are driven now."""

    output: str
    tick: str
    total: int = 0
    done: int = 0
    failed: int = 0
    quarantined: int = 0
    pending: int = 0
    rejected: int = 0
    rate: float | None = None
    eta: float | None = None
    gpu_hours: float = 0.0
    cost: float | None = None
    runs: list[Status] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        """Whether a tick runs, or somebody drives one of the runs."""
        return self.tick == RUNNING or any(run.driver == RUNNING for run in self.runs)


# ---------------------------------------------------------------- status


def read(output: str, runs: Sequence[ScheduledRun], known: Mapping[int, Status] | None = None) -> Overall:
    """The state of these runs of a schedule; of those `known` it is not asked again."""
    found, known = Overall(output, _tick(Objects(output))), known or {}

    def look(run: ScheduledRun) -> Status:
        return known.get(run.number) or status.read(run.objects.url, compared=False)

    with ThreadPoolExecutor(READERS) as pool:
        found.runs = list(pool.map(look, runs))
    for name in SUMMED:
        setattr(found, name, sum(getattr(run, name) for run in found.runs))
    found.gpu_hours = round(sum(run.gpu_hours for run in found.runs), 4)
    for name in ("cost", "rate"):
        values = [getattr(run, name) for run in found.runs if getattr(run, name) is not None]
        setattr(found, name, sum(values) if values else None)
    found.eta = max((run.eta for run in found.runs if run.eta is not None), default=None)
    return found


def watch(
    output: str, every: float = REFRESH_SECONDS, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Overall]:
    """The state at once, then again every so many seconds, until no tick and no driver runs. A run that has finished is
    not looked at again."""
    runs, finished = below(output), dict[int, Status]()
    while True:
        found = read(output, runs, finished)
        yield found
        if not found.is_running:
            return
        finished = {run.number: seen for run, seen in zip(runs, found.runs, strict=True) if seen.finished}
        sleep(every)
        runs = read_runs(Objects(output), runs)


def _tick(root: Objects) -> str:
    epoch = epochs.current(root)
    return status.driver_of(epoch, status.last_sign(root, epoch))


def render(found: Overall) -> Group:
    """As a person reads it: the sums, each run that has not finished, failures of all runs, what to do next."""
    last = found.runs[-1]
    count = f"{len(found.runs)} run{'s' if len(found.runs) > 1 else ''}"
    head = Text.assemble((printable(last.name), "bold"), f"  a schedule of {count}  (last tick: {found.tick})")
    lines: list[Text | Table] = [head, Text(f"  {status.numbers(found)}")]
    for number, run in enumerate(found.runs):
        if not run.finished:
            lines.append(Text(f"  run {number}: {status.numbers(run)} (driver {run.driver})"))
            lines += [Text(f"    note: {printable(note)}") for note in run.notes]
    failed = [(number, row) for number, run in enumerate(found.runs) for row in run.failures]
    if failed:
        lines += [_failures(failed), *(Text(f"  {printable(row.retry)}") for _, row in failed[-MOST_COMMANDS:])]
        if len(failed) > MOST_COMMANDS:
            lines.append(Text(f"  and {len(failed) - MOST_COMMANDS} more: vidgen status {found.output}/runs/N"))
        lines.append(Text("  the next tick makes again what is reopened"))
    elif found.pending and not found.is_running:
        lines.append(Text("  the next tick goes on"))
    return Group(*lines)


def _failures(failed: Sequence[tuple[int, Failures]]) -> Table:
    """Failures of all runs that are alike in one line, the most frequent first."""
    groups: dict[str, list[tuple[int, Failures]]] = {}
    for number, row in failed:
        groups.setdefault(row.signature, []).append((number, row))
    table = Table("items", "runs", "failure", "example", title="failures", title_justify="left")
    for rows in sorted(groups.values(), key=lambda rows: -sum(row.count for _, row in rows)):
        last = rows[-1][1]
        where = ", ".join(str(number) for number, _ in rows)
        items = sum(row.count for _, row in rows)
        table.add_row(str(items), where, Text(printable(last.error[:200])), last.example)
    return table


# ---------------------------------------------------------------- verify


def verify(
    output: str, runs: Sequence[ScheduledRun], *, fast: bool = False, sample: float = 1.0, strict: bool = False
) -> Verdict:
    """Verifies each run, then that the view is of these runs as they are and its parts are what it names."""
    whole = Verdict()
    for run in runs:
        found = verify_run(run.objects.url, fast=fast, sample=sample, strict=strict)
        for name in ("items", "rejected", "done", "not_done", "checked", "orphans"):
            setattr(whole, name, getattr(whole, name) + getattr(found, name))
        for text in found.problems:
            whole.problem(f"run {run.number}: {text}")
        whole.failed += found.failed - len(found.problems)
    for text in view.problems(Objects(output), runs):
        whole.problem(text)
    return whole


# ---------------------------------------------------------------- retry, gc


def one_to_retry(found: Overall) -> str:
    """Why a schedule is not reopened as a whole, and the command for each run with failed items. The next tick must be
    able to finish what is opened, and what an old run was made with may be gone: so a person names the run."""
    url = found.output.rstrip("/")
    failed = [(number, run) for number, run in enumerate(found.runs) if run.failed or run.quarantined]
    lines = [f"{url} is a schedule; retry reopens items of one run, and the next tick makes them again. Runs 0 to"]
    lines[0] += (
        f" {len(found.runs) - 1}, those with failed items:" if failed else f" {len(found.runs) - 1}: none failed"
    )
    for number, run in failed[-MOST_COMMANDS:]:
        lines.append(f"  vidgen retry {shlex.quote(f'{url}/runs/{number}')}   ({run.failed + run.quarantined} items)")
    if len(failed) > MOST_COMMANDS:
        lines.append(f"  and {len(failed) - MOST_COMMANDS} earlier ones")
    return "\n".join(lines)


def collect(output: str, runs: Sequence[ScheduledRun], *, older_than: float, dry_run: bool = False) -> Swept:
    """`vidgen gc` of the schedule's own folder and of each run. Held if a lease is needed and somebody has it."""
    swept = [repair.sweep(Objects(output), older_than=older_than, dry_run=dry_run)]
    for run in runs:
        try:
            swept.append(repair.sweep(run.objects, older_than=older_than, dry_run=dry_run))
        except Held as held:
            raise Held(f"run {run.number}: {held}") from held
    return Swept(*(sum(getattr(one, name) for one in swept) for name in Swept.__slots__))
