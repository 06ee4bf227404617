"""All runs of a schedule as rows to pack: the view's parts, less what a later run made again.

Refuses to know what they are packed into.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vidgen import manifest
from vidgen.errors import PlanError
from vidgen.pack.source import Source, checkpoint_of, unified
from vidgen.scheduled import view
from vidgen.scheduled.runs import read_runs
from vidgen.store.objects import Objects

SUPERSEDED = "superseded"
"""The status, to a pack, of a video of which a later run has made another."""


def of_schedule(output: str, *, partial: bool = False) -> Source | None:
    """The rows of all runs below a scheduled output as its last tick left them; None if it is none. PlanError while a
    run has not finished, unless `partial`, and while a part is read whose bytes are not those that the view names."""
    root = Objects(output)
    if not root.exists(view.VIEW):
        return None
    body: Mapping[str, Any] = json.loads(root.read(view.VIEW))
    if body["unfinished"] and not partial:
        listed = ", ".join(str(number) for number in body["unfinished"])
        raise PlanError(f"{output}: run {listed} has not finished; the next tick goes on, --partial packs what is done")
    parts = {name: digest for entry in body["runs"] for name, digest in entry["parts"].items()}
    runs = read_runs(root)
    return Source(
        root,
        lambda: _tables(root, parts),
        unified(table.schema for table in _tables(root, parts)),
        str(runs[0].plan.config.get("name") or "videos"),
        tuple({checkpoint_of(run.plan): None for run in runs}),
        f"`vidgen retry {output}/runs/N --missing` reopens what is gone or damaged (the column `run` says which), and "
        "the next tick makes it again",
    )


def _tables(root: Objects, parts: Mapping[str, str]) -> Iterator[pa.Table]:
    for table in manifest.read_parts(root, parts, view.OTHERWISE):
        over = table.column("superseded_by").is_valid()
        status = pc.if_else(over, SUPERSEDED, table.column("status"))
        yield table.set_column(table.schema.get_field_index("status"), "status", status)
