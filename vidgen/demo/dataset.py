"""The dataset of configs/demo.yaml: 32 prompts of the demo model, some with a seed of their own.

`python -m vidgen.demo.dataset configs/demo.parquet` writes it again. Refuses to know how a dataset is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vidgen.demo import data

SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),
        pa.field("held_out", pa.bool_(), nullable=False),
    ]
)


def rows() -> list[data.Combination]:
    """Each colour once in each direction, the shapes in turn."""
    return [
        data.Combination(colour, data.SHAPES[(i + 2 * j) % len(data.SHAPES)], direction)
        for j, direction in enumerate(data.DIRECTIONS)
        for i, colour in enumerate(data.COLOURS)
    ]


def table() -> pa.Table:
    """Columns prompt, seed (null for three rows of four: the run's seed decides), held_out (not seen in training)."""
    combinations = rows()
    return pa.table(
        {
            "prompt": [c.prompt for c in combinations],
            "seed": [1000 + i if i % 4 == 0 else None for i in range(len(combinations))],
            "held_out": [c.held_out for c in combinations],
        },
        schema=SCHEMA,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    pq.write_table(table(), parser.parse_args().out)


if __name__ == "__main__":
    main()
