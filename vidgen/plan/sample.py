"""Which items of a plan stand for all of it: some of every shape, the costliest certainly, spread over the plan.

The same plan gives the same items, whatever is done of it. Refuses to know what is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vidgen import family
from vidgen.plan.files import Objects, items_of, part_table, total_items
from vidgen.plan.shapes import label_of
from vidgen.types import Plan

SHAPE_COLUMNS = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "params")
MOST_SHAPES = 65_535


@dataclass(slots=True)
class Shapes:
    """The shape of every item: `code` by ordinal, `labels` and `flops` by code. Memory is two bytes an item."""

    code: np.ndarray
    labels: list[str] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def label(self, ordinal: int) -> str:
        return self.labels[self.code[ordinal]]


def shapes(objects: Objects, plans: Sequence[Plan]) -> Shapes:
    """Reads the columns of every part that shapes depend on. Labels are those of a plan's estimate."""
    found = Shapes(np.zeros(total_items(plans), np.uint16))
    codes: dict[str, int] = {}
    for plan in plans:
        frames_out = family.spec(plan.family).frames_out
        for part in plan.parts:
            table = part_table(objects, part)
            keys = np.zeros(table.num_rows, np.int64)
            for name in SHAPE_COLUMNS:
                values = table.column(name).combine_chunks().dictionary_encode()
                keys = np.unique(keys * (len(values.dictionary) + 1) + _indices(values), return_inverse=True)[1]
            _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            own = np.zeros(len(first), np.uint16)
            for number, item in enumerate(items_of(plan, table.take(first))):
                label = label_of(item.request, frames_out(item.request))
                if label not in codes:
                    codes[label] = min(len(codes), MOST_SHAPES)
                    found.labels.append(label)
                    found.flops.append(item.flops)
                own[number] = codes[label]
            found.code[part.first : part.first + part.items] = own[inverse]
    return found


def stratified(known: Shapes, items: int) -> list[int]:
    """Ordinals of at most `items` items: one of the costliest shape, one of each other as far as they reach, those with
    the most work first; and the rest by their share of the work, where an error costs most."""
    counts = np.bincount(known.code, minlength=len(known.labels))[: len(known.labels)]
    work = counts * np.maximum(np.array(known.flops), 1e-9)
    order = sorted(np.nonzero(counts)[0].tolist(), key=lambda code: (-work[code], known.labels[code]))
    costliest = max(order, key=lambda code: (known.flops[code], known.labels[code]), default=0)
    order = [costliest, *(code for code in order if code != costliest)] if order else []
    given = dict.fromkeys(order[:items], 1)
    for _ in range(min(items, int(counts.sum())) - len(given)):
        open_ = [code for code in given if given[code] < counts[code]]
        given[max(open_, key=lambda code: (work[code] / given[code], known.labels[code]))] += 1
    chosen: list[int] = []
    for code, count in given.items():
        places = ((np.arange(count) + 0.5) * counts[code] / count).astype(int)
        chosen += np.nonzero(known.code == code)[0][places].tolist()
    return sorted(chosen)


def _indices(values: object) -> np.ndarray:
    """Codes of a dictionary array; its nulls are a code of their own."""
    indices = values.indices  # type: ignore[attr-defined]
    return np.asarray(indices.fill_null(len(values.dictionary)).to_numpy(zero_copy_only=False))  # type: ignore[attr-defined]
