"""What a comparison found: its stages, times and memory, and the tables that show them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Stage:
    """One comparison: `largest` and `rms` error in shares of the reference's largest and rms value, and whether the one
    that counts for the dtype is within `limit`."""

    name: str
    shape: tuple[int, ...]
    largest: float
    rms: float
    limit: float
    ok: bool


@dataclass(slots=True)
class Report:
    """What was compared, and how long and how much memory each side took. Bytes: the GPU's peak, or on a CPU the
    process's. `defaults` are the family's own parameters where nobody says otherwise."""

    checkpoint: str
    family: str
    task: str
    pipeline: str
    dtype: str
    device: str
    request: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    psnr: float = 0.0
    least_psnr: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every stage and the frames are within their limits."""
        return all(stage.ok for stage in self.stages) and self.psnr >= self.least_psnr


def show(report: Report, console: Console) -> None:
    """The stages as a table, then frames, memory and seconds."""
    table = Table("stage", "shape", "largest error", "rms error", "limit", "")
    for stage in report.stages:
        shape = " x ".join(map(str, stage.shape))
        verdict = "ok" if stage.ok else "[red]too far[/red]"
        table.add_row(stage.name, shape, f"{stage.largest:.2e}", f"{stage.rms:.2e}", f"{stage.limit:g}", verdict)
    console.print(
        f"{report.checkpoint}: {report.family} {report.task} against {report.pipeline}", markup=False, highlight=False
    )
    console.print(f"  {report.dtype} on {report.device}", highlight=False)
    console.print(table)
    verdict = "ok" if report.psnr >= report.least_psnr else "too far"
    console.print(f"frames: PSNR {report.psnr:.1f} dB, at least {report.least_psnr:g}: {verdict}", highlight=False)
    times = Table("", "native", "diffusers")
    for row in ("total", "a step"):
        times.add_row(
            f"seconds, {row}", *(f"{report.seconds[f'{side} {row}']:.3f}" for side in ("native", "diffusers"))
        )
    times.add_row("peak memory, GB", *(f"{report.bytes[side] / 1e9:.2f}" for side in ("native", "diffusers")))
    console.print(times)
