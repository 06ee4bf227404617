"""What Prometheus finds at the metrics port of a real Ray cluster after a run: the manifest's counts."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.test_running import ROOT, RayNodes, free_port, until
from tests.fleet.inline import write_prompts
from vidgen import manifest
from vidgen.fleet.metrics import HISTOGRAM, LOST, METRICS
from vidgen.store.objects import Objects

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Scraped:
    """A Ray head with one CPU, its metrics at `port`."""

    def __init__(self, nodes: RayNodes, port: int) -> None:
        self.nodes, self.url = nodes, f"http://127.0.0.1:{port}/metrics"

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            text = answer.read().decode()
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]

    def sums(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for given, value in self.samples(name):
            found[tuple(given[label] for label in labels)] += round(value)
        return found


@pytest.fixture
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    nodes, port = RayNodes(tmp_path_factory.mktemp("ray")), free_port()
    nodes.environment |= {"RAY_metrics_report_interval_ms": "1000", "PYTHONPATH": str(ROOT)}
    try:
        options = [f"--port={nodes.port}", f"--metrics-export-port={port}", f"--temp-dir={nodes.folder}"]
        nodes.start("--head", "--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000", *options)
        until(lambda: "Ray runtime started" in (nodes.folder / "node0.log").read_text())
        yield Scraped(nodes, port)
    finally:
        nodes.close()


def test_the_metrics_endpoint_shows_a_run_while_it_lasts_and_has_the_manifests_counts_after_it(
    scraped: Scraped, tmp_path: Path
) -> None:
    output, config = tmp_path / "out", tmp_path / "job.yaml"
    prompts = write_prompts(tmp_path / "p.parquet", [*"abcde", ""], fails=["", "item", "", "", "", ""])
    config.write_text(
        f"name: clips\nmodel: {{family: testcard}}\noutput: {{path: {output}}}\nrun: {{price_per_gpu_hour: 2.5}}\n"
        f"dataset: {{path: {prompts}, columns: {{prompt: prompt, params.fail: fails}}}}\n"
        "sampling: {num_frames: 5, num_inference_steps: 2, params: {step_seconds: 1.0}}\n"
    )
    words = ["vidgen.cli", "generate", str(config), "--no-report", "--log", "json", "--json"]
    address = ["--address", f"127.0.0.1:{scraped.nodes.port}", "engine.batch_tokens=1"]
    with open(tmp_path / "log", "wb") as log, open(tmp_path / "said", "wb") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", *words, *address], env=scraped.nodes.environment, stdout=said, stderr=log
        )
    seen: set[str] = set()
    wanted = {metric.exported + ("_bucket" if metric.kind == HISTOGRAM else "") for metric in METRICS if metric != LOST}

    def has_shown_all() -> bool:
        seen.update(name for name in wanted if scraped.samples(name))
        return seen == wanted or driver.poll() is not None

    until(has_shown_all)
    assert seen == wanted, f"not exported: {wanted - seen}"
    assert driver.wait(300) == 3, (tmp_path / "log").read_text()

    assert json.loads((tmp_path / "said").read_text())["exit"] == 3, "the log is not in what a machine reads"
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any((line["run"], line["level"], line["attempt"]) == ("clips", "warning", 3) for line in logged)

    rows = [row for table in manifest.read(Objects(str(output))) for row in table.to_pylist()]
    counts = Counter(row["status"] for row in rows)
    assert counts == {"done": 4, "failed": 1, "rejected": 1}
    settled = "ray_vidgen_items_settled_total"
    until(lambda: scraped.sums(settled, "state")[("done",)] == counts["done"])
    assert scraped.sums(settled, "run", "output", "state", "error_class") == {
        ("clips", str(output), "done", ""): counts["done"],
        ("clips", str(output), "failed", "item"): counts["failed"],
    }
    assert scraped.sums("ray_vidgen_bytes_total")[()] == sum(row["bytes"] or 0 for row in rows)
    assert scraped.sums("ray_vidgen_frames_total")[()] == 5 * counts["done"]
    assert scraped.sums("ray_vidgen_stage_seconds_count", "stage") == dict.fromkeys(
        [("encode",), ("denoise",), ("decode",), ("write",)], counts["done"]
    )
    mirrored = json.loads((output / "progress.json").read_text())["metrics"]
    assert {row["state"]: row["value"] for row in mirrored["vidgen_items"] if row["value"]} == counts
