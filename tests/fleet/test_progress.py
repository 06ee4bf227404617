"""What a person sees while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from vidgen.fleet.progress import Progress, ReplicaState, Snapshot, line, panel
from vidgen.store.objects import Objects


def snapshot(**changes: object) -> Snapshot:
    values: dict[str, object] = {
        "name": "clips",
        "total": 10,
        "done": 4,
        "failed": 1,
        "quarantined": 0,
        "rejected": 2,
        "pending": 5,
        "in_flight": 2,
        "rate": 120.0,
        "eta": 150.0,
        "elapsed": 120.0,
        "gpu_seconds": 200.0,
        "state": "running",
        "replicas": [ReplicaState("r0", "denoise", 3, 50, "0123456789abcdef"), ReplicaState("r1", "idle")],
    }
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]


def test_a_log_line_says_done_failed_rate_time_left_and_what_each_replica_does() -> None:
    text = line(snapshot())
    for part in ("[clips] 4/10 done", "1 failed", "120 items/h", "2:30 left", "r0: denoise 3/50 01234567", "r1: idle"):
        assert part in text


def test_the_live_display_has_a_line_for_each_replica_below_the_bar() -> None:
    console = Console(width=100, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(panel(snapshot()))
    lines = [text.rstrip() for text in console.export_text().splitlines()]
    assert "4 done" in lines[0] and "1 failed" in lines[0] and "2 rejected" in lines[0] and "of 10" in lines[0]
    assert lines[1].startswith("━") and "r0" not in lines[1]
    assert lines[2].split() == ["r0", "denoise", "3/50", "01234567"]
    assert lines[3].split() == ["r1", "idle"]


def test_a_fleet_of_hundreds_is_summed_up() -> None:
    console = Console(width=100, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(panel(snapshot(replicas=[ReplicaState(f"r{i}", "idle") for i in range(300)])))
    assert "and 284 more replicas" in console.export_text()


def test_progress_is_mirrored_for_those_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = Objects(str(tmp_path))
    progress = Progress(objects, interactive=False)
    progress.show(snapshot(), last=True)
    mirrored = json.loads(objects.read("progress.json"))
    assert (mirrored["done"], mirrored["eta"], mirrored["replicas"][0]["stage"]) == (4, 150.0, "denoise")
    assert "4/10 done" in capsys.readouterr().err
