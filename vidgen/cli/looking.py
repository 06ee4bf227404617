"""Commands that look at a run and change nothing in it: status, why, verify, report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from rich.console import Console, RenderableType

from vidgen.cli.command import FAILED, Commands, print_json, share
from vidgen.errors import GenerationError, UserError


def add(commands: Commands) -> None:
    """Adds them to the parser."""
    status = commands.of_output(
        "status", _status, "done, failed, pending, rate, time left, failures by signature", schedule=True
    )
    status.add_argument(
        "--watch", action="store_true", help="again and again until the run, or the tick, ends; needs no cluster"
    )
    status.add_argument("--every", type=_seconds, default=2.0, help="with --watch: seconds between (default 2)")
    why = commands.of_output(
        "why", _why, "all that is known about one item, and the command that makes it again", schedule=True
    )
    why.add_argument("item", help="an item id, the beginning of one, or a row id")
    why.add_argument("--make", metavar="FILE", help="make it again, alone, without Ray; exit 1 if the bytes differ")
    why.add_argument("--device", default="auto", help="with --make: auto, cpu, cuda")
    why.add_argument("--threads", type=int, help="with --make: default as many as made it")
    verify = commands.of_output(
        "verify",
        _verify,
        "prove the output: manifest == plan, each video there and whole, no duplicate; or a pack's files",
        schedule=True,
    )
    verify.add_argument("--fast", action="store_true", help="listing and sizes only")
    verify.add_argument("--sample", type=share, default=1.0, help="share of the videos to read and decode")
    verify.add_argument("--strict", action="store_true", help="orphans are an error")
    commands.of_output("report", _report, "static HTML gallery of a run")


def _status(options: argparse.Namespace) -> int:
    from vidgen.report import status, watch
    from vidgen.scheduled import overall, runs

    if runs.below(options.output):
        return _shown(options, overall.watch(options.output, options.every), overall.render)
    return _shown(options, watch.watch(options.output, options.every), status.render)


def _shown(options: argparse.Namespace, seen: Iterator[Any], render: Callable[[Any], RenderableType]) -> int:
    """Prints the state; with --watch each that comes."""
    from rich.live import Live

    console = Console()
    if options.watch and not options.json and console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for found in seen:
                live.update(render(found), refresh=True)
        return 0
    for found in seen if options.watch else islice(seen, 1):
        if not options.json:
            console.print(render(found), highlight=False, soft_wrap=True)
        elif options.watch:
            print(json.dumps(asdict(found), default=str), flush=True)
        else:
            print_json(asdict(found))
    return 0


def _why(options: argparse.Namespace) -> int:
    from vidgen.report import explained, why
    from vidgen.scheduled import runs

    answer = why.ask(runs.places(options.output), options.item)
    if options.make is None:
        print_json(explained.as_json(answer)) if options.json else explained.show(answer, Console())
        return 0
    if answer.item is None:
        raise UserError(f"{options.item!r} is {len(answer.items)} items; name one: vidgen why {options.output} ITEM")
    from vidgen.report import remake

    try:
        made = remake.make(answer.item, options.make, device=options.device, threads=options.threads)
    except GenerationError as error:
        raise UserError(f"{answer.item.item.item_id}: {error}") from error
    if options.json:
        print_json(asdict(made))
    else:
        verdict = {True: "the committed video", False: f"NOT the committed {made.committed}", None: "nothing committed"}
        print(f"{made.path}: {made.bytes:,} bytes, sha256 {made.sha256}: {verdict[made.same]}")
        for note in answer.item.notes if made.same is False else ():
            print(f"note: {note}")
    return FAILED if made.same is False else 0


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: seconds between two looks are above 0")
    return seconds


def _verify(options: argparse.Namespace) -> int:
    from vidgen.pack import proof
    from vidgen.report.verify import verify
    from vidgen.scheduled import overall, runs

    if proof.is_pack(options.output):
        return _verify_pack(options)
    how = {"fast": options.fast, "sample": options.sample, "strict": options.strict}
    schedule = runs.below(options.output)
    verdict = overall.verify(options.output, schedule, **how) if schedule else verify(options.output, **how)
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


def _verify_pack(options: argparse.Namespace) -> int:
    from vidgen.pack import proof

    if options.strict:
        raise UserError(f"--strict is of a run; {options.output} is a pack, which has no orphans")
    found = proof.prove(options.output, fast=options.fast, sample=options.sample)
    if options.json:
        print_json({**asdict(found), "ok": found.ok})
        return 0 if found.ok else FAILED
    for text in found.problems:
        print(text)
    verdict = "ok" if found.ok else "NOT OK"
    print(f"{verdict}: a pack of {found.videos} videos in {found.shards} shards, {found.read}/{found.files} files read")
    return 0 if found.ok else FAILED


def _report(options: argparse.Namespace) -> int:
    from vidgen.report import gallery

    page = gallery.report(options.output)
    print_json({"report": page}) if options.json else print(page)
    return 0
