"""`vidgen models`: what each family's folder says of itself, and the defaults of one checkpoint by task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from vidgen import family
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import UserError


@dataclass(slots=True)
class Model:
    """One family: its tasks with the media each takes (true: it needs it), and for the family of the checkpoint asked
    about, that checkpoint's defaults by task."""

    family: str
    tasks: dict[str, dict[str, bool]]
    pipelines: tuple[str, ...]
    samplers: tuple[str, ...]
    params: dict[str, str]
    revision: int
    checkpoint: str = ""
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)


def read(checkpoint: str = "demo") -> list[Model]:
    """All families there are; UserError if the checkpoint is of none of them."""
    folder = open_checkpoint(checkpoint)
    configs = folder.configs()
    owner = family.recognise(configs["model_index"])
    rows = [_model(name) for name in family.families()]
    for row in rows:
        spec = family.spec(row.family)
        if row.family == owner:
            row.checkpoint = folder.resolved.name
        if row.family != owner and spec.CHECKPOINT:
            continue
        params = spec.read(configs if row.family == owner else {})
        for task in spec.TASKS:
            try:
                row.defaults[task] = spec.defaults(task, params)
            except UserError:
                continue  # another kind of checkpoint does this task
    return rows


def show(rows: list[Model], console: Console) -> None:
    for row in rows:
        console.print(f"[bold]{row.family}[/bold]  {', '.join(_task(*entry) for entry in row.tasks.items())}")
        table = Table.grid(padding=(0, 2))
        table.add_row("checkpoints", ", ".join(row.pipelines) or _without_classes(row.family))
        if row.samplers:
            table.add_row("samplers", ", ".join(row.samplers))
        if row.params:
            table.add_row("params", ", ".join(f"{name}: {kind}" for name, kind in row.params.items()))
        for task, values in row.defaults.items():
            shown = ", ".join(f"{key}={value}" for key, value in values.items() if value not in (None, "", {}))
            table.add_row(f"{task} defaults", shown + (f"  (of {row.checkpoint})" if row.checkpoint else ""))
        console.print(Padding(table, (0, 0, 1, 2)), highlight=False)
    console.print("vidgen models CHECKPOINT: the defaults of that checkpoint", style="dim")


def _task(task: str, media: dict[str, bool]) -> str:
    wanted = [name if required else f"{name}?" for name, required in media.items()]
    return f"{task} ({', '.join(wanted)})" if wanted else task


def _without_classes(name: str) -> str:
    return "any video pipeline of the diffusers library" if family.spec(name).CHECKPOINT else "none needed"


def _model(name: str) -> Model:
    spec = family.spec(name)
    return Model(
        family=name,
        tasks={task: dict(media) for task, media in spec.TASKS.items()},
        pipelines=tuple(spec.PIPELINES),
        samplers=spec.SAMPLERS,
        params={key: kind.__name__ for key, kind in spec.PARAMS.items()},
        revision=spec.REVISION,
    )
