"""Commands that mend and tidy a run: retry, gc."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict

from vidgen.cli.command import Commands, age, print_json
from vidgen.errors import UserError


def add(commands: Commands) -> None:
    """Adds them to the parser."""
    retry = commands.of_output("retry", _retry, "reopen failed and quarantined items")
    retry.add_argument("--where", help="only those, for example \"error_class = 'capacity'\"")
    retry.add_argument("--missing", action="store_true", help="done ones whose object is gone or damaged")
    retry.add_argument("--takeover", action="store_true", help="supersede a driver that seems alive")
    gc = commands.of_output("gc", _gc, "remove objects that no commit names", schedule=True)
    gc.add_argument("--older-than", type=age, default=24 * 3600.0, help="age: 24h, 90m, 2d (default 24h)")
    gc.add_argument("--dry-run", action="store_true", help="only count them")


def _retry(options: argparse.Namespace) -> int:
    from vidgen.report import repair
    from vidgen.scheduled import overall, runs

    if schedule := runs.below(options.output):
        raise UserError(overall.one_to_retry(overall.read(options.output, schedule)))
    chosen = repair.retry(options.output, where=options.where, missing=options.missing, takeover=options.takeover)
    if options.json:
        print_json(asdict(chosen))
    elif chosen.generation is None:
        print("nothing to reopen")
    else:
        following = shlex.join(["vidgen", "generate", options.output])
        print(f"reopened {chosen.items} items in generation {chosen.generation}; next: {following}")
    return 0


def _gc(options: argparse.Namespace) -> int:
    from vidgen.report import repair
    from vidgen.scheduled import overall, runs

    which = {"older_than": options.older_than, "dry_run": options.dry_run}
    schedule = runs.below(options.output)
    swept = overall.collect(options.output, schedule, **which) if schedule else repair.collect(options.output, **which)
    if options.json:
        print_json(asdict(swept))
    else:
        verb = "would remove" if options.dry_run else "removed"
        print(f"{verb} {swept.removed} of {swept.seen} objects, {swept.bytes} bytes; {swept.temporaries} temporaries")
    return 0
