"""Commands that look at a run and change nothing in it: status, verify, report."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console

from vidgen.cli.command import FAILED, Commands, print_json, share


def add(commands: Commands) -> None:
    """Adds them to the parser."""
    commands.of_output("status", _status, "done, failed, pending, rate, time left, failures by signature")
    verify = commands.of_output(
        "verify", _verify, "prove the output: manifest == plan, each video there and whole, no duplicate"
    )
    verify.add_argument("--fast", action="store_true", help="listing and sizes only")
    verify.add_argument("--sample", type=share, default=1.0, help="share of the videos to read and decode")
    verify.add_argument("--strict", action="store_true", help="orphans are an error")
    commands.of_output("report", _report, "static HTML gallery of a run")


def _status(options: argparse.Namespace) -> int:
    from vidgen.report import status

    found = status.read(options.output)
    if options.json:
        print_json(asdict(found))
    else:
        status.show(found, Console())
    return 0


def _verify(options: argparse.Namespace) -> int:
    from vidgen.report.verify import verify

    verdict = verify(options.output, fast=options.fast, sample=options.sample, strict=options.strict)
    if options.json:
        print_json({**asdict(verdict), "ok": verdict.ok})
        return 0 if verdict.ok else FAILED
    for text in verdict.problems:
        print(text)
    if verdict.failed > len(verdict.problems):
        print(f"... and {verdict.failed - len(verdict.problems)} more")
    what = f"{verdict.items} items ({verdict.done} done, {verdict.not_done} not), {verdict.rejected} rejected rows"
    print(f"{'ok' if verdict.ok else 'NOT OK'}: {what}, {verdict.checked} videos decoded, {verdict.orphans} orphans")
    return 0 if verdict.ok else FAILED


def _report(options: argparse.Namespace) -> int:
    from vidgen.report import gallery

    page = gallery.report(options.output)
    print_json({"report": page}) if options.json else print(page)
    return 0
