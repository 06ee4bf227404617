"""Commands about models and checkpoints, without a run: models, parity."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console

from vidgen.cli.command import FAILED, Commands, print_json


def add(commands: Commands) -> None:
    """Adds them to the parser."""
    models = commands.add("models", _models, "families, tasks, parameters, and the defaults of a checkpoint")
    models.add_argument(
        "checkpoint", nargs="?", default="demo", help="demo, a folder, a hub id, or any URL of a folder"
    )
    parity = commands.add("parity", _parity, "native against diffusers, stage by stage, on this machine")
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


def _models(options: argparse.Namespace) -> int:
    from vidgen.report import models

    rows = models.read(options.checkpoint)
    if options.json:
        print_json([asdict(row) for row in rows])
    else:
        models.show(rows, Console())
    return 0


def _parity(options: argparse.Namespace) -> int:
    from vidgen import config as configuration
    from vidgen import parity
    from vidgen.parity.report import show
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
        print_json({**asdict(found), "ok": found.ok})
    else:
        show(found, Console())
    return 0 if found.ok else FAILED
