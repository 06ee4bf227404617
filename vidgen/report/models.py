"""`vidgen models`: what each family's folder says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from vidgen import family
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import UserError


@dataclass(slots=True)
class Model:
    """One family: its tasks, and the defaults of the checkpoint that comes with vidgen, where it is of this family."""

    family: str
    tasks: tuple[str, ...]
    pipelines: tuple[str, ...]
    samplers: tuple[str, ...]
    params: dict[str, str]
    revision: int
    defaults: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""


def read() -> list[Model]:
    """All families there are."""
    return [_model(name) for name in family.families()]


def show(rows: list[Model], console: Console) -> None:
    table = Table("family", "tasks", "checkpoints of", "samplers", "params", "defaults")
    for row in rows:
        defaults = ", ".join(f"{key}={value}" for key, value in row.defaults.items() if value not in (None, "", {}))
        table.add_row(
            row.family,
            ", ".join(row.tasks),
            ", ".join(row.pipelines) or "no weights",
            ", ".join(row.samplers),
            ", ".join(f"{name}: {kind}" for name, kind in row.params.items()),
            defaults + (f" (checkpoint {row.checkpoint})" if row.checkpoint else ""),
        )
    console.print(table)


def _model(name: str) -> Model:
    spec = family.spec(name)
    row = Model(
        name,
        tuple(spec.TASKS),
        tuple(spec.PIPELINES),
        spec.SAMPLERS,
        {key: kind.__name__ for key, kind in spec.PARAMS.items()},
        spec.REVISION,
    )
    configs: dict[str, Any] = {}
    if spec.CHECKPOINT:
        try:
            configs = open_checkpoint("demo").configs()
        except UserError:
            return row
        if configs["model_index"].get("_class_name") not in spec.PIPELINES:
            return row
        row.checkpoint = "demo"
    row.defaults = spec.defaults(row.tasks[0], spec.read(configs))
    return row
