"""When the last item is made: many items of few lengths, given longest first to whichever replica is free first.

The dispatcher's own order, by shape and not by item, so that a hundred million items cost what a hundred do. Refuses to
know what an item is and what can go wrong with it: no failures, no batches, no stores.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

HALVINGS = 100
"""Of the interval in which a time is searched: finer than a float can tell."""


def makespan(shapes: Iterable[tuple[float, int]], replicas: int) -> float:
    """Seconds until `replicas` equal replicas have made `shapes`, (seconds an item, items) each; 0.0 of none.

    Longest processing time first (Graham, "Bounds on multiprocessing timing anomalies", 1969): at most 4/3 of what is
    possible, and never later than the lower bound plus one item."""
    ends = [0.0] * replicas
    for seconds, items in sorted(shapes, reverse=True):
        if seconds > 0 and items > 0:
            _add(ends, seconds, items)
    return max(ends)


def lower_bound(shapes: Sequence[tuple[float, int]], replicas: int) -> float:
    """Seconds that no order can beat: the work divided, or the longest item."""
    work = sum(seconds * items for seconds, items in shapes)
    return max(work / replicas, max((seconds for seconds, items in shapes if items), default=0.0))


def _add(ends: list[float], seconds: float, items: int) -> None:
    """Each of `items` equal items begins where a replica is free first. Their begins are the smallest of all `end + k x
    seconds`; as many as surely are go in at once, the rest, fewer than there are replicas, one by one."""
    low, high = min(ends), max(ends) + seconds * (items // len(ends) + 1)
    for _ in range(HALVINGS):
        level = (low + high) / 2
        if sum(_until(level, end, seconds) for end in ends) <= items:
            low = level
        else:
            high = level
    for replica, end in enumerate(ends):
        count = _until(low, end, seconds)
        ends[replica] = end + count * seconds
        items -= count
    heapq.heapify(ends)
    for _ in range(items):
        heapq.heapreplace(ends, ends[0] + seconds)


def _until(level: float, end: float, seconds: float) -> int:
    """Items that are made from `end` on before `level`."""
    return max(0, int((level - end) / seconds))
