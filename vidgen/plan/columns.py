"""What the input columns are for: mapped to request fields, the id, or carried along to the manifest.

Everything here is checked before the first row is read. Refuses to know cells.
"""

from __future__ import annotations

from collections.abc import Mapping

from vidgen import prompts
from vidgen.config import JobConfig
from vidgen.config_rules import COLUMN_FIELDS, nearest
from vidgen.errors import ConfigError, PlanError
from vidgen.plan import cells
from vidgen.plan.files import ITEM_SCHEMA, REJECTED_SCHEMA
from vidgen.prompts import Dataset
from vidgen.types import MANIFEST_COLUMNS, MEDIA_FIELDS


def check_media(config: JobConfig, family: str, takes: Mapping[str, bool]) -> None:
    """A medium that the task cannot do without must be mapped, and one that it does not take must not; `takes` maps
    media fields to whether they are required. ConfigError names field, column and task."""
    task, columns = config.model.task, config.dataset.columns
    for name in MEDIA_FIELDS:
        if (column := columns.get(name)) is not None and name not in takes:
            raise ConfigError(
                f"dataset.columns.{name}: {column!r} is mapped, but task {task} of {family} takes no {name}; "
                f"remove the mapping"
            )
        if column is None and takes.get(name, False):
            raise ConfigError(f"dataset.columns: task {task} of {family} needs {name}; map the column that holds it")


def mapped(config: JobConfig) -> list[str]:
    """Input columns that have a meaning: the mapped ones and the id."""
    id_column = config.dataset.id_column
    return [*config.dataset.columns.values(), *([id_column] if id_column else [])]


def check(config: JobConfig, dataset: Dataset, types: Mapping[str, type]) -> None:
    """Every mapped column is in every file, in a type its field takes; PlanError names file, column and rule."""
    for name, column in config.dataset.columns.items():
        fits, words = (cells.fits_media, cells.MEDIA_WORDS) if name in MEDIA_FIELDS else cells.fits(types[name])
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
        if prompts.holds_binary(schema.field(name).type):
            raise PlanError(f"{dataset.path}: column {name!r} (dataset.carry) is binary, which is not carried")
    if wanted is None:
        meant = mapped(config)
        wanted = [f.name for f in schema if f.name not in meant and not prompts.holds_binary(f.type)]
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
