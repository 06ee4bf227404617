"""Failures grouped by what they have in common, and totals of a run, from manifest-shaped values.

Standard library only: the driver signs every failure with `signature`. Refuses to know where the rows come from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = ("encode", "denoise", "decode", "write")
"""Stages whose seconds a manifest row holds, in their order, as columns `{stage}_s`."""
STATUSES = ("done", "failed", "quarantined", "rejected", "pending")

_VARIABLE = re.compile(
    r"(?P<path>(?:[a-z][a-z0-9+]{0,15}:/)?(?:/[\w.@=+~-]+){2,}/?)"  # folders and URLs
    r"|(?P<hex>\b(?:0x[0-9a-f]+|(?=[0-9a-f]*\d)[0-9a-f]{8,})\b)"  # addresses, hashes, ids
    r"|(?P<number>(?<!\w)\d+(?:[.,]\d+)*(?:e[+-]?\d+)?)",  # counts, sizes, seconds
    re.IGNORECASE,
)
_LONGEST = 160


def signature(error_class: str, error: str) -> str:
    """`class: message` with numbers, hashes, addresses and paths replaced, so that equal failures of different items
    are equal strings: "item: the file holds # frames of (#, #)". At most 160 characters of message."""
    flat = " ".join(error.split())
    return f"{error_class}: {_VARIABLE.sub(_placeholder, flat)[:_LONGEST]}"


def like(signature: str, error: str) -> str:
    """The condition, in the grammar of `where`, that selects the failures of a signature; `error` is one of them."""
    error_class, _, message = signature.partition(": ")
    text = re.sub(r"<\w*$", "", message)  # a placeholder that was cut
    text = re.sub(r"<path>|<id>|#", "%", text).replace("\\", "_").replace("'", "''")
    if " ".join(error.split()) != error:
        text = text.replace(" ", "%")
    return f"error_class = '{error_class}' and error like '{text}%'"


def _placeholder(found: re.Match[str]) -> str:
    if found["path"]:
        return "<path>"
    return "<id>" if found["hex"] else "#"


@dataclass(slots=True)
class Failure:
    """Equal failures: how many items, and one of them as the example. `number`: order of the first appearance."""

    number: int
    signature: str
    error_class: str
    count: int
    status: str
    item_id: str
    row_id: str
    error: str
    prompt: str


@dataclass(slots=True)
class Spread:
    """Count, sum, least and most of a measured quantity."""

    count: int = 0
    total: float = 0.0
    least: float = 0.0
    most: float = 0.0

    def add(self, value: float) -> None:
        self.least = min(self.least, value) if self.count else value
        self.most = max(self.most, value) if self.count else value
        self.count += 1
        self.total += value

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(slots=True)
class Summary:
    """Totals of a run: items by status, failures by signature, seconds by stage of done items, what was made."""

    statuses: Counter[str] = field(default_factory=Counter)
    stages: dict[str, Spread] = field(default_factory=lambda: {stage: Spread() for stage in STAGES})
    bytes: int = 0
    frames: int = 0
    video_seconds: float = 0.0
    sizes: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    first_at: float = 0.0
    last_at: float = 0.0
    _failures: dict[str, Failure] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts one manifest row; missing and null columns count as nothing."""
        status = row.get("status") or "pending"
        self.statuses[status] += 1
        if row.get("family"):
            self.models[f"{row['family']} {row.get('checkpoint') or ''}".strip()] += 1
        if status == "done":
            self._add_video(row)
        elif status != "pending":
            self._add_failure(row, status)

    def failures(self) -> list[Failure]:
        """The groups, largest first."""
        return sorted(self._failures.values(), key=lambda failure: (-failure.count, failure.signature))

    def number(self, signature: str) -> int:
        """The number of a group whose row has been added."""
        return self._failures[signature].number

    @property
    def items(self) -> int:
        return self.statuses.total()

    def _add_video(self, row: Mapping[str, Any]) -> None:
        frames, fps = row.get("num_frames") or 0, row.get("fps") or 0.0
        self.bytes += row.get("bytes") or 0
        self.frames += frames
        self.video_seconds += frames / fps if fps else 0.0
        self.sizes[f"{row.get('width')}×{row.get('height')}×{frames}"] += 1
        if row.get("node"):
            self.nodes[str(row["node"])] += 1
        for stage in STAGES:
            seconds = row.get(f"{stage}_s")
            if seconds is not None:
                self.stages[stage].add(float(seconds))
        created = row.get("created_at") or 0.0
        if created:
            self.first_at = min(self.first_at or created, created)
            self.last_at = max(self.last_at, created)

    def _add_failure(self, row: Mapping[str, Any], status: str) -> None:
        error_class, error = row.get("error_class") or status, row.get("error") or ""
        key = signature(error_class, error)
        if key in self._failures:
            self._failures[key].count += 1
            return
        self._failures[key] = Failure(
            number=len(self._failures),
            signature=key,
            error_class=error_class,
            count=1,
            status=status,
            item_id=row.get("item_id") or "",
            row_id=str(row.get("row_id") or ""),
            error=error,
            prompt=row.get("prompt") or "",
        )
