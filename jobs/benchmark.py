"""Measurements: `python jobs/benchmark.py MODE`. Prints what it measured beside what it compares with; asserts nothing.

Modes are subcommands, one function each, in `jobs/benchmarks/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.attention import attention
from benchmarks.control_plane import dispatch, plan, resume
from benchmarks.ending import gangs, tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)

    def mode(function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = modes.add_parser(function.__name__.replace("_", "-"), help=(function.__doc__ or "").split("\n")[0])
        added.set_defaults(function=function)
        return added

    planning = mode(plan)
    planning.add_argument("--rows", type=int, default=1_000_000)
    planning.add_argument("--family", default="testcard")
    planning.add_argument("--ids", action="store_true", help="with an id column instead of content hashes")

    dispatching = mode(dispatch)
    dispatching.add_argument("--items", type=int, default=10_000)
    dispatching.add_argument("--replicas", type=int, default=2)

    evening = mode(tail)
    evening.add_argument("--items", type=int, default=10_000)
    evening.add_argument("--replicas", type=int, default=64)
    evening.add_argument("--jitter", type=float, default=0.05, help="standard deviation of an item's seconds")

    ending = mode(gangs)
    ending.add_argument("--output", help="a finished run, whose recorded seconds are taken; else published ones")
    ending.add_argument("--load", type=float, default=60.0, help="seconds to load the model")
    ending.add_argument("--efficiency", type=float, default=0.64, help="of a gang of 8 (engines reach 0.31 to 0.86)")

    attending = mode(attention)
    attending.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    attending.add_argument("--tokens", type=int, default=8192)
    attending.add_argument("--repeats", type=int, default=20)

    resuming = mode(resume)
    resuming.add_argument("--commits", type=int, default=200_000)
    resuming.add_argument("--loose", type=int, default=5_000, help="commits that no ledger part names")
    resuming.add_argument("--output", help="an empty place below any fsspec URL (default: a temporary folder)")

    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
