"""What the dispatcher goes by: numbers that do not change while a run lasts. Decides nothing."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rules:
    """`window`: items known at once. `batch_tokens`, `batch_items`: most tokens and items of a batch (1 item always
    fits). `prefetch`: batches waiting in a replica beside the running one. `own_node`: the driver's machine.

    `bands`: token counts, rising. Items of at most the first are of band 0, above it of band 1, and so on; `band_of`
    says which band a replica serves (0 where it says nothing), and an item goes to replicas of its own band only.
    `degree_of`: members of a replica, where it is a gang.

    `order`: how the plan is taken, of `supply.ORDERS`. `idle_seconds`: how long a replica too many is idle before it is
    closed, where their number follows the cluster. `rungs`: what an engine of this run can do to need less memory, of
    `judgement.LADDER`."""

    max_attempts: int = 3
    breaker_failures: int = 50
    window: int = 4096
    batch_tokens: int = 0
    batch_items: int = 1
    prefetch: int = 1
    own_node: str = ""
    idle_seconds: float = 60.0
    bands: tuple[int, ...] = ()
    band_of: Mapping[str, int] = field(default_factory=dict)
    degree_of: Mapping[str, int] = field(default_factory=dict)
    rungs: tuple[str, ...] = ()
    order: str = "longest"

    def band(self, tokens: int) -> int:
        """The band of an item of so many tokens."""
        return bisect.bisect_left(self.bands, tokens)

    def wider(self, band: int) -> int | None:
        """The band whose replicas have the fewest members above those of this band; None if none has more."""
        degrees = {self.band_of.get(name, 0): degree for name, degree in self.degree_of.items()}
        larger = {degree: other for other, degree in degrees.items() if degree > degrees.get(band, 1)}
        return larger[min(larger)] if larger else None
