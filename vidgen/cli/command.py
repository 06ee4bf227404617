"""What every command has: how it is added to the parser, its exit codes, its arguments' types, its machine output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

Command = Callable[[argparse.Namespace], int]
USAGE, FAILED, SOME_FAILED, RESUMABLE, HELD, INTERRUPTED = 2, 1, 3, 5, 75, 130


class Commands:
    """The subcommands of a parser. Each has `--json` and `--debug`, and `run` of its options carries it out."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._shared = argparse.ArgumentParser(add_help=False)
        self._shared.add_argument("--json", action="store_true", help="machine-readable output")
        self._shared.add_argument("--debug", action="store_true", help="show tracebacks")
        self._parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name: str, run: Command, text: str) -> argparse.ArgumentParser:
        sub = self._parsers.add_parser(name, help=text, description=text, parents=[self._shared])
        sub.set_defaults(run=run)
        return sub

    def job(self, name: str, run: Command, text: str, config: str) -> argparse.ArgumentParser:
        """A command of a configuration and overrides."""
        sub = self.add(name, run, text)
        sub.add_argument("config", help=config)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
        return sub

    def of_output(self, name: str, run: Command, text: str, *, schedule: bool = False) -> argparse.ArgumentParser:
        """A command of a run's output; `schedule`: or of a schedule's."""
        sub = self.add(name, run, text)
        sub.add_argument("output", help=f"folder or URL of a run{', or of a schedule' if schedule else ''}")
        return sub


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def codes(text: str) -> tuple[int, ...]:
    """3,5,75"""
    try:
        return tuple(int(code) for code in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of exit codes; write 3,5,75") from None


def share(text: str) -> float:
    """Above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share is above 0 and at most 1")
    return value


def age(text: str) -> float:
    """Seconds of 24h, 90m, 2d."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write 24h, 90m, 2d")
    return seconds
