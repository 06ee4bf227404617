"""One tick of a scheduled batch: `python jobs/scheduled.py CONFIG key=value` makes what is new in `dataset.path`.

Every tick with new rows is a run of its own, `OUTPUT/runs/{n}`; `OUTPUT/manifest` shows them all. `--every 15m` ticks
for ever. Exit codes are those of `vidgen generate`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from vidgen import config as configuration
from vidgen.cli.command import codes
from vidgen.errors import UserError
from vidgen.fleet import log
from vidgen.scheduled import pace
from vidgen.scheduled.difference import Policy
from vidgen.scheduled.tick import Drive, Report, Schedule, tick
from vidgen.store.epochs import Held

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def main(arguments: Sequence[str] | None = None, drive: Drive | None = None) -> int:
    """Parses, ticks, prints; returns the exit code. `drive` takes the place of the fleet."""
    options = _parse(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = drive or _fleet(options)
    if options.every is None:
        code = _guarded(options, lambda: _tick(options, made))
    else:
        code = pace.every(options.every, lambda: _tick(options, made), say=_sayer(options, "warning"))
    return 0 if code in options.ok_exit else code


def _tick(options: argparse.Namespace, drive: Drive) -> int:
    """One tick; the configuration is read anew each time."""
    config = configuration.load(options.config, options.overrides)
    policy = Policy(options.on_change, options.on_spec_change)
    schedule = Schedule(policy, options.overlap, options.takeover)
    report = tick(config, schedule, drive, say=_sayer(options))
    options.takeover = False  # it is for the first tick of a long-lived process alone
    if options.json:
        print(json.dumps(asdict(report), indent=1 if options.every is None else None), flush=True)
    else:
        _show(report)
    return report.exit


def _fleet(options: argparse.Namespace) -> Drive:
    def drive(output: str, overrides: Sequence[str]) -> Any:
        from vidgen.fleet import run as fleet

        choice = fleet.Options(
            address=options.address, takeover=options.takeover, quiet=options.json, json_log=options.log == "json"
        )
        return fleet.generate(output, overrides, choice)[1]

    return drive


def _guarded(options: argparse.Namespace, act: Any) -> int:
    try:
        return int(act())
    except (UserError, Held) as error:
        if options.debug:
            traceback.print_exc()
        code = pace.HELD if isinstance(error, Held) else pace.USAGE
        if options.json:
            print(json.dumps({"error": str(error), "exit": code}, indent=1))
        else:
            _sayer(options, "error")(f"error: {error}")
        return code
    except KeyboardInterrupt:
        return pace.INTERRUPTED


def _show(report: Report) -> None:
    rows = report.rows
    made = f"run {report.run}: {report.items:,} items" if report.run is not None else "nothing new, no run made"
    rejected = f", {report.rejected:,} rejected" if report.rejected else ""
    print(f"{made}{rejected}; {rows.new:,} rows new, {rows.same:,} seen before, {rows.gone:,} gone")
    for one in report.driven:
        counts = ", ".join(f"{number:,} {name}" for name, number in one.counts.items() if number)
        print(f"  run {one.run}: {one.reason} ({counts}), exit {one.code}")
    if report.waiting:
        print(f"  for the next tick: run {', '.join(map(str, report.waiting))}")
    total = ", ".join(f"{number:,} {name}" for name, number in report.counts.items() if number)
    print(f"  all runs: {total or 'nothing yet'}\n  output    {report.output}, exit {report.exit}", flush=True)


def _sayer(options: argparse.Namespace, level: str = "info") -> Callable[[str], None]:
    """What a tick's lines go through: standard error, as JSON lines if asked for; nowhere with --json alone."""
    if options.log == "json":
        return lambda text: _say(log.line(text, level))
    return _silent if options.json and level == "info" else _say


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scheduled.py", description=__doc__)
    parser.add_argument("config", help="a YAML configuration; output.path is the schedule's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
    parser.add_argument(
        "--every", type=_interval, metavar="15m", help="tick for ever, at this interval: 90s, 15m, 6h, 1d"
    )
    same = "a row with the same id and other content: leave it (default), make it again, or stop"
    parser.add_argument("--on-change", choices=("skip", "regenerate", "error"), default="skip", help=same)
    spec = "configuration, checkpoint or family make other pixels: leave what is made (default), or make it again"
    parser.add_argument("--on-spec-change", choices=("skip", "regenerate"), default="skip", help=spec)
    overlap = "while the last tick still runs: exit with 75 (default), or plan and drive what is new beside it"
    parser.add_argument("--overlap", choices=("skip", "join"), default="skip", help=overlap)
    parser.add_argument("--address", help="Ray cluster to join (else RAY_ADDRESS, else a local one)")
    parser.add_argument("--takeover", action="store_true", help="supersede a tick that seems alive")
    parser.add_argument("--ok-exit", type=codes, default=(), help="exit codes to map to 0, for example 3,5,75")
    parser.add_argument("--log", choices=("text", "json"), default="text", help="json: the log as JSON lines")
    parser.add_argument("--json", action="store_true", help="machine-readable output; a line a tick with --every")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options, rest = parser.parse_known_args(arguments)
    if any(text.startswith("-") or "=" not in text for text in rest):  # argparse takes no positionals after an option
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides += rest
    return options


def _interval(text: str) -> float:
    try:
        seconds = float(text[:-1]) * UNITS[text[-1:]]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval of a second or more; write 90s, 15m, 6h, 1d")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
