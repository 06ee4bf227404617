"""The command that packs a run's videos: pack."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from vidgen.cli.command import Commands, print_json


def add(commands: Commands) -> None:
    """Adds it to the parser."""
    pack = commands.of_output(
        "pack", _pack, "the finished videos as WebDataset, Parquet, a video folder or plain files", schedule=True
    )
    pack.add_argument("dest", help="folder or URL to pack into")
    pack.add_argument("--format", required=True, help="webdataset, parquet, hf, folder")
    pack.add_argument("--where", help="only those, for example \"width >= 720 and topic = 'sea'\"")
    pack.add_argument("--split", help="for example train=0.9,test=0.1: by a hash of the row's id")
    pack.add_argument("--shard-size", default="500MB", help="bytes of video a shard: 500MB, 1GiB (default 500MB)")
    pack.add_argument("--name", help="folder: pattern of file names, for example '{row_id}_{sample}.mp4'")
    pack.add_argument("--partial", action="store_true", help="of a run that has not finished, what is done")
    pack.add_argument("--replace", action="store_true", help="turn a pack of other rows or options into this one")


def _pack(options: argparse.Namespace) -> int:
    from vidgen.pack import job, source
    from vidgen.pack.options import options as checked
    from vidgen.report.wording import size
    from vidgen.scheduled.packing import of_schedule

    wanted = checked(
        options.format, where=options.where, split=options.split, shard_size=options.shard_size, name=options.name
    )

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr)

    rows = of_schedule(options.output, partial=options.partial) or source.of_run(
        options.output, partial=options.partial
    )
    packed = job.pack(rows, options.dest, wanted, replace=options.replace, say=say)
    if options.json:
        print_json(asdict(packed))
        return 0
    left = ", ".join(f"{count} {why}" for why, count in packed.left_out.items())
    print(
        f"{packed.videos} videos ({size(packed.bytes)}) in {packed.dest}: {packed.made} shards written, {packed.kept} "
        f"kept{f'; left out: {left}' if left else ''}"
    )
    return 0
