"""What `vidgen plan` says: rows, rejects with reasons, shapes, what they fit on, cost, and how the cost is known."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vidgen.errors import printable
from vidgen.memory import GIB
from vidgen.plan.build import PlanResult
from vidgen.report.wording import duration, seconds, size

MOST_REASONS = 20
FITS: Mapping[bool | None, str] = {True: "yes", False: "no", None: "its weights do"}


def as_json(result: PlanResult) -> dict[str, Any]:
    plan = asdict(result.plan)
    return {"made": result.made, "plan": plan, "reasons": dict(result.reasons), "notes": list(result.notes)}


def show(result: PlanResult, output: str, console: Console, forecast: Mapping[str, Any]) -> None:
    """The plan as a person reads it, with its forecast; the last lines are what to do next."""
    plan, counts, estimate = result.plan, result.plan.counts, result.plan.estimate
    state = "frozen now" if result.made else ("found frozen" if plan.parts else "dry run, nothing frozen")
    console.print(f"[bold]{escape(printable(plan.config['name']))}[/bold]  plan {plan.k}, {state}", highlight=False)
    console.print(
        f"  model     {plan.family} {plan.task}, checkpoint {escape(printable(plan.checkpoint or 'none'))}",
        highlight=False,
    )
    console.print(f"  rows      {counts['rows']:,} read, {counts['rejected']:,} rejected", highlight=False)
    console.print(f"  items     {counts['items']:,}", highlight=False)
    if counts.get("truncated_prompts"):
        tokens = f"{counts['truncated_tokens']:,} tokens cut"
        console.print(f"  prompts   {counts['truncated_prompts']:,} longer than the encoder takes, {tokens}")
    for reason, count in list(result.reasons.items())[:MOST_REASONS]:
        console.print(
            f"  rejected  {count:,} x {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )
    if len(result.reasons) > MOST_REASONS:
        console.print(f"  rejected  and {len(result.reasons) - MOST_REASONS} more reasons", style="yellow")
    for note in result.notes:
        console.print(f"  note      {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(_shapes(estimate))
    _gangs(estimate, console)
    _unfitting(estimate, console)
    forecasted(forecast, console)
    slow = duration(estimate["seconds_per_item_one_core"])
    console.print(f"  on a CPU  about {slow} an item and core, for the costliest", highlight=False)
    if plan.parts:
        console.print(f"next:\n  vidgen generate {shlex.quote(output)}", markup=False, highlight=False, soft_wrap=True)


def forecasted(forecast: Mapping[str, Any], console: Console) -> None:
    """What a run will cost, a line a shape and in all, and how that is known (`vidgen.plan.forecast`)."""
    price, measured = forecast["price_per_gpu_hour"], forecast["basis"] == "pilot"
    extra = ("price",) if price is not None else ()
    table = Table("shape", "items", "an item", "GPU-hours", "out", *extra, box=None, pad_edge=False, padding=(0, 2))
    for row in forecast["shapes"][:MOST_REASONS]:
        known = f" ({row['measured']} measured)" if row["measured"] else " (scaled)" if measured else ""
        cells = [row["shape"], f"{row['items']:,}", seconds(row["seconds_per_item"]) + known]
        cells += [f"{row['gpu_hours']:,.3g}", size(row["bytes"])]
        table.add_row(*cells, *([f"{row['gpu_hours'] * price:,.2f}"] if price is not None else []))
    console.print(table)
    if len(forecast["shapes"]) > MOST_REASONS:
        console.print(f"  and {len(forecast['shapes']) - MOST_REASONS} more shapes", highlight=False)
    cost = f", {forecast['price']:,.2f} at {price:g} a GPU-hour" if price is not None else ""
    console.print(f"  cost      {forecast['gpu_hours']:,.3g} GPU-hours{cost}", highlight=False)
    console.print(f"  known by  {forecast['says']}", markup=False, highlight=False, soft_wrap=True)
    for row in forecast["wall"]:
        gpus = f" of {row['gpus'] // row['replicas']} GPUs" if row["gpus"] > row["replicas"] else ""
        count = f"{row['replicas']:,} replica{'s' * (row['replicas'] > 1)}{gpus}"
        tail = f"{duration(row['tail_seconds'])} of it a tail"
        console.print(f"  wall      {duration(row['seconds'])} on {count} ({tail})", highlight=False)
    console.print(f"  out       about {size(forecast['bytes'])}", highlight=False)
    if measured:
        peak = forecast["memory_peak_bytes"]
        told = "not measured" if peak is None else f"at most {peak / GIB:.3g} GiB on a GPU"
        console.print(f"  memory    {told}", highlight=False)
        warm = duration(forecast["warm_up_seconds"])
        console.print(f"  warm-up   {warm} on top of a replica's first item; loading the model not included")


def _shapes(estimate: Mapping[str, Any]) -> Table:
    """A line a shape; where a GPU is named, also how it fits there and what it takes."""
    rows = estimate["shapes"][:MOST_REASONS]
    placed = [row for row in rows if "gpu" in row]
    extra: tuple[str, ...] = ()
    if placed:
        room = f"GiB of {placed[0]['usable_bytes'] / GIB:.3g}"
        extra = ("GPUs", room, f"fits {placed[0]['gpu']}", "denoising an item")
    table = Table("shape", "items", "tokens", "TFLOP an item", *extra, box=None, pad_edge=False, padding=(0, 2))
    for row in rows:
        cells = [row["shape"], f"{row['items']:,}", f"{row['tokens']:,}", f"{row['tflops_per_item']:,.3g}"]
        if "gpu" in row:
            need = f"{row['memory_bytes'] / GIB:.3g} to {row['stage']}"
            cells += [str(row["gpus"]), need, FITS[row["fits"]], duration(row["seconds_per_item"])]
        table.add_row(*cells)
    return table


def _gangs(estimate: Mapping[str, Any], console: Console) -> None:
    """How tokens are divided where gangs are asked for; with `parallel.degree: auto`, what each shape gets, and why."""
    for gang in estimate.get("gangs", []):  # absent from older plans
        where = f"above {gang['tokens_above']:,} tokens: " if gang["tokens_above"] >= 0 else ""
        console.print(f"  gang      {where}{gang['mesh']}", highlight=False)
    for row in [row for row in estimate["shapes"] if row.get("why")][:MOST_REASONS]:
        console.print(f"  degree    {row['shape']}: {row['why']}", markup=False, highlight=False, soft_wrap=True)


def _unfitting(estimate: Mapping[str, Any], console: Console) -> None:
    """For each shape that does not fit as things are: the degree at which it does, and what takes the most."""
    for row in estimate["shapes"]:
        if row.get("fits") is False:
            largest = ", ".join(f"{term['name']} {term['bytes'] / GIB:.3g} GiB" for term in row["terms"][:2])
            least = f"from parallel.context={row['smallest_context']}"
            console.print(
                f"  memory    {row['shape']} fits {row['gpu']} {least} ({largest})",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
