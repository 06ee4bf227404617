"""Rows to pack and where their videos lie: of one run here, of anything manifest-shaped by making a `Source` of it.

Refuses to know what they are packed into.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from vidgen import manifest
from vidgen.errors import PlanError, UserError
from vidgen.pack.licence import Checkpoint
from vidgen.plan.files import require_plan, total_items
from vidgen.store import commits
from vidgen.store import state as states
from vidgen.store.objects import Objects
from vidgen.types import Plan


@dataclass(frozen=True, slots=True)
class Source:
    """Manifest rows. `tables` gives them anew at each call, always the same and in the same order; the column `video`
    is a path below `objects`. `schema` is what all tables can be cast to, `name` what a card calls them, `checkpoints`
    what made them. `missing` is the advice for a video that is gone."""

    objects: Objects
    tables: Callable[[], Iterator[pa.Table]]
    schema: pa.Schema
    name: str
    checkpoints: tuple[Checkpoint, ...]
    missing: str

    def rows(self) -> Iterator[pa.Table]:
        """The tables, each of `schema`."""
        for table in self.tables():
            yield fitted(table, self.schema)


def of_run(output: str, *, partial: bool = False) -> Source:
    """The rows of a run's manifest. PlanError if there is no run, if it has not finished (`partial`: as far as it is),
    and while a part of the manifest is read whose bytes are not those that `_SUCCESS.json` names."""
    objects = Objects(output)
    plans = require_plan(objects)
    parts = _finished(objects, plans)
    if parts is None and not partial:
        raise PlanError(
            f"{output}: the run has not finished; `vidgen generate {output}` finishes it, --partial packs what is done"
        )
    if parts is None:
        state = states.load(objects, total_items(plans))
        tables: Callable[[], Iterator[pa.Table]] = lambda: manifest.rows(objects, plans, state)  # noqa: E731
    else:
        otherwise = (
            f"what _SUCCESS.json names (sha256 differs); `vidgen generate {objects.url}` writes the manifest again"
        )
        tables = lambda: manifest.read_parts(objects, parts, otherwise)  # noqa: E731
    return Source(
        objects,
        tables,
        unified(table.schema for table in tables()),
        str(plans[0].config.get("name") or "videos"),
        tuple({checkpoint_of(plan): None for plan in plans}),
        f"`vidgen retry {output} --missing` reopens what is gone or damaged, `vidgen generate {output}` makes it again",
    )


def checkpoint_of(plan: Plan) -> Checkpoint:
    """What a plan's videos are made with."""
    return Checkpoint(plan.checkpoint, (plan.resolved.get("model") or {}).get("revision"), plan.checkpoint_hash)


def _finished(objects: Objects, plans: Sequence[Plan]) -> dict[str, str] | None:
    """Name and sha256 of each manifest part; None if the run has not finished, or has gone on since."""
    try:
        body = json.loads(objects.read(manifest.SUCCESS))
        plan, generation, parts = body["plan"], body["generation"], dict(body["parts"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    same = plan == plans[-1].k and generation == max(commits.list_generations(objects), default=0)
    return parts if same else None


# ---------------------------------------------------------------- one schema


def unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for all: numbers widen, and what does not go together (a column that was text in one plan and a
    number in another), or holds nothing anywhere, becomes text."""
    kinds: dict[str, pa.DataType] = {}
    for schema in schemas:
        for found in schema:
            kinds[found.name] = _wider(kinds.get(found.name, pa.null()), found.type)
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in kinds.items()])


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    try:
        both = [pa.schema([("x", one)]), pa.schema([("x", other)])]
        return pa.unify_schemas(both, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return pa.string()


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table in `schema`; columns it does not have are null. UserError names a column that cannot be cast."""
    columns = []
    for found in schema:
        if found.name not in table.schema.names:
            columns.append(pa.nulls(table.num_rows, found.type))
            continue
        try:
            columns.append(table.column(found.name).cast(found.type))
        except pa.ArrowException as error:
            kind = table.schema.field(found.name).type
            raise UserError(f"column {found.name!r}: {kind} and {found.type} do not go together: {error}") from error
    return pa.table(columns, schema=schema)
