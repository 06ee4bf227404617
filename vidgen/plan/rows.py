"""Rows to items: ids, seeds, hashes and rejections of a batch, and the tables they are stored in.

One row gives an item for each variant and sample, or one rejection for each variant. Refuses to know files and stores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from vidgen import identity, tokens
from vidgen.config import JobConfig
from vidgen.errors import printable
from vidgen.plan import cells
from vidgen.plan.cells import Cells
from vidgen.plan.files import ITEM_SCHEMA, MEDIA_TYPE, REJECTED_SCHEMA
from vidgen.plan.media import NO_MEDIA, RowMedia
from vidgen.plan.model import Model
from vidgen.plan.shapes import Shape, Shaper, variant_text
from vidgen.prompts import Rows
from vidgen.types import MEDIA_FIELDS

MOST_SEED = 2**48 - 1
MOST_PRIORITY = 2**31 - 1
MOST_REASON = 4_000
"""Letters of a reason: it may quote a cell, which may be a book."""
MOST_TEXTS = 10_000
"""Negative prompts whose token counts are remembered."""


@dataclass(slots=True)
class Block:
    """What a batch of rows became: an entry an item in the second group of lists, an entry a rejection in the third.
    `position` is the row's place in the batch, and in `media`."""

    media: list[RowMedia]

    position: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    shape: list[Shape] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)
    row_id: list[str] = field(default_factory=list)
    item_id: list[str] = field(default_factory=list)
    request_hash: list[str] = field(default_factory=list)
    prompt: list[str] = field(default_factory=list)
    negative_prompt: list[str] = field(default_factory=list)
    priority: list[int] = field(default_factory=list)

    refused: list[int] = field(default_factory=list)
    refused_id: list[str | None] = field(default_factory=list)
    refused_prompt: list[str | None] = field(default_factory=list)
    variant: list[str | None] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)

    truncated: int = 0
    truncated_tokens: int = 0


class RowPlanner:
    """Plans batches of rows under one configuration."""

    def __init__(self, config: JobConfig, model: Model, shaper: Shaper) -> None:
        self.config, self.shaper = config, shaper
        self.columns: dict[str, str] = config.dataset.columns
        self.types = {name: self._type(name) for name in self.columns if name not in MEDIA_FIELDS}
        self.media_columns = {name: column for name, column in self.columns.items() if name in MEDIA_FIELDS}
        self.labels = {name: f"{name} (column {column!r})" for name, column in self.columns.items()}
        self.generation_fields = tuple(name for name in self.columns if name != "priority")
        self.sweeps_negative = "negative_prompt" in config.sweep.over
        self._limit = model.text_limit()
        self._over: dict[str, int] = {}

    def cells(self, data: pa.RecordBatch) -> Cells:
        """The mapped columns as Python values."""
        faults: cells.Faults = {}
        values = {
            name: cells.values(data.column(self.columns[name]), kind, self.labels[name], faults)
            for name, kind in self.types.items()
        }
        media = {
            name: cells.media(data.column(column), self.labels[name], faults)
            for name, column in self.media_columns.items()
        }
        return Cells(values, faults, media)

    def keys(self, found: Cells) -> list[bytes]:
        """What equal rows share (`identity.row_key`): a digest of the generation fields of each row."""
        names = self.generation_fields
        keys = {name: [cell and cell.key for cell in column] for name, column in found.media.items()}
        return [
            identity.row_key(dict(zip(names, row, strict=True)))
            for row in zip(*(found.values[n] if n in found.values else keys[n] for n in names), strict=True)
        ]

    def content_ids(self, rows: Rows, found: Cells, occurrences: np.ndarray | None) -> list[str | None]:
        """Ids of rows without an id column; `occurrences` by row of the dataset, or None where no two are equal."""
        counts = [0] * len(rows.index) if occurrences is None else occurrences[rows.index].tolist()
        return [identity.row_id_of(key, n) for key, n in zip(self.keys(found), counts, strict=True)]

    def plan(self, found: Cells, ids: list[str | None], media: list[RowMedia]) -> Block:
        """Items and rejections of a batch whose rows have these cells, ids (None: rejected for its faults), media."""
        block = Block(media=media)
        self._check_texts(found, block)
        prompts, faults = found.values["prompt"], found.faults
        empty = [None] * len(prompts)
        negatives = empty if self.sweeps_negative else found.values.get("negative_prompt", empty)
        seeds, priorities = found.values.get("seed", empty), found.values.get("priority", empty)
        shaper, columns = self.shaper, [found.values[name] for name in self.shaper.fields]
        shape_cells = zip(*columns, strict=True) if columns else iter([()] * len(prompts))
        for position, own_cells in enumerate(shape_cells):
            row_id, reasons, own_media = ids[position], faults.get(position), media[position]
            for variant, shape in enumerate(shaper.shapes(own_cells, own_media.given)):
                misfits = own_media.misfits(shape.request, self.labels) if own_media.seen else ()
                if reasons or shape.reasons or misfits or row_id is None:
                    why = [*(reasons or ()), *shape.reasons, *misfits]
                    self._refuse(block, position, variant, row_id, prompts[position], why)
                    continue
                negative = negatives[position]
                if negative is None:
                    negative = shape.request.negative_prompt
                self._accept(block, position, shape, row_id, prompts[position], negative, seeds[position])
        block.prompt = [prompts[position] for position in block.position]
        block.priority = [priorities[position] or 0 for position in block.position]
        return block

    def _accept(
        self,
        block: Block,
        position: int,
        shape: Shape,
        row_id: str,
        prompt: str,
        negative: str,
        row_seed: int | None,
    ) -> None:
        run_seed, media = self.config.sampling.seed or 0, block.media[position].digest
        for sample in range(self.config.dataset.samples_per_row):
            seed = identity.sample_seed(run_seed, row_id, row_seed, sample)
            request_hash = identity.request_hash_of(shape.digest, seed, prompt, negative, media)
            block.position.append(position)
            block.sample.append(sample)
            block.shape.append(shape)
            block.seed.append(seed)
            block.row_id.append(row_id)
            block.item_id.append(identity.item_id(row_id, sample, request_hash, shape.spec_hash))
            block.request_hash.append(request_hash)
            block.negative_prompt.append(negative)

    def _refuse(
        self, block: Block, position: int, variant: int, row_id: str | None, prompt: str | None, reasons: list[str]
    ) -> None:
        block.refused.append(position)
        block.refused_id.append(row_id)
        block.refused_prompt.append(prompt)
        block.variant.append(variant_text(self.shaper.variants, variant))
        reason = printable("; ".join(reasons))
        block.reason.append(reason if len(reason) <= MOST_REASON else f"{reason[:MOST_REASON]}...")

    def _check_texts(self, found: Cells, block: Block) -> None:
        """Empty prompts, seeds and priorities out of range, texts longer than the encoder takes."""
        faults, label = found.faults, self.labels["prompt"]
        long = []
        for position, prompt in enumerate(found.values["prompt"]):
            if prompt is None:
                if position not in faults:
                    faults[position] = [f"{label} is null"]
            elif not prompt or prompt.isspace():
                faults.setdefault(position, []).append(f"{label} is empty")
            elif self._limit is not None and tokens.at_most(prompt) > self._limit[1]:
                long.append(position)
        for name, least, most in (("seed", 0, MOST_SEED), ("priority", -MOST_PRIORITY, MOST_PRIORITY)):
            for position, value in enumerate(found.values.get(name, ())):
                if value is not None and not least <= value <= most:
                    reason = f"{self.labels[name]} is {value}; allowed: {least} to {most}"
                    faults.setdefault(position, []).append(reason)
        if self._limit is None:
            return
        count, limit = self._limit
        over = {
            position: length - limit
            for position, length in zip(long, count([found.values["prompt"][p] for p in long]), strict=True)
            if length > limit
        }
        self._too_long(found, block, "prompt", over)
        negatives = found.values.get("negative_prompt", ())
        self._too_long(
            found, block, "negative_prompt", {p: n for p, text in enumerate(negatives) if (n := self.over_limit(text))}
        )

    def over_limit(self, text: str | None) -> int:
        """Tokens of a text beyond the encoder's limit; 0 if it fits."""
        if text is None or self._limit is None or tokens.at_most(text) <= self._limit[1]:
            return 0
        if text not in self._over:
            if len(self._over) >= MOST_TEXTS:
                self._over.clear()
            count, limit = self._limit
            self._over[text] = max(0, count([text])[0] - limit)
        return self._over[text]

    def _too_long(self, found: Cells, block: Block, name: str, over: Mapping[int, int]) -> None:
        """Rejects or counts texts by how many tokens each is over the limit."""
        for position, excess in over.items():
            if self.config.dataset.on_long_prompt == "reject":
                assert self._limit is not None
                limit = self._limit[1]
                found.faults.setdefault(position, []).append(
                    f"{self.labels[name]} has {limit + excess} tokens; allowed: at most {limit} "
                    "(dataset.on_long_prompt: reject)"
                )
            elif position not in found.faults:
                block.truncated += 1
                block.truncated_tokens += excess

    def _type(self, name: str) -> type:
        if name in ("prompt", "negative_prompt"):
            return str
        return int if name in ("seed", "priority") else self.shaper.type_of(name)


# ---------------------------------------------------------------- tables


def item_table(block: Block, rows: Rows, first: int, carried: Mapping[str, str]) -> pa.Table:
    """The items of a block in ITEM_SCHEMA, then the carried columns (input name -> name in the manifest); ordinals
    count from `first`."""
    count = len(block.position)
    position = np.asarray(block.position, dtype=np.int64)
    columns: dict[str, Any] = {
        "ordinal": np.arange(first, first + count, dtype=np.int64),
        "origin_file": pa.repeat(pa.scalar(rows.file), count),
        "origin_row": rows.row[position],
        **_shape_columns(block.shape),
    }
    for name in ITEM_SCHEMA.names:
        if name in MEDIA_FIELDS:
            columns[name] = _media_column(name, block)
        elif name not in columns:
            columns[name] = getattr(block, name)
    arrays = [_array(columns[f.name], f.type) for f in ITEM_SCHEMA]
    arrays += [rows.data.column(name).take(pa.array(position)) for name in carried]
    return pa.Table.from_arrays(arrays, schema=with_carried(ITEM_SCHEMA, rows.data.schema, carried))


def rejection_table(block: Block, rows: Rows, carried: Mapping[str, str]) -> pa.Table:
    """The rejections of a block in REJECTED_SCHEMA, then the carried columns."""
    position = np.asarray(block.refused, dtype=np.int64)
    columns: dict[str, Any] = {
        "origin_file": pa.repeat(pa.scalar(rows.file), len(position)),
        "origin_row": rows.row[position],
        "row_id": block.refused_id,
        "variant": block.variant,
        "reason": block.reason,
        "prompt": block.refused_prompt,
    }
    arrays = [_array(columns[f.name], f.type) for f in REJECTED_SCHEMA]
    arrays += [rows.data.column(name).take(pa.array(position)) for name in carried]
    return pa.Table.from_arrays(arrays, schema=with_carried(REJECTED_SCHEMA, rows.data.schema, carried))


def with_carried(schema: pa.Schema, source: pa.Schema, carried: Mapping[str, str]) -> pa.Schema:
    """`schema` and the carried columns, in the types they have in the dataset."""
    return pa.schema([*schema, *(pa.field(name, source.field(column).type) for column, name in carried.items())])


def _media_column(name: str, block: Block) -> pa.Array:
    """The media of a field, an entry an item."""
    if not block.media or block.media[0] is NO_MEDIA:
        return pa.nulls(len(block.position), MEDIA_TYPE)
    media = [None if (m := own.media(name)) is None else {"url": m.url, "digest": m.digest} for own in block.media]
    return pa.array(media, MEDIA_TYPE).take(pa.array(block.position, pa.int64()))


def _shape_columns(shapes: list[Shape]) -> dict[str, pa.Array]:
    """Columns that are equal within a shape, built once a shape and spread over the items."""
    places: dict[int, int] = {}
    distinct: list[Shape] = []
    for shape in shapes:
        if id(shape) not in places:
            places[id(shape)] = len(distinct)
            distinct.append(shape)
    index = pa.array([places[id(shape)] for shape in shapes], pa.int32())
    values = [_shape_values(shape) for shape in distinct]
    return {
        f.name: pa.array([value[f.name] for value in values], f.type).take(index)
        for f in ITEM_SCHEMA
        if not values or f.name in values[0]
    }


def _shape_values(shape: Shape) -> dict[str, Any]:
    request = shape.request
    plain = (
        "height",
        "width",
        "num_frames",
        "fps",
        "num_inference_steps",
        "guidance_scale",
        "sampler",
        "shift",
        "resize",
    )
    lists = ("sigmas", "timesteps", "tiling")
    return {
        **{name: getattr(request, name) for name in plain},
        **{name: None if (v := getattr(request, name)) is None else json.dumps(v) for name in lists},
        "params": json.dumps(dict(request.params), sort_keys=True),
        "spec_hash": shape.spec_hash,
        "batch_key": shape.batch_key,
        "tokens": shape.tokens,
        "flops": shape.flops,
    }


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)
