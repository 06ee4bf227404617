"""What is in the source and in no earlier tick: one pass over the rows, and a verdict on each before it is planned.

A row that was seen is known by its id, and what it says by a digest of its cells: it is not planned again, and its
media are not looked at. Refuses to know what drives a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from vidgen.config import JobConfig
from vidgen.errors import ConfigError, PlanError
from vidgen.plan import columns
from vidgen.plan.cells import Cells
from vidgen.plan.earlier import select
from vidgen.plan.files import PART_ITEMS, Objects
from vidgen.plan.planning import Planning
from vidgen.plan.rows import Block
from vidgen.prompts import Rows
from vidgen.scheduled import seen as digests
from vidgen.scheduled.runs import ScheduledRun
from vidgen.scheduled.seen import Index, Keys, Seen

SHOWN = 10
"""Corrected rows named in a message."""


class NothingNew(Exception):
    """Every row of the source is in an earlier tick."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a tick does with rows it has seen. `on_change`: the row now says something else (skip, regenerate, error).
    `on_spec_change`: configuration, checkpoint or family make other pixels of it (skip, regenerate)."""

    on_change: str = "skip"
    on_spec_change: str = "skip"


@dataclass(slots=True)
class Tally:
    """Rows of the source: `new` ones in no earlier tick, `more` with samples in none, `same` ones, `changed` ones,
    `respec` of which now would be made otherwise; and `gone`, those of earlier ticks that are no longer selected."""

    new: int = 0
    more: int = 0
    same: int = 0
    changed: int = 0
    respec: int = 0
    gone: int = 0


class Difference(Planning):
    """Plans run n against runs 0 to n-1. `tally`, `again` (rows made again, by the run that has them) and `index` are
    complete once `run` returned or raised NothingNew."""

    def __init__(
        self, config: JobConfig, objects: Objects | None, runs: Sequence[ScheduledRun], seen: Seen, policy: Policy
    ) -> None:
        super().__init__(config, objects, (), None)
        self.runs, self.seen, self.policy = runs, seen, policy
        self.tally, self.index, self.again = Tally(), Index(), np.zeros(len(runs), np.int64)
        self.spec, self.names = self._spec(), sorted(self.planner.generation_fields)
        self._other_spec = np.array([run.facts["spec"] != self.spec for run in runs], bool)
        ids = config.dataset.id_column
        self._comparable = np.array(
            [run.facts["fields"] == self.names and run.facts["id_column"] == ids for run in runs], bool
        )
        self._found = np.zeros(len(seen), bool)
        self._corrected: list[str] = []
        self._refuse_other_ids()

    def facts(self) -> dict[str, Any]:
        """What the plan keeps for later ticks; writes the index of its rows."""
        assert self.objects is not None, "an index lies beside its plan"
        parts = self.index.write(self.objects, f"plan/{self.k}/seen")
        return {
            "run": len(self.runs),
            "spec": self.spec,
            "fields": self.names,
            "id_column": self.config.dataset.id_column,
            "samples": self.config.dataset.samples_per_row,
            "rows": asdict(self.tally),
            "again": {str(run): int(rows) for run, rows in enumerate(self.again) if rows},
            "seen": [asdict(part) for part in parts],
        }

    def _spec(self) -> str:
        """A digest of everything but the rows that decides what becomes of a row."""
        shaper, config = self.shaper, self.config
        values = {
            "spec_hash": shaper.spec_hash(),
            "task": config.model.task,
            "sampling": shaper.resolved(),
            "variants": shaper.variants,
            "tiling": str(config.engine.vae_tiling),
            "fields": sorted(self.planner.generation_fields),
            "resize": config.dataset.resize if self.media.columns else None,
        }
        return sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:32]

    def _refuse_other_ids(self) -> None:
        """Ids of another kind cannot be held against those of earlier runs; without an id column they hash the mapped
        fields, so that other fields are other ids."""
        if not self.runs or self.policy.on_spec_change == "regenerate":
            return
        last, now = self.runs[-1].facts, self.config.dataset.id_column
        way_out = "use another output.path, or --on-spec-change regenerate, which makes every row again"
        if last["id_column"] != now:
            was = last["id_column"]
            raise ConfigError(f"dataset.id_column: run {self.runs[-1].number} has {was!r}, now {now!r}; {way_out}")
        if now is None and last["fields"] != self.names:
            raise ConfigError(
                f"dataset.columns: run {self.runs[-1].number} maps {', '.join(last['fields'])}, now "
                f"{', '.join(self.names)}; rows without an id column are known by these fields alone; {way_out}"
            )

    # ---------------------------------------------------------------- the pass

    def _blocks(self) -> Iterator[tuple[Rows, Block]]:
        find_ids = self._ids()
        samples = self.config.dataset.samples_per_row
        step = max(1, PART_ITEMS // (len(self.shaper.variants) * samples))
        for batch in self._selected([*columns.mapped(self.config), *self.carried]):
            for start in range(0, len(batch.row), step):
                part = slice(start, start + step)
                rows = Rows(batch.file, batch.url, batch.row[part], batch.index[part], batch.data.slice(start, step))
                cells = self.planner.cells(rows.data)
                row_ids = find_ids(rows, cells)
                keys, content = digests.row_keys(row_ids), self._content(cells, len(rows.row))
                first, known = self._judge(rows, row_ids, keys, content)
                chosen = np.flatnonzero(first < samples)
                if len(chosen):
                    yield self._planned(rows, cells, row_ids, content, first, known, chosen)
        self.tally.gone = int(np.count_nonzero((self.seen.samples > 0) & ~self._found))
        if self._corrected and self.policy.on_change == "error":
            listed = "\n".join(f"  {line}" for line in self._corrected)
            more = self.tally.changed - len(self._corrected)
            rest = f"\n  and {more:,} more" if more else ""
            raise PlanError(f"{self.tally.changed:,} rows say something else than before:\n{listed}{rest}")

    def _content(self, cells: Cells, rows: int) -> np.ndarray:
        """Eight bytes of what each row says; zeros where the id says it already."""
        if self.config.dataset.id_column is None:
            return np.zeros(rows, np.uint64)
        return digests.contents(self.planner.keys(cells)).astype(np.uint64)

    def _judge(
        self, rows: Rows, row_ids: Sequence[str | None], keys: Keys, content: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first sample of each row that is to be made (`samples_per_row`: none), and where the row stands among
        those seen (-1: it does not)."""
        samples, policy, tally = self.config.dataset.samples_per_row, self.policy, self.tally
        known = digests.find(self.seen.keys, keys)
        known[[position for position, row_id in enumerate(row_ids) if row_id is None]] = -1
        is_known = known >= 0
        first = np.zeros(len(known), np.int64)
        if not is_known.any():
            return first, known
        at = known[is_known]
        self._found[at] = True
        run = self.seen.run[at]
        changed = (self.seen.content[at] != content[is_known]) & self._comparable[run]
        respec = ~changed & self._other_spec[run]
        made = self.seen.samples[at].astype(np.int64)
        again = (changed & (policy.on_change == "regenerate")) | (respec & (policy.on_spec_change == "regenerate"))
        own = np.where(again, 0, np.where(changed, samples, np.minimum(made, samples)))
        first[is_known] = own
        tally.changed += int(np.count_nonzero(changed))
        tally.respec += int(np.count_nonzero(respec))
        tally.more += int(np.count_nonzero(~again & (own < samples)))
        tally.same += int(np.count_nonzero(~changed))
        for position in np.flatnonzero(is_known)[changed].tolist():
            if len(self._corrected) < SHOWN:
                self._corrected.append(f"{row_ids[position]!r} ({rows.file}, row {rows.row[position]})")
        return first, known

    def _planned(
        self,
        rows: Rows,
        cells: Cells,
        row_ids: Sequence[str | None],
        content: np.ndarray,
        first: np.ndarray,
        known: np.ndarray,
        chosen: np.ndarray,
    ) -> tuple[Rows, Block]:
        """The chosen rows and what became of them, less what an earlier run has; the index is told of them."""
        positions = chosen.tolist()
        rows, cells = _rows_at(rows, chosen), _cells_at(cells, positions)
        ids, content, first, known = [row_ids[i] for i in positions], content[chosen], first[chosen], known[chosen]
        block = self.planner.plan(cells, ids, self.media.look(rows, cells))
        unseen = np.asarray(block.sample, np.int64) >= first[np.asarray(block.position, np.int64)]
        refused = np.asarray(block.refused, np.int64)
        rejections = digests.rejection_keys(block.refused_id, content[refused])
        recorded = digests.find(self.seen.keys, rejections) >= 0
        block = select(block, np.flatnonzero(unseen).tolist(), np.flatnonzero(~recorded).tolist())
        made = np.unique(np.asarray(block.position, np.int64))
        samples = self.config.dataset.samples_per_row
        self.index.add(digests.row_keys([ids[at] for at in made.tolist()]), content[made], samples)
        self.index.add(rejections.take(~recorded), content[refused[~recorded]], 0)
        touched = np.union1d(made, refused[~recorded])
        self.tally.new += int(np.count_nonzero(known[touched] < 0))
        before = known[made]
        runs = self.seen.run[before[(before >= 0) & (first[made] == 0)]]
        self.again += np.bincount(runs, minlength=len(self.runs))
        return rows, block

    def _refuse_outcome(self) -> None:
        """Nothing new is no mistake; nothing valid among what is new is one of the first tick alone."""
        if not self.counts["items"] and not self.counts["rejected"]:
            raise NothingNew
        if self.counts["items"] or not self.runs:
            super()._refuse_outcome()
        allowed, refused = self.config.dataset.max_rejected, self.counts["rejected"]
        if allowed is not None and refused > allowed:
            raise PlanError(
                f"{self.config.dataset.path}: {refused:,} of the new rows rejected, none valid; dataset.max_rejected "
                f"allows {allowed:,}:\n{self._listed()}"
            )


def _rows_at(rows: Rows, chosen: np.ndarray) -> Rows:
    if len(chosen) == len(rows.row):
        return rows
    return Rows(rows.file, rows.url, rows.row[chosen], rows.index[chosen], rows.data.take(pa.array(chosen)))


def _cells_at(cells: Cells, positions: Sequence[int]) -> Cells:
    def at(lists: Mapping[str, list]) -> dict[str, list]:
        return {name: [values[i] for i in positions] for name, values in lists.items()}

    faults = {new: cells.faults[old] for new, old in enumerate(positions) if old in cells.faults}
    return Cells(at(cells.values), faults, at(cells.media))
