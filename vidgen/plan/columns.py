"""What the input columns are for: mapped to request fields, the id, or carried along to the manifest.

Everything here is checked before the first row is read. Refuses to know cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.types as pt

from vidgen import prompts
from vidgen.config import JobConfig
from vidgen.config_rules import COLUMN_FIELDS, MEDIA_FIELDS, nearest
from vidgen.errors import ConfigError, PlanError
from vidgen.plan import cells
from vidgen.plan.files import ITEM_SCHEMA, REJECTED_SCHEMA
from vidgen.prompts import Dataset
from vidgen.types import MANIFEST_COLUMNS


def refuse_media(config: JobConfig, family: str) -> None:
    """No task of this version takes images or videos; a mapping of one is a ConfigError."""
    for name in MEDIA_FIELDS:
        if (column := config.dataset.columns.get(name)) is not None:
            raise ConfigError(
                f"dataset.columns.{name}: {column!r} is mapped, but task {config.model.task} of {family} takes no "
                f"{name}; remove the mapping"
            )


def mapped(config: JobConfig) -> list[str]:
    """Input columns that have a meaning: the mapped ones and the id."""
    id_column = config.dataset.id_column
    return [*config.dataset.columns.values(), *([id_column] if id_column else [])]


def check(config: JobConfig, dataset: Dataset, types: Mapping[str, type]) -> None:
    """Every mapped column is in every file, in a type its field takes; PlanError names file, column and rule."""
    for name, column in config.dataset.columns.items():
        fits, words = cells.fits(types[name])
        prompts.require(dataset, column, f"dataset.columns.{name}", words, fits)
    if (column := config.dataset.id_column) is not None:
        prompts.require(dataset, column, "dataset.id_column", "text, whole numbers", cells.fits_id)


def carried(config: JobConfig, dataset: Dataset) -> dict[str, str]:
    """Input columns that go into the manifest, and their names there: those of `dataset.carry`, else all that are
    neither mapped nor binary. A name that the plan or the manifest uses itself gets `input_` before it."""
    schema, wanted = dataset.schema, config.dataset.carry
    for name in wanted or []:
        if name not in schema.names:
            raise PlanError(f"{dataset.path}: no column {name!r} (dataset.carry){nearest(name, schema.names)}")
        if _holds_binary(schema.field(name).type):
            raise PlanError(f"{dataset.path}: column {name!r} (dataset.carry) is binary, which is not carried")
    if wanted is None:
        meant = mapped(config)
        wanted = [f.name for f in schema if f.name not in meant and not _holds_binary(f.type)]
    taken = {*MANIFEST_COLUMNS, *ITEM_SCHEMA.names, *REJECTED_SCHEMA.names}
    names: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        shown = name
        while shown in taken or (shown != name and shown in wanted):
            shown = f"input_{shown}"
        taken.add(shown)
        names[name] = shown
    return names


def unmapped(config: JobConfig, names: Mapping[str, str]) -> list[str]:
    """Remarks on carried columns that are called like a request field."""
    return [
        f"column {name!r} is carried along, not used; dataset.columns.{name}={name} would use it"
        for name in names
        if name in COLUMN_FIELDS and name not in config.dataset.columns
    ]


def _holds_binary(kind: pa.DataType) -> bool:
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind) or pt.is_binary_view(kind):
        return True
    return any(_holds_binary(kind.field(i).type) for i in range(kind.num_fields))
