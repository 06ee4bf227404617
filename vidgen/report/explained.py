"""How an answer of `vidgen why` is written: for a person, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vidgen.errors import printable
from vidgen.report.summary import STAGES
from vidgen.report.why import Answer, Explained
from vidgen.report.wording import size
from vidgen.types import MEDIA_FIELDS, Record

_REQUEST = (
    *("task", "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "sampler", "shift"),
    *("sigmas", "timesteps", "tiling", "params", "resize"),
)


def as_json(answer: Answer) -> dict[str, Any]:
    """{"item": ...} of one, else {"items": [...], "rejected": [...]}."""
    found = answer.item
    if found is None:
        return {"items": [asdict(row) for row in answer.items], "rejected": [asdict(row) for row in answer.rejected]}
    record = found.record
    return {
        "item": {
            "output": found.output,
            "run": found.run,
            "item_id": found.item.item_id,
            "status": record.status if record is not None else "pending",
            "plan": found.plan.k,
            "model": _model(found),
            "planned": found.planned,
            "generations": [
                {"generation": turn.generation, "commit": turn.record.to_dict() if turn.record else None}
                for turn in found.turns
            ],
            "attempts": [asdict(tried) for tried in found.attempts],
            "make": found.made_again,
            "notes": list(found.notes),
        }
    }


def show(answer: Answer, console: Console) -> None:
    """The answer as a person reads it."""
    if answer.item is not None:
        _show_item(answer.item, console)
        return
    if answer.items:
        table = Table("item", "row", "sample", "status", "seed", "steps", "guidance", "params", box=None)
        runs = any(row.run is not None for row in answer.items)
        if runs:
            table.add_column("run")
        for row in answer.items:
            cells = [row.item_id, row.row_id, row.sample, row.status, row.seed, row.num_inference_steps]
            cells += [f"{row.guidance_scale:g}", row.params, *([row.run] if runs else [])]
            table.add_row(*(Text(printable(str(cell))) for cell in cells))
        console.print(table)
    for refused in answer.rejected:
        where = f"run {refused.run}: " if refused.run is not None else ""
        _say(console, f"{where}row {refused.row_id or '(without id)'} was rejected: {refused.reason}")
        _say(console, f"  it stands in {refused.file}, row {refused.row}")
        if refused.variant:
            _say(console, f"  variant  {refused.variant}")
        _say(console, f"  prompt   {refused.prompt}")


def _show_item(found: Explained, console: Console) -> None:
    item, request, record = found.item, found.item.request, found.record
    status = record.status if record is not None else "pending"
    style = {"done": "green", "pending": "yellow"}.get(status, "red")
    console.print(f"[bold]{item.item_id}[/bold]  [{style}]{status}[/{style}]", highlight=False)
    where = f"run {found.run} of the schedule, " if found.run is not None else ""
    _say(console, f"  row        {item.row_id}, sample {item.sample} ({item.origin_file}, row {item.origin_row})")
    _say(console, f"  planned    {where}plan {found.plan.k}, item {item.ordinal}, priority {item.priority}")
    _say(console, f"  model      {', '.join(f'{name} {value}' for name, value in _model(found).items() if value)}")
    _say(console, f"  prompt     {request.prompt}")
    if request.negative_prompt:
        _say(console, f"  negative   {request.negative_prompt}")
    for name in MEDIA_FIELDS:
        medium = getattr(request, name)
        if medium is not None:
            _say(console, f"  {name:<10} {medium.url} ({medium.digest[:12]})")
    values = {name: getattr(request, name) for name in _REQUEST} | {"params": dict(request.params)}
    given = [f"{name} {value}" for name, value in values.items() if value not in (None, {})]
    _say(console, f"  request    seed {request.seed}, {', '.join(given)}")
    for turn in found.turns:
        _show_turn(turn.generation, turn.record, console)
    for tried in found.attempts:
        weight = f"counts {tried.count:g}" if tried.count else "withheld"
        node = f" on node {tried.node[:12]}" if tried.node else ""
        when = f"{_time(tried.at)} " if tried.at else ""
        _say(
            console,
            f"  attempt    {when}generation {tried.generation}, {tried.error_class} ({weight}){node}: {tried.error}",
        )
    _say(console, "make it again:")
    _say(console, f"  {found.made_again}")
    for note in found.notes:
        _say(console, f"  note: {note}")


def _show_turn(generation: int, record: Record | None, console: Console) -> None:
    if record is None:
        _say(console, f"  generation {generation}: pending")
        return
    text = f"{record.status} at {_time(record.created_at)}, attempt {record.attempt}"
    _say(console, f"  generation {generation}: {text}")
    if record.status != "done":
        _say(console, f"    {record.error_class}: {record.error}")
        return
    _say(console, f"    video    {record.video} ({size(record.bytes)}, {record.frames} frames)")
    _say(console, f"    sha256   {record.sha256}")
    seconds = ", ".join(f"{stage} {getattr(record, f'{stage}_s'):.3g}" for stage in STAGES)
    _say(console, f"    seconds  {seconds}; begun {_time(record.started_at)}")
    threads = f", {record.threads} threads" if record.threads else ""
    _say(console, f"    made by  {record.replica} on {record.node}, {record.gpu or 'CPU'}{threads}, {record.dtype}")
    _say(console, f"    with     batch {record.batch}, context {record.context}, vidgen {record.vidgen_version}")


def _model(found: Explained) -> dict[str, Any]:
    plan = found.plan
    return {
        "family": plan.family,
        "checkpoint": plan.checkpoint,
        "revision": plan.resolved["model"]["revision"],
        "checkpoint_hash": plan.checkpoint_hash,
        "dtype": plan.config["model"]["dtype"],
        "loras": plan.config["model"]["loras"],
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _say(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
