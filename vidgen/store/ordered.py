"""The ledger's records by ordinal, for who goes through a run in the order of its plan.

A ledger part holds what was settled at one time, so its ordinals may lie anywhere in the plan. Each part is read once:
a million records at a time are sorted and laid on this machine's disk, in files without a name, so that nothing is left
behind by whoever is killed; the last, or only, such run stays in memory. Refuses to know which record counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from vidgen.errors import InfrastructureError
from vidgen.store import ledger
from vidgen.store.objects import Objects

RUN = 1_000_000
"""Records that are sorted at a time: some hundred MB of memory, and of disk for each run but the last."""


class Ordered:
    """What the ledger said when this was made. InfrastructureError where the disk of temporary files is full."""

    def __init__(self, objects: Objects) -> None:
        self._runs: list[pa.Table] = []
        waiting: list[pa.Table] = []
        for table in ledger.read_tables(objects):
            waiting.append(table)
            if sum(one.num_rows for one in waiting) >= RUN:
                self._runs.append(_on_disk(_sorted(waiting)))
                waiting = []
        self._runs.append(_sorted(waiting))

    def between(self, first: int, last: int) -> pa.Table:
        """The records of ordinals `first` to `last`, both included; several where an item was reopened."""
        return pa.concat_tables([_cut(run, first, last) for run in self._runs])


def _sorted(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables([ledger.SCHEMA.empty_table(), *tables]).sort_by("ordinal").combine_chunks()


def _cut(run: pa.Table, first: int, last: int) -> pa.Table:
    begin, end = np.searchsorted(run.column("ordinal").to_numpy(), [first, last + 1])
    return run.slice(begin, end - begin)


def _on_disk(table: pa.Table) -> pa.Table:
    """The same table, whose memory is a file that has no name any more."""
    try:
        with tempfile.NamedTemporaryFile(prefix="vidgen-ledger-") as file:
            with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    except OSError as error:
        raise InfrastructureError(
            f"{tempfile.gettempdir()}: the ledger could not be sorted there ({error}); TMPDIR may name another disk"
        ) from error
