"""The `vidgen` command: parse, call, print, exit code. Decides nothing that a library user would miss.

Exit codes: 0 every item done; 1 verify failed, or a video is damaged; 2 usage, configuration or plan error; 3 finished,
some items failed; 4 circuit breaker; 5 budget or deadline; 75 another driver holds the run; 130 interrupted, resumable.
A file here is a group of commands.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console

from vidgen import VERSION
from vidgen.cli import keeping, looking, making, models, packing
from vidgen.cli.command import FAILED, HELD, INTERRUPTED, RESUMABLE, USAGE, Commands, print_json
from vidgen.errors import DamagedError, InfrastructureError, UserError
from vidgen.redaction import clean


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from vidgen.store.epochs import Held

    options = _parse(arguments)
    try:
        code = int(options.run(options))
    except UserError as error:
        code = _error(options, error, USAGE)
    except DamagedError as error:
        code = _error(options, error, FAILED)
    except InfrastructureError as error:
        code = _error(options, error, RESUMABLE)
    except Held as error:
        code = _error(options, error, HELD)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:  # nobody's whom we know: shown as Python shows it, if that shows no secret
        told = traceback.format_exc()
        if clean(told) == told:
            raise
        print(clean(told), file=sys.stderr)
        code = FAILED
    return 0 if code in getattr(options, "ok_exit", ()) else code


def _error(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.debug:
        print(clean(traceback.format_exc()), file=sys.stderr)
    said = clean(str(error))
    if options.json:
        print_json({"error": said, "exit": code})
    elif getattr(options, "log", "text") == "json":
        from vidgen.fleet import log

        print(log.line(said, "error"), file=sys.stderr, flush=True)
    else:
        console = Console(stderr=True)
        console.print("error", style="bold red", end=": ")
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vidgen", description="Batch video generation at dataset scale.")
    parser.add_argument("--version", action="version", version=f"vidgen {VERSION}")
    commands = Commands(parser)
    for group in (making, looking, keeping, packing, models):
        group.add(commands)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse gives up on positionals after an option (`generate CONFIG --address X key=value`): take them here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)} (an override is key=value)")
    if rest:
        options.overrides += rest
    return options
