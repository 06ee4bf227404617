"""`vidgen why`: everything that is known about one item, from the output alone; nothing written, no cluster.

An item is asked for by its id, by the beginning of it as logs show it, or by its row. Refuses to know how a video is
made again (`vidgen.report.remake`).
"""

from __future__ import annotations

import difflib
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidgen import VERSION
from vidgen.errors import UserError, printable
from vidgen.plan.files import part_table, read_items, rejected_table, require_plan
from vidgen.store import commits
from vidgen.store.objects import Objects
from vidgen.types import Item, Part, Plan, Record

SHORTEST_PREFIX = 6
NEAREST_OF = 200_000
"""Row ids looked at for one that is like an unknown one."""
MOST_LISTED = 200


@dataclass(frozen=True, slots=True)
class Place:
    """A run to look in; `number` of one below a scheduled output."""

    objects: Objects
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several items that a question may mean."""

    item_id: str
    row_id: str
    sample: int
    status: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    params: str
    run: int | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that became no item, and why."""

    row_id: str
    file: str
    row: int
    reason: str
    prompt: str
    variant: str
    run: int | None


@dataclass(frozen=True, slots=True)
class Tried:
    """A failed attempt; `at` in seconds since the epoch."""

    generation: int
    error_class: str
    count: float
    error: str
    node: str
    at: float | None


@dataclass(frozen=True, slots=True)
class Turn:
    """The item in one generation that lists it: its commit, or pending."""

    generation: int
    record: Record | None


@dataclass(frozen=True, slots=True)
class Explained:
    """One item. `planned` is its row of the plan with the carried columns, `made_again` the command that makes it."""

    output: str
    run: int | None
    plan: Plan
    item: Item
    planned: dict[str, Any]
    turns: tuple[Turn, ...]
    attempts: tuple[Tried, ...]
    made_again: str
    notes: tuple[str, ...]

    @property
    def record(self) -> Record | None:
        """What counts: the commit of the last generation."""
        return self.turns[-1].record


@dataclass(slots=True)
class Answer:
    """`item` where the question means one; else `items` and `rejected` are all that it may mean."""

    item: Explained | None = None
    items: list[Candidate] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Hit:
    place: Place
    plan: Plan
    part: Part
    index: int


def ask(places: Sequence[Place], wanted: str) -> Answer:
    """Looks for an item id, the beginning of one (6 letters or more), or a row id, in the runs given, in their order.
    UserError naming what is nearest if nothing is so called."""
    hits: list[_Hit] = []
    rejected: list[Rejected] = []
    for place in places:
        plans = require_plan(place.objects)
        for plan in plans:
            for part in plan.parts:
                table = part_table(place.objects, part).select(["item_id", "row_id"])
                exact = pc.equal(table.column("item_id"), wanted)
                if pc.any(exact).as_py():
                    return Answer(explain(place, plan, part, pc.index(exact, True).as_py()))
                found = pc.indices_nonzero(_alike(table, wanted)).to_pylist()
                hits += [_Hit(place, plan, part, index) for index in found]
            for part in plan.rejected:
                refused = rejected_table(place.objects, part)
                chosen = refused.filter(pc.equal(refused.column("row_id"), wanted))
                rejected += [_rejected(row, place) for row in chosen.to_pylist()]
    if len(hits) == 1 and not rejected:
        hit = hits[0]
        return Answer(explain(hit.place, hit.plan, hit.part, hit.index))
    if not hits and not rejected:
        raise UserError(_unknown(places, wanted))
    return Answer(None, [_candidate(hit) for hit in hits[:MOST_LISTED]], rejected[:MOST_LISTED])


def explain(place: Place, plan: Plan, part: Part, index: int) -> Explained:
    """The item at `index` of a plan's part."""
    objects = place.objects
    item = next(item for item in read_items(objects, plan, part) if item.ordinal == part.first + index)
    (planned,) = part_table(objects, part).slice(index, 1).to_pylist()
    generations = [0, *_reopened(objects, item.item_id)]
    turns = tuple(Turn(number, commits.read_commit(objects, number, item.item_id)) for number in generations)
    attempts = sorted(_attempts(objects, item.item_id), key=lambda tried: (tried.generation, tried.at or 0.0))
    made_again = f"vidgen why {shlex.quote(objects.url)} {item.item_id} --make {item.item_id[:8]}{_ending(plan)}"
    notes = tuple(_notes(plan, turns[-1].record))
    return Explained(objects.url, place.number, plan, item, planned, turns, tuple(attempts), made_again, notes)


def _ending(plan: Plan) -> str:
    from vidgen.formats import FORMATS

    return FORMATS[plan.config["output"]["format"]].extension


def _alike(table: pa.Table, wanted: str) -> pa.ChunkedArray:
    rows = pc.equal(table.column("row_id"), wanted)
    if len(wanted) < SHORTEST_PREFIX or set(wanted) - set("0123456789abcdef"):
        return rows
    return pc.or_(rows, pc.starts_with(table.column("item_id"), wanted))


def _reopened(objects: Objects, item_id: str) -> list[int]:
    """Generations after 0 that list the item."""
    found = []
    for generation in commits.list_generations(objects):
        table = pq.read_table(io.BytesIO(objects.read(f"generations/{generation}.parquet")), columns=["item_id"])
        if pc.any(pc.equal(table.column("item_id"), item_id)).as_py():
            found.append(generation)
    return found


def _attempts(objects: Objects, item_id: str) -> Iterator[Tried]:
    for attempt in commits.read_attempts(objects, item_id):
        evidence = commits.read_evidence(objects, attempt)
        yield Tried(
            attempt.generation,
            attempt.error_class,
            attempt.count,
            str(evidence.get("error", "")),
            str(evidence.get("node", "")),
            evidence.get("at"),
        )


def _notes(plan: Plan, record: Record | None) -> Iterator[str]:
    """What may make another last bit of the video when it is made again, alone, here."""
    if record is None or record.status != "done":
        return
    if record.batch > 1:
        yield f"it was made in a batch of {record.batch}: alone its last bits may differ"
    if record.context > 1:
        yield f"it was made by a gang of {record.context} GPUs: on one its last bits may differ"
    if record.gpu:
        yield f"it was made on {record.gpu}: on another GPU its last bits may differ"
    elif not record.threads and plan.family != "testcard":
        yield "how many threads made it is not recorded: with another number its last bits may differ"
    if record.vidgen_version != VERSION:
        yield f"it was made by vidgen {record.vidgen_version}; this is {VERSION}"


def _candidate(hit: _Hit) -> Candidate:
    (row,) = part_table(hit.place.objects, hit.part).slice(hit.index, 1).to_pylist()
    generation = ([0, *_reopened(hit.place.objects, row["item_id"])])[-1]
    record = commits.read_commit(hit.place.objects, generation, row["item_id"])
    status = record.status if record is not None else "pending"
    names = ("item_id", "row_id", "sample", "seed", "num_inference_steps", "guidance_scale", "params")
    return Candidate(**{name: row[name] for name in names}, status=status, run=hit.place.number)


def _rejected(row: dict[str, Any], place: Place) -> Rejected:
    return Rejected(
        row_id=row["row_id"] or "",
        file=row["origin_file"] or "",
        row=row["origin_row"],
        reason=row["reason"],
        prompt=row["prompt"] or "",
        variant=row.get("variant") or "",
        run=place.number,
    )


def _unknown(places: Sequence[Place], wanted: str) -> str:
    """The message for a name that nothing has, with those that are like it."""
    known: dict[str, None] = {}
    for place in places:
        for plan in require_plan(place.objects):
            for part in (*plan.parts, *plan.rejected):
                if len(known) < NEAREST_OF:
                    column = part_table(place.objects, part).column("row_id").drop_null()
                    known.update(dict.fromkeys(column.to_pylist()))
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    like = f"; near it: {printable(', '.join(near))}" if near else ""
    where = places[0].objects.url if len(places) == 1 else f"any of the {len(places)} runs there"
    return f"{wanted!r} is no item id and no row id of {where}{like}"
