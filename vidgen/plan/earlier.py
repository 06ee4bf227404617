"""What the plans before an extension hold, so that it adds only what is new.

Item ids are kept as numbers, 16 bytes an item; refuses to know how a row becomes an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidgen.plan.files import Objects, part_table, rejected_table
from vidgen.plan.rows import Block
from vidgen.prompts import Rows
from vidgen.types import Plan

SCHEDULED = "scheduled"
"""Key of a plan's `resolved` where a scheduled tick keeps what later ticks want to know; no other plan has it."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """Items and rejections of the plans there are: item ids as two sorted halves of 64 bits, 16 bytes an item."""

    high: np.ndarray
    low: np.ndarray
    rejected: frozenset[tuple[str, int, str]]

    def has(self, item_ids: list[str]) -> np.ndarray:
        high, low = _halves(item_ids)
        place = np.minimum(np.searchsorted(self.high, high), max(0, len(self.high) - 1))
        if not len(self.high):
            return np.zeros(len(item_ids), dtype=bool)
        return np.asarray((self.high[place] == high) & (self.low[place] == low))


def read_earlier(store: Objects, plans: Sequence[Plan]) -> Earlier:
    """Reads every part of the plans there are."""
    halves = [_halves(part_table(store, part).column("item_id").to_pylist()) for plan in plans for part in plan.parts]
    high = np.concatenate([h for h, _ in halves] or [np.zeros(0, np.uint64)])
    low = np.concatenate([l for _, l in halves] or [np.zeros(0, np.uint64)])
    order = np.argsort(high, kind="stable")
    rejected: set[tuple[str, int, str]] = set()
    for plan in plans:
        for part in plan.rejected:
            table = rejected_table(store, part)
            rejected.update(zip(*(table.column(n).to_pylist() for n in _REJECTION), strict=True))
    return Earlier(high[order], low[order], frozenset(rejected))


_REJECTION = ("origin_file", "origin_row", "reason")


def _halves(item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.frombuffer(bytes.fromhex("".join(item_ids)), dtype=">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def only_new(block: Block, rows: Rows, earlier: Earlier) -> Block:
    """The block without what earlier plans hold."""
    refused = [
        i
        for i, (position, reason) in enumerate(zip(block.refused, block.reason, strict=True))
        if (rows.file, int(rows.row[position]), reason) not in earlier.rejected
    ]
    return select(block, np.flatnonzero(~earlier.has(block.item_id)).tolist(), refused)


def select(block: Block, items: Sequence[int], refused: Sequence[int]) -> Block:
    """The block with these of its items and these of its rejections, by their places in its lists."""
    chosen = Block(block.media, truncated=block.truncated, truncated_tokens=block.truncated_tokens)
    for name in ("position", "sample", "shape", "seed", "row_id", "item_id", "request_hash"):
        setattr(chosen, name, [getattr(block, name)[i] for i in items])
    for name in ("prompt", "negative_prompt", "priority"):
        setattr(chosen, name, [getattr(block, name)[i] for i in items])
    for name in ("refused", "refused_id", "refused_prompt", "variant", "reason"):
        setattr(chosen, name, [getattr(block, name)[i] for i in refused])
    return chosen
