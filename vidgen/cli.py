"""The `vidgen` command: parse, call, print, exit code. Decides nothing that a library user would miss.

Exit codes: 0 every item done; 1 verify failed; 2 usage, configuration or plan error; 3 finished, some items failed;
4 circuit breaker; 5 budget or deadline; 75 another driver holds the run; 130 interrupted, resumable.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from vidgen import VERSION
from vidgen.errors import InfrastructureError, UserError

Command = Callable[[argparse.Namespace], int]
USAGE, FAILED, SOME_FAILED, RESUMABLE, HELD, INTERRUPTED = 2, 1, 3, 5, 75, 130
REPORT_ITEMS = 1_000
"""`generate` makes the report of a run up to this size by itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from vidgen.store.epochs import Held

    options = _parse(arguments)
    try:
        code = int(options.run(options))
    except UserError as error:
        code = _error(options, error, USAGE)
    except InfrastructureError as error:
        code = _error(options, error, RESUMABLE)
    except Held as error:
        code = _error(options, error, HELD)
    except KeyboardInterrupt:
        code = INTERRUPTED
    return 0 if code in getattr(options, "ok_exit", ()) else code


def _error(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.debug:
        traceback.print_exc()
    if options.json:
        _print_json({"error": str(error), "exit": code})
    else:
        console = Console(stderr=True)
        console.print("error", style="bold red", end=": ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return code


# ---------------------------------------------------------------- commands


def _generate(options: argparse.Namespace) -> int:
    from vidgen.fleet import run as fleet

    opened, outcome = fleet.generate(
        options.config,
        options.overrides,
        fleet.Options(address=options.address, takeover=options.takeover, quiet=options.json),
    )
    output = opened.config.output.path
    finished = outcome.code in (0, SOME_FAILED)
    page = ""
    if finished and not options.no_report and opened.items <= REPORT_ITEMS:
        from vidgen.report import gallery

        page = gallery.report(output)
    if options.json:
        _print_json({**asdict(outcome), "exit": outcome.code, "output": output, "report": page})
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
    following = [f"vidgen verify {output}"]
    if outcome.code in (0, SOME_FAILED) and not page:
        following.append(f"vidgen report {output}")
    if outcome.code == SOME_FAILED:
        following += [f"vidgen status {output}", f"vidgen retry {output}"]
    if counts["pending"]:
        following = [f"vidgen status {output}", f"vidgen generate {output}"]
    console.print("next:", style="dim")
    for command in following:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _plan(options: argparse.Namespace) -> int:
    from vidgen import config as configuration
    from vidgen.fleet.opening import open_store
    from vidgen.plan import build as planning
    from vidgen.report import planned, repair
    from vidgen.store.objects import new_token

    config = configuration.load(options.config, options.overrides)
    objects = open_store(config)
    if not options.dry_run:
        objects.probe(new_token())

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr)

    if options.extend and not options.dry_run:
        result = repair.extend(config, objects, takeover=options.takeover, say=say)
    else:
        result = planning.build(config, objects, dry_run=options.dry_run, extend=options.extend, say=say)
    if options.json:
        _print_json(planned.as_json(result))
    else:
        planned.show(result, config.output.path, Console())
    return 0


def _status(options: argparse.Namespace) -> int:
    from vidgen.report import status

    found = status.read(options.output)
    if options.json:
        _print_json(asdict(found))
    else:
        status.show(found, Console())
    return 0


def _verify(options: argparse.Namespace) -> int:
    from vidgen.report.verify import verify

    verdict = verify(options.output, fast=options.fast, sample=options.sample, strict=options.strict)
    if options.json:
        _print_json({**asdict(verdict), "ok": verdict.ok})
        return 0 if verdict.ok else FAILED
    for text in verdict.problems:
        print(text)
    if verdict.failed > len(verdict.problems):
        print(f"... and {verdict.failed - len(verdict.problems)} more")
    what = f"{verdict.items} items ({verdict.done} done, {verdict.not_done} not), {verdict.rejected} rejected rows"
    print(f"{'ok' if verdict.ok else 'NOT OK'}: {what}, {verdict.checked} videos decoded, {verdict.orphans} orphans")
    return 0 if verdict.ok else FAILED


def _stop(options: argparse.Namespace) -> int:
    from vidgen.store import epochs
    from vidgen.store.objects import Objects

    epoch = epochs.request_stop(Objects(options.output))
    text = f"asked the driver of epoch {epoch} to stop; it looks every {epochs.BEAT_SECONDS:g} s"
    _print_json({"epoch": epoch}) if options.json else print(text)
    return 0


def _retry(options: argparse.Namespace) -> int:
    from vidgen.report import repair

    chosen = repair.retry(options.output, where=options.where, missing=options.missing, takeover=options.takeover)
    if options.json:
        _print_json(asdict(chosen))
    elif chosen.generation is None:
        print("nothing to reopen")
    else:
        print(
            f"reopened {chosen.items} items in generation {chosen.generation}; next: vidgen generate {options.output}"
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    from vidgen.report import gallery

    page = gallery.report(options.output)
    _print_json({"report": page}) if options.json else print(page)
    return 0


def _gc(options: argparse.Namespace) -> int:
    from vidgen.report import repair

    swept = repair.collect(options.output, older_than=options.older_than, dry_run=options.dry_run)
    if options.json:
        _print_json(asdict(swept))
    else:
        verb = "would remove" if options.dry_run else "removed"
        print(f"{verb} {swept.removed} of {swept.seen} objects, {swept.bytes} bytes; {swept.temporaries} temporaries")
    return 0


def _models(options: argparse.Namespace) -> int:
    from vidgen.report import models

    rows = models.read(options.checkpoint)
    if options.json:
        _print_json([asdict(row) for row in rows])
    else:
        models.show(rows, Console())
    return 0


def _parity(options: argparse.Namespace) -> int:
    from vidgen import config as configuration
    from vidgen import parity
    from vidgen.types import ModelSettings

    # The schema of a job checks names and types; what a job needs beside its sampling is not looked at.
    job = {"dataset": {"path": "-"}, "output": {"path": "-"}}
    overrides = [text if text.startswith("sampling.") else f"sampling.{text}" for text in options.overrides]
    sampling = configuration.to_dict(configuration.from_dict(job, "parity", overrides))["sampling"]
    given = {name: value for name, value in sampling.items() if value is not None and name != "params"}
    params = dict(sampling["params"])
    media = {name: getattr(options, name) for name in ("image", "last_image", "video", "prompt")}
    settings = ModelSettings(
        checkpoint=options.checkpoint,
        family=options.family,
        task=options.task,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        cache_dir=options.cache_dir,
    )
    found = parity.compare(
        settings, {**given, **{k: v for k, v in media.items() if v}, **({"params": params} if params else {})}
    )
    if options.json:
        _print_json({**asdict(found), "ok": found.ok})
    else:
        parity.show(found, Console())
    return 0 if found.ok else FAILED


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


# ---------------------------------------------------------------- the parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vidgen", description="Batch video generation at dataset scale.")
    parser.add_argument("--version", action="version", version=f"vidgen {VERSION}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="machine-readable output")
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[shared])
        sub.set_defaults(run=run)
        return sub

    def job(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("config", help=what)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")

    generate = command(
        "generate", _generate, "plan if there is no plan, then run or resume until every item is terminal"
    )
    job(generate, "a YAML configuration, or the OUTPUT of a run to resume")
    generate.add_argument("--address", help="Ray cluster to join (else RAY_ADDRESS, else a local one)")
    generate.add_argument("--takeover", action="store_true", help="supersede a driver that seems alive")
    generate.add_argument("--no-report", action="store_true", help="do not make the HTML report at the end")
    generate.add_argument("--ok-exit", type=_codes, default=(), help="exit codes to map to 0, for example 3,5,75")

    plan = command("plan", _plan, "validate everything without GPU, torch or Ray, and freeze the plan")
    job(plan, "a YAML configuration")
    plan.add_argument("--dry-run", action="store_true", help="freeze nothing")
    plan.add_argument("--extend", action="store_true", help="add what the frozen plan does not have yet")
    plan.add_argument("--takeover", action="store_true", help="with --extend: supersede a driver that seems alive")

    def output(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        sub = command(name, run, text)
        sub.add_argument("output", help="folder or URL of a run")
        return sub

    output("stop", _stop, "ask the running driver to stop gracefully")
    output("status", _status, "done, failed, pending, rate, time left, failures by signature")
    verify = output("verify", _verify, "prove the output: manifest == plan, each video there and whole, no duplicate")
    verify.add_argument("--fast", action="store_true", help="listing and sizes only")
    verify.add_argument("--sample", type=_share, default=1.0, help="share of the videos to read and decode")
    verify.add_argument("--strict", action="store_true", help="orphans are an error")
    retry = output("retry", _retry, "reopen failed and quarantined items")
    retry.add_argument("--where", help="only those, for example \"error_class = 'capacity'\"")
    retry.add_argument("--missing", action="store_true", help="done ones whose object is gone or damaged")
    retry.add_argument("--takeover", action="store_true", help="supersede a driver that seems alive")
    output("report", _report, "static HTML gallery of a run")
    gc = output("gc", _gc, "remove objects that no commit names")
    gc.add_argument("--older-than", type=_age, default=24 * 3600.0, help="age: 24h, 90m, 2d (default 24h)")
    gc.add_argument("--dry-run", action="store_true", help="only count them")
    models = command("models", _models, "families, tasks, parameters, and the defaults of a checkpoint")
    models.add_argument(
        "checkpoint", nargs="?", default="demo", help="demo, a folder, a hub id, or any URL of a folder"
    )
    parity = command("parity", _parity, "native against diffusers, stage by stage, on this machine")
    parity.add_argument("checkpoint", help="demo, a folder, a hub id, or any URL of a folder")
    parity.add_argument(
        "overrides", nargs="*", metavar="key=value", help="sampling fields: height=480 params.strength=0.5"
    )
    parity.add_argument("--family", default="auto", help="default: as model_index.json says")
    parity.add_argument("--task", default="t2v", help="t2v, i2v, v2v (default t2v)")
    parity.add_argument("--revision", help="of a checkpoint on the hub")
    parity.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as published")
    parity.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parity.add_argument("--cache-dir", help="where remote checkpoints are copied to")
    parity.add_argument("--prompt", help="what to make (default: a red circle moving left)")
    for name in ("image", "last-image", "video"):
        parity.add_argument(f"--{name}", help="conditioning medium: a path or URL")
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse gives up on positionals after an option (`generate CONFIG --address X key=value`): take them here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _codes(text: str) -> tuple[int, ...]:
    return tuple(int(code) for code in text.split(","))


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share is above 0 and at most 1")
    return share


def _age(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write 24h, 90m, 2d") from None


if __name__ == "__main__":
    sys.exit(main())
