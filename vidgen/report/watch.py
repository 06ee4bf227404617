"""`vidgen status --watch`: the status again and again until the run ends, from its output alone.

While a driver writes progress.json, a refresh reads that and the beat; otherwise the commits. Refuses to know how a
status is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from vidgen.report import status
from vidgen.report.status import NONE_YET, RUNNING, Status
from vidgen.store import epochs
from vidgen.store.objects import Objects

REFRESH_SECONDS = 2.0


def watch(output: str, every: float = REFRESH_SECONDS, sleep: Callable[[float], None] = time.sleep) -> Iterator[Status]:
    """A status at once, then one every so many seconds; the last is of a run that has ended, or whose driver died. A
    run that nobody drives yet is waited for. PlanError if there is no run."""
    found = status.read(output)
    yield found
    while found.driver in (RUNNING, NONE_YET):
        sleep(every)
        found = _refreshed(found) or status.read(output)
        yield found


def _refreshed(found: Status) -> Status | None:
    """The same run as progress.json shows it, or None where the commits must be asked."""
    objects = Objects(found.output)
    epoch = epochs.current(objects)
    if status.driver_of(epoch, status.last_sign(objects, epoch)) != RUNNING:
        return None
    shown = status.progress_of(objects)
    if shown.get("state") not in ("running", "stopping") or time.time() - shown["updated_at"] > status.FRESH_SECONDS:
        return None
    counts = {name: shown[name] for name in ("done", "failed", "quarantined", "pending")}
    return replace(found, driver=RUNNING, finished=False, **counts, **status.live(shown))
