"""The table of docs/parallel.md: `python -m tests.parallel.report`, about three minutes on two cores.

Each family and task on a tiny random checkpoint over gloo, in every way to divide it: how far one step's prediction and
the finished frames are from a single process', and what a block sends against the formula. Asserts nothing.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.parallel.cases import CASES, LAYOUTS, SHORT, requests
from tests.parallel.ranks import Made, bytes_sent, generated, inside
from tests.parallel.workers import Workers
from vidgen.parallel.layout import Layout


def main() -> None:
    workers = Workers()
    print("| family / case | mode | step | frames | collectives a block | bytes a block | formula |")
    print("|---|---|---|---|---|---|---|")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in SHORT:
                checkpoint = Path(folder, name.replace("/", "-"))
                checkpoint.mkdir()
                CASES[name].write(checkpoint)
                task, asked = CASES[name].task, requests(name, checkpoint, checkpoint)
                alone = generated(None, str(checkpoint), task, asked)
                for mode, layout in LAYOUTS.items():
                    made = workers.run(layout, generated, str(checkpoint), task, asked)
                    step, frames = errors(layout, made, alone)
                    sent = "none | 0 | 0"
                    if layout.context > 1:
                        ranks = workers.run(layout, inside, str(checkpoint), task, asked[0])
                        sent = traffic(layout, ranks)
                    print(f"| {name} | {mode} | {step:.1e} | {frames:.1e} | {sent} |", flush=True)
    finally:
        workers.close()


def errors(layout: Layout, made: list[Made], alone: Made) -> tuple[float, float]:
    """The largest differences from one process: of any rank's first predictions, and of rank 0's frames in [0, 1]."""
    step = 0.0
    for rank, own in enumerate(made):
        half = layout.place(rank)[0]
        divided = layout.cfg == 2 and len(alone.predictions) == 2
        wanted = alone.predictions[half : half + 1] if divided else alone.predictions
        for one, other in zip(own.predictions, wanted, strict=True):
            step = max(step, float((one - other).abs().max()))
    pairs = zip(made[0].frames, alone.frames, strict=True)
    return step, max(float(torch.dist(a, b, p=float("inf"))) for a, b in pairs if a is not None and b is not None)


def traffic(layout: Layout, ranks: list[dict[str, Any]]) -> str:
    """Collectives and bytes of an average block of the rank that sends the most, beside the formula's."""
    rows = []
    for rank, one in enumerate(ranks):
        calls, sent, shapes, blocks = (one[key] for key in ("calls", "sent", "shapes", "blocks"))
        expected: Counter[str] = Counter()
        for shape in shapes:
            expected.update(bytes_sent(layout, rank, shape))
        inner = [kind for kind in sent if kind != "all_gather"]
        counts = [(calls[kind] // blocks, NAMES[kind]) for kind in inner]
        counted = " + ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts)
        bytes_a_block = sum(sent[kind] for kind in inner) // blocks
        rows.append((bytes_a_block, counted, sum(expected.values()) // blocks))
    most, counted, formula = max(rows)
    return f"{counted} | {most:,} | {formula:,}"


NAMES = {"all_to_all_single": "all-to-all", "batch_isend_irecv": "rotation"}

if __name__ == "__main__":
    main()
