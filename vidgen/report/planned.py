"""What `vidgen plan` says: rows, rejects with reasons, shapes, cost, and how the cost is known."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from vidgen.plan.build import PlanResult
from vidgen.report.wording import duration, size

MOST_REASONS = 20


def as_json(result: PlanResult) -> dict[str, Any]:
    plan = asdict(result.plan)
    return {"made": result.made, "plan": plan, "reasons": dict(result.reasons), "notes": list(result.notes)}


def show(result: PlanResult, output: str, console: Console) -> None:
    """The plan as a person reads it; the last lines are what to do next."""
    plan, counts, estimate = result.plan, result.plan.counts, result.plan.estimate
    state = "frozen now" if result.made else ("found frozen" if plan.parts else "dry run, nothing frozen")
    console.print(f"[bold]{plan.config['name']}[/bold]  plan {plan.k}, {state}", highlight=False)
    console.print(f"  model     {plan.family} {plan.task}, checkpoint {plan.checkpoint or 'none'}", highlight=False)
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
    table = Table("shape", "items", "tokens", "TFLOP an item", box=None, pad_edge=False, padding=(0, 2))
    for row in estimate["shapes"][:MOST_REASONS]:
        table.add_row(row["shape"], f"{row['items']:,}", f"{row['tokens']:,}", f"{row['tflops_per_item']:,.3g}")
    console.print(table)
    price = f", {estimate['price']:,.2f} at {estimate['price_per_gpu_hour']:g} a GPU-hour" if estimate["price"] else ""
    speed = f"counted FLOPs at an assumed {estimate['assumed_gpu_tflops']:g} TFLOP/s"
    console.print(f"  cost      {estimate['gpu_hours']:,.3g} GPU-hours ({speed}){price}", highlight=False)
    slow = duration(estimate["seconds_per_item_one_core"])
    console.print(f"  on a CPU  about {slow} an item and core, for the costliest", highlight=False)
    console.print(f"  out       about {size(estimate['bytes'])}", highlight=False)
    if plan.parts:
        console.print(f"next:\n  vidgen generate {output}", markup=False, highlight=False, soft_wrap=True)
