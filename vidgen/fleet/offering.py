"""In which order a plan is offered to the dispatcher, which knows a window of it.

Within its window the dispatcher goes longest first. An item so long that what is left of the work beside it would end
before it does must not come in the last window: such items are offered first. Pure; refuses to know files and replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vidgen.types import Item

MARGIN = 2.0
"""How much more work than the longest item the last window must have beside it: without what is offered first it has
less than the mean says, and nobody knows an item's seconds."""


def long_flops(shapes: Iterable[Mapping[str, Any]], window: int, replicas: int) -> float | None:
    """FLOPs above which an item is to be offered first; None if there is none. `shapes` are those of plans' estimates,
    made on `replicas`; the last half of the window is what surely is still to be made when the last item is offered."""
    sizes = [(float(shape["tflops_per_item"]) * 1e12, int(shape["items"])) for shape in shapes]
    items = sum(count for _, count in sizes)
    if not items:
        return None
    mean = sum(flops * count for flops, count in sizes) / items
    long = window / 2 * mean / max(1, replicas) / MARGIN
    return long if items > window and max(flops for flops, _ in sizes) > long else None


def long_first(read: Callable[[], Iterator[Item]], long: float | None) -> Iterator[Item]:
    """What `read()` gives, each time in the same order: the items of more than `long` FLOPs before the others."""
    if long is None:
        yield from read()
        return
    yield from (item for item in read() if item.flops > long)
    yield from (item for item in read() if item.flops <= long)
