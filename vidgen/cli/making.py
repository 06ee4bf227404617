"""Commands that make videos: generate, plan, stop."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from vidgen import faults
from vidgen.cli.command import SOME_FAILED, Commands, codes, print_json
from vidgen.errors import UserError

REPORT_ITEMS = 1_000
"""`generate` makes the report of a run up to this size by itself."""


def add(commands: Commands) -> None:
    """Adds them to the parser."""
    generate = commands.job(
        "generate",
        _generate,
        "plan if there is no plan, then run or resume until every item is terminal",
        "a YAML configuration, or the OUTPUT of a run to resume",
    )
    generate.add_argument("--address", help="Ray cluster to join (else RAY_ADDRESS, else a local one)")
    generate.add_argument("--takeover", action="store_true", help="supersede a driver that seems alive")
    generate.add_argument("--no-report", action="store_true", help="do not make the HTML report at the end")
    generate.add_argument("--log", choices=("text", "json"), default="text", help="json: the log as JSON lines")
    generate.add_argument("--ok-exit", type=codes, default=(), help="exit codes to map to 0, for example 3,5,75")

    plan = commands.job(
        "plan", _plan, "validate everything without GPU, torch or Ray, and freeze the plan", "a YAML configuration"
    )
    plan.add_argument("--dry-run", action="store_true", help="freeze nothing")
    plan.add_argument("--extend", action="store_true", help="add what the frozen plan does not have yet")
    plan.add_argument("--takeover", action="store_true", help="with --extend: supersede a driver that seems alive")

    pilot = commands.job(
        "pilot",
        _pilot,
        "make a stratified sample of the job to learn what the rest will cost; its videos count as done",
        "a YAML configuration, or the OUTPUT of a run",
    )
    pilot.add_argument("--items", type=int, default=20, help="of the sample (default 20)")
    pilot.add_argument("--address", help="Ray cluster to join (else RAY_ADDRESS, else a local one)")
    pilot.add_argument("--takeover", action="store_true", help="supersede a driver that seems alive")
    pilot.add_argument("--ok-exit", type=codes, default=(), help="exit codes to map to 0, for example 3,5,75")

    commands.of_output("stop", _stop, "ask the running driver to stop gracefully", schedule=True)


def _generate(options: argparse.Namespace) -> int:
    from vidgen.fleet import run as fleet

    opened, outcome = fleet.generate(
        options.config,
        options.overrides,
        fleet.Options(
            address=options.address, takeover=options.takeover, quiet=options.json, json_log=options.log == "json"
        ),
    )
    output = opened.objects.url
    finished = outcome.code in (0, SOME_FAILED)
    page = ""
    if finished and not options.no_report and opened.items <= REPORT_ITEMS:
        from vidgen.report import gallery

        page = gallery.report(output)
    if options.json:
        print_json({**asdict(outcome), "exit": outcome.code, "output": output, "report": page})
    else:
        _summary(output, outcome, page, opened.plans)
    return outcome.code


def _summary(output: str, outcome: Any, page: str, plans: Sequence[Any]) -> None:
    from vidgen.plan.files import total_rejected
    from vidgen.report.wording import duration

    console, counts = Console(), outcome.counts
    rejected = total_rejected(plans)
    style = {0: "bold green", SOME_FAILED: "bold yellow"}.get(outcome.code, "bold red")
    console.print(outcome.reason, style=style, markup=False, highlight=False, soft_wrap=True)
    parts = [f"{number} {name}" for name, number in {**counts, "rejected": rejected}.items() if number]
    console.print(f"  {', '.join(parts)} in {duration(outcome.elapsed)}, exit {outcome.code}", highlight=False)
    console.print(f"  output  {output}", markup=False, highlight=False, soft_wrap=True)
    if page:
        console.print(f"  report  {page}", markup=False, highlight=False, soft_wrap=True)
    place = shlex.quote(output)
    following = [f"vidgen verify {place}"]
    if outcome.code in (0, SOME_FAILED) and not page:
        following.append(f"vidgen report {place}")
    if outcome.code == SOME_FAILED:
        following += [f"vidgen status {place}", f"vidgen retry {place}"]
    if counts["pending"]:
        following = [f"vidgen status {place}", f"vidgen generate {place}"]
    console.print("next:", style="dim")
    for command in following:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _plan(options: argparse.Namespace) -> int:
    from vidgen import config as configuration
    from vidgen.fleet.opening import open_store
    from vidgen.plan import build as planning
    from vidgen.plan import forecast
    from vidgen.report import planned, repair
    from vidgen.store.objects import new_token

    config = configuration.load(options.config, options.overrides)
    objects = open_store(config)
    if not options.dry_run:
        with faults.around("probe"):
            objects.probe(new_token())

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr)

    if options.extend and not options.dry_run:
        result = repair.extend(config, objects, takeover=options.takeover, say=say)
    else:
        result = planning.build(config, objects, dry_run=options.dry_run, extend=options.extend, say=say)
    found = forecast.forecast(result.plans, config, forecast.calibration(objects))
    if options.json:
        print_json({**planned.as_json(result), "forecast": found})
    else:
        planned.show(result, config.output.path, Console(), found)
    return 0


def _pilot(options: argparse.Namespace) -> int:
    from vidgen.fleet import pilot
    from vidgen.fleet import run as fleet
    from vidgen.report import planned

    if options.items < 1:
        raise UserError(f"--items: {options.items}; allowed: 1 or more")
    given = fleet.Options(address=options.address, takeover=options.takeover, quiet=options.json)
    run, outcome, found = pilot.pilot(options.config, options.overrides, given, options.items)
    output = run.objects.url
    if options.json:
        print_json({**asdict(outcome), "exit": outcome.code, "output": output, "estimate": found})
        return outcome.code
    console = Console()
    console.print(f"{outcome.reason}, exit {outcome.code}", markup=False, highlight=False, soft_wrap=True)
    if found:
        planned.forecasted(found, console)
    rest = outcome.counts["pending"]
    verb = "generate" if rest else "verify"
    print(f"next{f' ({rest:,} items are left)' if rest else ''}:\n  vidgen {verb} {output}")
    return outcome.code


def _stop(options: argparse.Namespace) -> int:
    from vidgen.store import epochs
    from vidgen.store.objects import Objects

    epoch = epochs.request_stop(Objects(options.output))
    text = f"asked the driver of epoch {epoch} to stop; it looks every {epochs.BEAT_SECONDS:g} s"
    print_json({"epoch": epoch}) if options.json else print(text)
    return 0
