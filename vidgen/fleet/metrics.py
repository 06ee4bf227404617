"""What a run shows of itself as numbers: the metrics' names, declared once, and their values.

Gauges say what is true of the whole run, whoever made it so. Counters and histograms say what this driver saw: one that
resumes or takes over begins at zero, as a restarted process does in Prometheus, so that nothing is counted twice.
Refuses to know Ray: a sink is given (`vidgen.fleet.exporter`), and the values lie in OUTPUT/progress.json too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
RUN_LABELS = ("run", "output")
"""Labels that every metric has where it is exported: the run's name, and its output or that of its schedule."""
STAGE_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One name. `labels` come after those of the run."""

    name: str
    kind: str
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """As Prometheus has it: Ray puts `ray_` before every name, and `_total` behind a counter's. A histogram is
        this with `_bucket`, `_count` and `_sum`."""
        return f"ray_{self.name}" + ("_total" if self.kind == COUNTER else "")


ITEMS = Metric(
    "vidgen_items", GAUGE, "items", "Planned items and rejected rows: pending, done, failed, quarantined, rejected",
    ("state",),
)  # fmt: skip
IN_FLIGHT = Metric("vidgen_items_in_flight", GAUGE, "items", "Pending items that a replica has")
QUEUE = Metric("vidgen_queue_depth", GAUGE, "items", "Pending items that the driver has read and no replica has")
REPLICAS = Metric(
    "vidgen_replicas",
    GAUGE,
    "replicas",
    "Replicas: waiting, starting, idle, or the stage of what they make",
    ("state",),
)
SPENT = Metric("vidgen_gpu_seconds_spent", GAUGE, "seconds", "GPU-seconds spent generating, over the whole run")
COST = Metric("vidgen_cost", GAUGE, "currency of run.price_per_gpu_hour", "Those GPU-seconds at run.price_per_gpu_hour")
RATE = Metric("vidgen_items_per_hour", GAUGE, "items an hour", "Items settled, at the pace of the last minutes")
LEFT = Metric("vidgen_seconds_left", GAUGE, "seconds", "Time left at that pace")

SETTLED = Metric(
    "vidgen_items_settled", COUNTER, "items", "Items that became done, failed or quarantined", ("state", "error_class")
)
ATTEMPTS_FAILED = Metric("vidgen_attempts_failed", COUNTER, "attempts", "Attempts that failed", ("error_class",))
RETRIES = Metric("vidgen_retries", COUNTER, "attempts", "Attempts begun after an earlier one of the same item")
LOST = Metric("vidgen_replicas_lost", COUNTER, "replicas", "Replicas that were lost", ("cause",))
GPU_SECONDS = Metric(
    "vidgen_gpu_seconds", COUNTER, "seconds", "Seconds that GPUs (on CPU: replicas) were busy, idle, or starting",
    ("state",),
)  # fmt: skip
FRAMES = Metric("vidgen_frames", COUNTER, "frames", "Frames of finished videos")
BYTES = Metric("vidgen_bytes", COUNTER, "bytes", "Bytes of finished videos")
STAGE_SECONDS = Metric(
    "vidgen_stage_seconds", HISTOGRAM, "seconds",
    "Seconds of each stage of a finished item; encode and denoise are those of its whole batch",
    ("stage",), STAGE_BUCKETS,
)  # fmt: skip

METRICS = (
    *(ITEMS, IN_FLIGHT, QUEUE, REPLICAS, SPENT, COST, RATE, LEFT),
    *(SETTLED, ATTEMPTS_FAILED, RETRIES, LOST, GPU_SECONDS, FRAMES, BYTES, STAGE_SECONDS),
)


class Sink(Protocol):
    """Where values go beside progress.json."""

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Sets a gauge, adds to a counter, observes in a histogram."""


class NoSink:
    """For a driver without a cluster."""

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        pass


@dataclass(slots=True)
class Value:
    """One series. `count` is how often a histogram observed; `value` then their sum."""

    labels: dict[str, str]
    value: float = 0.0
    count: int = 0


@dataclass(slots=True)
class Meter:
    """The values of a run's metrics, handed to the sink as they change."""

    sink: Sink = field(default_factory=NoSink)
    _series: dict[tuple[str, ...], tuple[Metric, Value]] = field(default_factory=dict)

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Sets, adds or observes, as the metric's kind is; adding nothing is nothing."""
        assert set(labels) == set(metric.labels), f"{metric.name} has labels {metric.labels}, given {sorted(labels)}"
        if metric.kind == COUNTER and value <= 0:
            return
        key = (metric.name, *(labels[name] for name in metric.labels))
        series = self._series.setdefault(key, (metric, Value(labels)))[1]
        series.value = value if metric.kind == GAUGE else series.value + value
        series.count += 1
        self.sink.record(metric, value, labels)

    def value(self, metric: Metric, **labels: str) -> float:
        """What a series stands at; 0 for one that was never recorded."""
        found = self._series.get((metric.name, *(labels[name] for name in metric.labels)))
        return found[1].value if found else 0.0

    def values(self) -> dict[str, list[dict[str, Any]]]:
        """All series by name, for progress.json: labels and `value`; of histograms `sum` and `count`."""
        found: dict[str, list[dict[str, Any]]] = {}
        for metric, series in self._series.values():
            value = round(series.value, 3)
            numbers = {"sum": value, "count": series.count} if metric.kind == HISTOGRAM else {"value": value}
            found.setdefault(metric.name, []).append({**series.labels, **numbers})
        return found
