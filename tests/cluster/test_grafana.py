"""The Grafana board asks for exactly the metrics that a run exports, and Prometheus finds the pods that serve them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest

from tests.cluster.deployment import CLUSTER
from tests.cluster.schema import documents, problems
from vidgen.fleet.metrics import HISTOGRAM, METRICS, RUN_LABELS

BOARD: dict[str, Any] = json.loads((CLUSTER / "grafana" / "vidgen.json").read_text())
SERIES = {
    f"{metric.exported}{ending}": metric
    for metric in METRICS
    for ending in (("_bucket", "_sum", "_count") if metric.kind == HISTOGRAM else ("",))
}
NAME = re.compile(r"\bray_\w+")
SELECTOR = re.compile(r"(ray_\w+)\{([^}]*)\}")
WITH_VALUES = re.compile(r"\$__(rate_interval|interval|range)")
"""What Grafana itself puts in."""
MATCHER = re.compile(r'\s*(\w+)(=~|!=|!~|=)"([^"]*)"\s*')


def queries() -> Iterator[tuple[str, str]]:
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_every_name_on_the_board_is_a_metric_and_every_metric_is_on_the_board() -> None:
    asked = {name for _, query in queries() for name in NAME.findall(query)}
    assert asked <= set(SERIES), "no metric has this name"
    assert {SERIES[name].name for name in asked} == {metric.name for metric in METRICS}


@pytest.mark.parametrize(("title", "query"), queries())
def test_a_query_is_well_formed_and_uses_labels_that_its_metrics_have(title: str, query: str) -> None:
    promql_parser.parse(WITH_VALUES.sub("1h", query))
    selected = SELECTOR.findall(query)
    assert [name for name, _ in selected] == NAME.findall(query), "a metric without a selector shows every run"
    known: set[str] = set()
    for name, matchers in selected:
        labels = {*RUN_LABELS, *SERIES[name].labels, *(["le"] if name.endswith("_bucket") else [])}
        known |= labels
        found = {}
        for matcher in matchers.split(","):
            parsed = MATCHER.fullmatch(matcher)
            assert parsed, matcher
            found[parsed[1]] = parsed[3]
        assert set(found) <= labels and (found["run"], found["output"]) == ("$run", "$output")
        counted = SERIES[name].exported.endswith("_total") or name.endswith("_bucket")
        assert counted == bool(re.search(rf"(rate|increase)\({name}\{{", query)), "counters are shown as rates"
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}
    assert grouped <= known, title


def test_the_board_has_the_structure_that_grafana_reads() -> None:
    assert BOARD["uid"] and BOARD["title"] and BOARD["schemaVersion"] >= 36
    identities = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(identities)) == len(identities)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        assert panel["type"] in ("stat", "timeseries") and panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}, "whoever imports it has another Prometheus"
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert set(variables) == {"datasource", *RUN_LABELS}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(BOARD)))
    assert used == set(variables)
    for name in RUN_LABELS:
        asked = variables[name]["query"]["query"]
        assert NAME.findall(asked)[0] in SERIES and asked.endswith(f", {name})")


def test_the_pod_monitor_selects_ray_pods_by_the_labels_and_the_port_that_kuberay_gives_them() -> None:
    (monitor,) = documents(CLUSTER / "grafana" / "podmonitor.yaml")
    assert problems(monitor, "PodMonitor") == []
    assert problems({**monitor, "spec": {**monitor["spec"], "podMetricsEndpoint": []}}, "PodMonitor") != []
    spec = monitor["spec"]
    assert spec["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]] == ["metrics"]
    (namespace,) = [
        found["metadata"]["name"]
        for found in documents(CLUSTER / "kuberay" / "access.yaml")
        if found["kind"] == "Namespace"
    ]
    assert monitor["metadata"]["namespace"] == namespace
