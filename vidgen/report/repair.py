"""`vidgen retry`, `plan --extend` and `gc`: what changes a run's state from outside, under the run's own lease."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from vidgen import faults, manifest
from vidgen import where as grammar
from vidgen.config import JobConfig
from vidgen.plan.build import PlanResult, build
from vidgen.plan.files import require_plan, total_items
from vidgen.report.verify import check_videos
from vidgen.store import commits, epochs, gc
from vidgen.store import state as states
from vidgen.store.objects import Objects

LEASE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Reopened:
    """How many items were reopened, and the generation that lists them (None if there were none)."""

    items: int
    generation: int | None


def retry(output: str, *, where: str | None = None, missing: bool = False, takeover: bool = False) -> Reopened:
    """Reopens failed and quarantined items (those that `where` selects), or with `missing` the done ones whose video is
    gone or damaged. Raises Held while a driver runs, UserError for a bad `where`."""
    objects = Objects(output)
    plans = require_plan(objects)
    lease = epochs.acquire(objects, lease=LEASE_SECONDS, takeover=takeover)
    try:
        with epochs.beating(lease):
            state = states.load(objects, total_items(plans))
            chosen: list[str] = []
            for table in manifest.rows(objects, plans, state):
                if where:
                    table = table.filter(grammar.compile(where, table.schema))
                chosen += _damaged(objects, table) if missing else _not_done(table)
            generation = reopen(objects, chosen, lease) if chosen else None
    finally:
        lease.release(**lease.inherited())
    return Reopened(len(chosen), generation)


def reopen(objects: Objects, item_ids: Iterable[str], lease: epochs.Lease) -> int:
    """Opens the next generation for these items; returns its number. Takes away `_SUCCESS.json` first, so that a reader
    never takes the old manifest for the new state. The caller holds the lease."""
    chosen = sorted(set(item_ids))
    assert chosen, "a generation lists at least one item"
    number = max(commits.list_generations(objects), default=0) + 1
    lease.check()
    with faults.around("unfinish"):
        objects.delete(manifest.SUCCESS)
    lease.check()
    if not commits.create_generation(objects, number, chosen, lease.token):
        raise RuntimeError(f"generation {number} appeared while this process held the lease")
    return number


def extend(
    config: JobConfig, objects: Objects, *, takeover: bool = False, say: Callable[[str], None] = lambda text: None
) -> PlanResult:
    """Adds plan k+1, under the lease; `_SUCCESS.json` goes first. Raises Held while a driver runs."""
    lease = epochs.acquire(objects, lease=config.run.lease, takeover=takeover)

    def before_freeze() -> None:
        lease.check()
        with faults.around("unfinish"):
            objects.delete(manifest.SUCCESS)
        lease.check()

    try:
        with epochs.beating(lease):
            return build(config, objects, extend=True, token=lease.token, before_freeze=before_freeze, say=say)
    finally:
        lease.release(**lease.inherited())


def collect(output: str, *, older_than: float, dry_run: bool = False) -> gc.Swept:
    """`gc.collect` of a run; PlanError if there is none."""
    objects = Objects(output)
    require_plan(objects)
    return sweep(objects, older_than=older_than, dry_run=dry_run)


def sweep(objects: Objects, *, older_than: float, dry_run: bool = False) -> gc.Swept:
    """`gc.collect`, under the lease where it takes objects younger than two hours."""
    if dry_run or older_than >= gc.SAFE_SECONDS:
        return gc.collect(objects, older_than, dry_run=dry_run)
    lease = epochs.acquire(objects, lease=LEASE_SECONDS)
    try:
        with epochs.beating(lease):
            return gc.collect(objects, older_than, before_delete=lease.check)
    finally:
        lease.release(**lease.inherited())


def _not_done(table: pa.Table) -> Iterator[str]:
    for item_id, status in zip(table.column("item_id").to_pylist(), table.column("status").to_pylist(), strict=True):
        if status in ("failed", "quarantined"):
            yield item_id


def _damaged(objects: Objects, table: pa.Table) -> Iterator[str]:
    done = table.filter(pc.equal(table.column("status"), "done"))
    for item_id, problem in check_videos(objects, done.to_pylist()):
        if problem:
            yield item_id
