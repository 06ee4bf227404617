"""Metrics as Ray exports them to Prometheus. Beside `cluster.py` the only file that imports ray.

Refuses to know what the numbers mean: `vidgen.fleet.metrics` declares them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from vidgen.fleet.metrics import COUNTER, GAUGE, METRICS, RUN_LABELS, Metric


class RaySink:
    """Hands values to this process' Ray, which must be initialised; its node's agent serves them at the metrics port.
    What was recorded last is flushed by `ray.shutdown`. Of a process that has ended, counters stay there and gauges go
    within half a minute. Ray sums a histogram from the middle of its buckets, so `_sum` is near, not exact."""

    def __init__(self, run: str, output: str) -> None:
        self._run = dict(zip(RUN_LABELS, (run, output), strict=True))
        self._instruments = {metric.name: _instrument(metric) for metric in METRICS}

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        instrument, tags = self._instruments[metric.name], {**self._run, **labels}
        if isinstance(instrument, Counter):
            instrument.inc(value, tags)
        elif isinstance(instrument, Gauge):
            instrument.set(value, tags)
        else:
            instrument.observe(value, tags)


def _instrument(metric: Metric) -> Counter | Gauge | Histogram:
    keys = (*RUN_LABELS, *metric.labels)
    text = f"{metric.description} ({metric.unit})"
    if metric.kind == COUNTER:
        return Counter(metric.name, text, keys)
    if metric.kind == GAUGE:
        return Gauge(metric.name, text, keys)
    return Histogram(metric.name, text, list(metric.buckets), keys)
