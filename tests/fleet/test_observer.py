"""What a run shows of itself as numbers and as lines: nothing twice, nothing lost, the same in every place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from tests.fleet.test_progress import snapshot
from vidgen.fleet import events as ev
from vidgen.fleet import metrics
from vidgen.fleet.driver import Driver
from vidgen.fleet.metrics import METRICS, Meter, Metric
from vidgen.fleet.observer import Observer
from vidgen.fleet.progress import Progress, ReplicaState
from vidgen.fleet.replica import Pulse
from vidgen.report import status
from vidgen.store import commits, ledger
from vidgen.store.objects import Objects


def values(output: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Metrics of progress.json: name -> values of the labels -> value, of a histogram how often it observed."""
    shown = json.loads(Objects(output).read("progress.json"))["metrics"]
    return {
        name: {
            tuple(row[label] for label in metric.labels): row["count" if metric.kind == metrics.HISTOGRAM else "value"]
            for row in shown[name]
        }
        for name, metric in {metric.name: metric for metric in METRICS}.items()
        if name in shown
    }


def test_every_metric_has_a_name_of_its_own_a_unit_and_a_description() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    declared = {id(value) for value in vars(metrics).values() if isinstance(value, Metric)}
    assert declared == {id(metric) for metric in METRICS}, "declared and not listed"
    for metric in METRICS:
        assert metric.name.startswith("vidgen_") and metric.unit and metric.description
        assert bool(metric.buckets) == (metric.kind == metrics.HISTOGRAM)


def test_the_page_about_metrics_lists_every_one_with_its_labels() -> None:
    page = (Path(__file__).parents[2] / "docs" / "seeing.md").read_text()
    listed = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(ray_\w+)` \|([^|]*)\|", page, re.M)
    }
    assert listed == {metric.exported: set(metric.labels) for metric in METRICS}


def test_the_counts_of_a_run_are_those_of_its_commits(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    fails = ["item" if i == 3 else "" for i in range(8)]
    config = config_for(write_prompts(tmp_path / "p.parquet", [*map(str, range(7)), ""], fails=fails), output)
    config.dataset.columns["params.fail"] = "fails"
    drive(config)
    found = values(output)
    items = {key: int(value) for (key,), value in found["vidgen_items"].items()}
    assert items == {"pending": 0, "done": 6, "failed": 1, "quarantined": 0, "rejected": 1}
    assert found["vidgen_items_settled"] == {("done", ""): 6, ("failed", "item"): 1}
    records = [record for table in ledger.read_tables(Objects(output)) for record in ledger.to_records(table)]
    assert found["vidgen_bytes"] == {(): sum(record.bytes for record in records)}
    assert found["vidgen_frames"] == {(): sum(record.frames for record in records)}
    assert found["vidgen_stage_seconds"] == {(stage,): 6 for stage in ("encode", "denoise", "decode", "write")}
    assert found["vidgen_attempts_failed"][("item",)] >= 3 and found["vidgen_retries"][()] >= 2
    assert status.read(output).metrics["vidgen_items_settled"], "status shows them without a cluster"


def test_after_a_resume_counters_say_what_this_driver_saw_and_gauges_the_whole_run(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    prompts = write_prompts(tmp_path / "p.parquet", 30)
    config = config_for(prompts, output, sampling__params__step_seconds=0.05)
    first, _ = drive(config, interrupt_at=3)
    assert 0 < first.counts["done"] < 30
    before = values(output)["vidgen_items_settled"][("done", "")]
    already = sum(1 for _ in commits.list_commits(Objects(output), 0))
    drive(config)
    after = values(output)
    assert before == first.counts["done"]
    assert after["vidgen_items_settled"] == {("done", ""): 30 - already}
    assert after["vidgen_items"][("done",)] == 30 and after["vidgen_items"][("pending",)] == 0


def test_a_record_that_is_told_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Driver._settle

    def twice(self: Driver, record: object) -> None:
        once(self, record)  # type: ignore[arg-type]
        once(self, record)  # type: ignore[arg-type]

    monkeypatch.setattr(Driver, "_settle", twice)
    output = str(tmp_path / "out")
    drive(config_for(write_prompts(tmp_path / "p.parquet", 4), output))
    assert values(output)["vidgen_items_settled"] == {("done", ""): 4}


def test_gpu_seconds_are_busy_idle_or_starting_by_the_degree_of_each_replica_and_cost_follows_the_price() -> None:
    now, shown = [100.0], Progress(Objects("memory://observer"), quiet=True)
    observer = Observer(shown, price=3.0, clock=lambda: now[0])
    busy, idle = (Pulse((), stage, 1, 2, 0.0, 0.0, "") for stage in ("denoise", "idle"))
    now[0] += 10
    observer.show(snapshot(gpu_seconds=7200.0), {"r0": busy, "r1": idle, "r2": None, "gang": busy}, {"gang": 4})
    now[0] += 1
    observer.show(snapshot(gpu_seconds=7200.0), {"r0": idle}, {})
    spent = {state: observer.meter.value(metrics.GPU_SECONDS, state=state) for state in ("busy", "idle", "starting")}
    assert spent == {"busy": 50.0, "idle": 11.0, "starting": 10.0}
    assert observer.meter.value(metrics.COST) == pytest.approx(6.0)


def test_a_replica_that_waits_has_no_gpu_and_a_state_that_is_over_is_told_as_none() -> None:
    now = [0.0]
    observer = Observer(Progress(Objects("memory://observer"), quiet=True), clock=lambda: now[0])
    waits = "waiting for 1 GPU (0 of 8 free)"
    now[0] = 10.0
    replicas = [ReplicaState("r0", waits), ReplicaState("r1", "polish")]
    observer.show(snapshot(replicas=replicas), {"r0": Pulse((), waits, 0, 0, 0.0, 0.0, "")}, {})
    assert [observer.meter.value(metrics.REPLICAS, state=state) for state in ("waiting", "polish")] == [1, 1]
    assert "vidgen_gpu_seconds" not in observer.meter.values()
    observer.show(snapshot(replicas=[ReplicaState("r0", "idle")]), {}, {})
    states = observer.meter.values()["vidgen_replicas"]
    assert {row["state"]: row["value"] for row in states if row["value"]} == {"idle": 1}


def test_a_sink_hears_of_every_change_with_the_labels_that_are_declared() -> None:
    heard: list[tuple[str, float, dict[str, str]]] = []

    class Sink:
        def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
            heard.append((metric.name, value, dict(labels)))

    meter = Meter(Sink())
    meter.record(metrics.BYTES, 10)
    meter.record(metrics.BYTES, 0)
    meter.record(metrics.ITEMS, 5, state="done")
    assert heard == [("vidgen_bytes", 10, {}), ("vidgen_items", 5, {"state": "done"})]
    with pytest.raises(AssertionError, match="labels"):
        meter.record(metrics.ITEMS, 5)


def test_a_json_log_has_a_line_for_each_attempt_with_item_replica_and_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(Objects(str(tmp_path)), interactive=True, json=True)
    progress.run = "clips"
    observer = Observer(progress)
    observer.does(ev.Send("r1", 4, ()))
    observer._attempts["abc"] = ("r1", 2)
    observer.heard(ev.ItemFailed("r1", "abc", "item", "every frame\nis flat", "item: flat"))
    observer.heard(ev.ReplicaLost("r1", "crash", "it died"))
    progress.show(snapshot(), last=True)
    lines = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert all(set(line) == {"time", "level", "run", "item", "replica", "attempt", "message"} for line in lines)
    failed, lost, summed = lines
    assert (failed["item"], failed["replica"], failed["attempt"], failed["level"]) == ("abc", "r1", 2, "warning")
    assert "every frame\nis flat" in failed["message"]
    assert (lost["replica"], lost["item"], lost["run"]) == ("r1", None, "clips") and "crash" in lost["message"]
    assert "4/10 done" in summed["message"]


def test_a_person_still_reads_what_a_person_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = Observer(Progress(Objects(str(tmp_path)), interactive=False))
    observer.heard(ev.ReplicaReady("r0", "node"))
    observer.heard(ev.ReplicaLost("r1", "crash", "it died"))
    assert capsys.readouterr().err.splitlines() == ["replica r1 was lost (crash): it died"]
