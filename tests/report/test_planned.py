"""What `vidgen plan` says, and how values are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.fleet.inline import config_for, write_prompts
from vidgen.memory import GIB
from vidgen.plan.build import build
from vidgen.plan.forecast import forecast
from vidgen.report import planned
from vidgen.report.wording import duration, size
from vidgen.store.objects import Objects


def test_a_plan_tells_rows_rejects_with_reasons_shapes_cost_and_what_to_do_next(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = config_for(write_prompts(tmp_path / "p.parquet", ["one", "", "three"]), output)
    result = build(config, Objects(output))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    planned.show(result, output, console, forecast(result.plans, config))
    text = console.export_text()
    for part in ("3 read, 1 rejected", "1 x prompt", "is empty", "GPU-hours", "assumed", f"vidgen generate {output}"):
        assert part in text, text
    machine = planned.as_json(result)
    assert machine["made"] and machine["plan"]["counts"]["items"] == 2 and sum(machine["reasons"].values()) == 1


def shape_on(gpu: str, fits: bool | None) -> dict[str, Any]:
    named = {
        "gpu": gpu,
        "gpus": 2,
        "context": 2,
        "usable_bytes": 70 * GIB,
        "memory_bytes": 81 * GIB,
        "stage": "denoise",
    }
    terms = [
        {"name": "weights", "bytes": 40 * GIB, "formula": "a + b"},
        {"name": "latents", "bytes": 1, "formula": "c"},
    ]
    rest = {"fits": fits, "smallest_context": 8, "seconds_per_item": 3661.0, "terms": terms}
    return {"shape": "wide", "items": 3, "tokens": 5, "tflops_per_item": 1.0, **named, **rest}


@pytest.mark.parametrize(
    ("fits", "parts"),
    [
        (True, ("GiB of 70", "81 to denoise", "yes", "1:01:01")),
        (False, ("no", "wide fits H100 from parallel.context=8", "weights 40 GiB")),
        (None, ("its weights do",)),
    ],
)
def test_a_plan_for_a_named_gpu_tells_memory_fit_degree_and_seconds(
    tmp_path: Path, fits: bool | None, parts: tuple[str, ...]
) -> None:
    output = str(tmp_path / "out")
    config = config_for(write_prompts(tmp_path / "p.parquet", ["one"]), output)
    result = build(config, Objects(output))
    estimate = {**result.plan.estimate, "gpu": "H100", "shapes": [shape_on("H100", fits)]}
    result = replace(result, plan=replace(result.plan, estimate=estimate))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    planned.show(result, output, console, forecast((result.plan,), config))
    text = console.export_text()
    assert all(part in text for part in parts) and "of H100" in text, text
    assert ("parallel.context" in text) == (fits is False)
    assert planned.as_json(result)["plan"]["estimate"]["shapes"][0]["terms"][0]["formula"] == "a + b"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1:00"), (3661, "1:01:01"), (100 * 3600, "100:00:00")]
)
def test_a_duration_is_written_for_a_person(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (8500, "8.5 KB"), (2.5e9, "2.5 GB"), (3e15, "3e+03 TB")]
)
def test_a_size_is_written_for_a_person(count: float, text: str) -> None:
    assert size(count) == text
