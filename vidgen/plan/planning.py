"""One pass from dataset to plan k: rows are selected, planned, counted and written as parts.

Refuses to know which plan becomes the frozen one; `vidgen.plan.build` decides that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import pyarrow.compute as pc

from vidgen import VERSION, prompts, where
from vidgen.config import JobConfig, to_dict
from vidgen.errors import ConfigError, PlanError
from vidgen.plan import columns, cost, ids, model, placing
from vidgen.plan.earlier import Earlier, only_new
from vidgen.plan.files import ITEM_SCHEMA, PART_ITEMS, REJECTED_SCHEMA, Objects, PartWriter
from vidgen.plan.media import MediaPlanner
from vidgen.plan.rows import Block, RowPlanner, item_table, rejection_table, with_carried
from vidgen.plan.shapes import Shape, Shaper
from vidgen.prompts import Rows
from vidgen.types import Part, Plan

MOST_REASONS = 1000
"""Distinct reasons counted apart."""
LISTED_REASONS = 10
SAY_SECONDS = 5.0


class Planning:
    """`reasons` (most frequent first) and `notes` are complete once `run` returned. Nothing is written without
    `objects`."""

    def __init__(
        self, config: JobConfig, objects: Objects | None, plans: Sequence[Plan], earlier: Earlier | None
    ) -> None:
        self.config, self.objects, self.plans, self.earlier = config, objects, plans, earlier
        self.k = plans[-1].k + 1 if plans else 0
        self.reasons: dict[str, int] = {}
        self.notes: list[str] = []
        self.counts = {"rows": 0, "items": 0, "rejected": 0, "truncated_prompts": 0, "truncated_tokens": 0}
        self._examples: dict[str, str] = {}
        self.model = model.resolve(config)
        self._same_checkpoint()
        takes = self.model.spec.TASKS[config.model.task]
        columns.check_media(config, self.model.family, takes)
        self.shaper = Shaper(config, self.model, plans[0].resolved["sampling"] if plans else None)
        self.planner = RowPlanner(config, self.model, self.shaper)
        self._check_configured_texts()
        self.dataset = prompts.open_dataset(config.dataset.path)
        self._output_apart()
        self.media = MediaPlanner(config, takes, self.dataset.folder)
        columns.check(config, self.dataset, self.planner.types)
        self.carried = columns.carried(config, self.dataset)
        self.notes += columns.unmapped(config, self.carried)
        self.condition, self.condition_columns = self._where()
        weights = self.model.spec.weight_bytes(self.model.params)
        price = config.run.price_per_gpu_hour
        self.estimate = cost.Estimate(config.output.format, price, weights, placing.placement(config, self.model))

    def _output_apart(self) -> None:
        """A folder of prompts is read whole, at every extension again: the run's own Parquet must not lie in it."""
        source, output, fs = self.config.dataset.path, self.config.output.path or "", self.dataset.fs
        if not output or fsspec.utils.get_protocol(source) != fsspec.utils.get_protocol(output):
            return
        folder = str(fs._strip_protocol(source)).rstrip("/")
        if f"{fs._strip_protocol(output)}/".startswith(f"{folder}/") and fs.isdir(folder):
            raise ConfigError(
                f"output.path: {output!r} lies in the folder dataset.path: {source!r}, all of whose Parquet is read as "
                f"prompts; put it elsewhere, or name the files ({source.rstrip('/')}/*.parquet)"
            )

    def run(self, say: Callable[[str], None]) -> Plan | None:
        """The plan, its parts written; None if an extension finds nothing new. PlanError without a valid row, or with
        more rejections than dataset.max_rejected. `say` hears of progress every few seconds."""
        first = sum(plan.counts["items"] for plan in self.plans)
        items = self._writer("part", first, ITEM_SCHEMA)
        refused = self._writer("rejected", 0, REJECTED_SCHEMA)
        spoke = time.monotonic()
        for rows, block in self._blocks():
            self._count(rows, block)
            if items is not None and block.position:
                ordinal = first + self.counts["items"] - len(block.position)
                items.add(item_table(block, rows, ordinal, self.carried))
            if refused is not None and block.refused:
                refused.add(rejection_table(block, rows, self.carried))
            if time.monotonic() - spoke > SAY_SECONDS:
                spoke = time.monotonic()
                say(f"planned {self.counts['rows']:,} rows of {self.dataset.rows:,}")
        self.reasons = dict(sorted(self.reasons.items(), key=lambda entry: -entry[1]))
        self._refuse_outcome()
        if self.plans and not self.counts["items"] and not self.counts["rejected"]:
            return None
        return self._header(items.close() if items else (), refused.close() if refused else ())

    # ---------------------------------------------------------------- rows

    def _blocks(self) -> Iterator[tuple[Rows, Block]]:
        """Selected rows in file order and what became of them, about PART_ITEMS items at a time."""
        find_ids = self._ids()
        per_row = len(self.shaper.variants) * self.config.dataset.samples_per_row
        step = max(1, PART_ITEMS // per_row)
        for batch in self._selected([*columns.mapped(self.config), *self.carried]):
            for start in range(0, len(batch.row), step):
                part = slice(start, start + step)
                rows = Rows(batch.file, batch.url, batch.row[part], batch.index[part], batch.data.slice(start, step))
                found = self.planner.cells(rows.data)
                row_ids = find_ids(rows, found)
                block = self.planner.plan(found, row_ids, self.media.look(rows, found))
                yield rows, block if self.earlier is None else only_new(block, rows, self.earlier)

    def _ids(self) -> ids.Ids:
        if (column := self.config.dataset.id_column) is not None:
            return ids.from_column(column, lambda: self._selected([column]))
        return ids.from_content(self.planner, self._up_to_limit())

    def _selected(self, keep: list[str]) -> Iterator[Rows]:
        batches = prompts.read(self.dataset, [*keep, *self.condition_columns])
        return prompts.select(batches, self.condition, self.config.dataset.limit, keep)

    def _up_to_limit(self) -> Iterator[Rows]:
        """All rows, selected or not, as far as `limit` lets planning read."""
        left = self.config.dataset.limit
        for rows in prompts.read(self.dataset, [*self.config.dataset.columns.values(), *self.condition_columns]):
            yield rows
            if left is not None and (left := left - prompts.count_chosen(rows, self.condition)) <= 0:
                return

    def _writer(self, kind: str, first: int, schema: Any) -> PartWriter | None:
        if self.objects is None:
            return None
        return PartWriter(self.objects, self.k, kind, first, with_carried(schema, self.dataset.schema, self.carried))

    # ---------------------------------------------------------------- counting

    def _count(self, rows: Rows, block: Block) -> None:
        self.counts["rows"] += len(rows.row)
        self.counts["items"] += len(block.position)
        self.counts["rejected"] += len(block.refused)
        self.counts["truncated_prompts"] += block.truncated
        self.counts["truncated_tokens"] += block.truncated_tokens
        tally: dict[int, tuple[Shape, int]] = {}
        for shape in block.shape:
            tally[id(shape)] = (shape, tally.get(id(shape), (shape, 0))[1] + 1)
        for shape, items in tally.values():
            self.estimate.add(shape, items)
        for position, reason in zip(block.refused, block.reason, strict=True):
            key = reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else "other reasons"
            self.reasons[key] = self.reasons.get(key, 0) + 1
            self._examples.setdefault(key, f"{rows.file}, row {rows.row[position]}")

    def _refuse_outcome(self) -> None:
        """No valid row, or more rejections than allowed, is a mistake of the whole dataset."""
        config, counts = self.config.dataset, self.counts
        if not counts["rows"]:
            selected = f" where {config.where}" if config.where else ""
            raise PlanError(f"{config.path}: no rows{selected}; the dataset has {self.dataset.rows:,} in all")
        if not counts["items"] and not self.plans:
            raise PlanError(f"{config.path}: no valid row among {counts['rows']:,}:\n{self._listed()}")
        allowed = config.max_rejected
        if allowed is not None and counts["rejected"] > allowed:
            refused = f"{counts['rejected']:,} rejected; dataset.max_rejected allows {allowed:,}"
            raise PlanError(f"{config.path}: {refused}:\n{self._listed()}")

    def _listed(self) -> str:
        frequent = list(self.reasons.items())[:LISTED_REASONS]
        lines = [f"  {n:,} x {why} (first: {self._examples[why]})" for why, n in frequent]
        more = len(self.reasons) - LISTED_REASONS
        return "\n".join([*lines, *([f"  and {more} other reasons"] if more > 0 else [])])

    def _header(self, parts: tuple[Part, ...], rejected: tuple[Part, ...]) -> Plan:
        config, bound = self.config, self.model
        return Plan(
            k=self.k,
            vidgen_version=VERSION,
            family=bound.family,
            task=config.model.task,
            checkpoint=bound.checkpoint,
            checkpoint_hash=bound.checkpoint_hash,
            spec_revision=bound.spec.REVISION,
            spec_hash=self.shaper.spec_hash(),
            config=to_dict(config),
            resolved={
                "model": {"family": bound.family, "revision": bound.commit or None},
                "sampling": self.shaper.resolved(),
                "output": {"codec": bound.codec},
                "dataset": {
                    "digest": self.dataset.digest,
                    "files": len(self.dataset.files),
                    "rows": self.dataset.rows,
                },
            },
            parts=parts,
            rejected=rejected,
            counts=dict(self.counts),
            estimate=self.estimate.summary(),
            carried=tuple(self.carried.values()),
            created_at=time.time(),
        )

    # ---------------------------------------------------------------- checks before the first row

    def _same_checkpoint(self) -> None:
        if self.plans and self.plans[-1].checkpoint_hash != self.model.checkpoint_hash:
            raise ConfigError(
                f"model.checkpoint: {self.model.checkpoint} is not what the plan was made with: its hash is "
                f"{self.model.checkpoint_hash[:12]}, the plan has {self.plans[-1].checkpoint_hash[:12]}"
            )

    def _check_configured_texts(self) -> None:
        for shape in self.shaper.shapes(tuple(None for _ in self.shaper.fields), self.shaper.required):
            excess = self.planner.over_limit(shape.request.negative_prompt)
            if not excess:
                continue
            message = f"sampling.negative_prompt: {excess} tokens longer than the encoder takes"
            if self.config.dataset.on_long_prompt == "reject":
                raise ConfigError(f"{message} (dataset.on_long_prompt: reject)")
            self.notes.append(f"{message}; they are cut off")

    def _where(self) -> tuple[pc.Expression | None, list[str]]:
        text, schema = self.config.dataset.where, self.dataset.schema
        if text is None:
            return None, []
        try:
            return where.compile(text, schema), where.columns(text, schema)
        except where.WhereError as error:
            raise ConfigError(f"dataset.where: {error}") from error
