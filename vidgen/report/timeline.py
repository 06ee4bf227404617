"""The report's page of the fleet, `report/fleet.html`: who did what when, pace, tail, cost, failures.

Static SVG, drawn here as paths: a path a stage and shade of a lane, neighbouring bins that look alike merged, lanes
merged in groups where there are many; so the page's size does not follow the number of items. Lines and bars stretch
with the page, text does not: it is HTML. Refuses to know where the numbers come from (`vidgen.report.history`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import resources

import numpy as np

from vidgen import faults
from vidgen.report.history import ENGINE, Axis, History, Lane
from vidgen.report.page import render
from vidgen.report.summary import Summary
from vidgen.report.wording import duration, size
from vidgen.store.objects import Objects

MOST_LANES = 64
SHADES = 4
"""Shades of a bin by how much of it was busy."""
BARS = (24, 40, 60, 120)
"""How many bars the throughput may have: divisors of the bins, more where there are more items."""
MOST_FAILURES = 20
PAGE = "report/fleet.html"


@dataclass(frozen=True, slots=True)
class Cost:
    """GPU-seconds spent over the run, failed attempts included, and what they cost; None without a price."""

    gpu_seconds: float
    total: float | None


def write(objects: Objects, title: str, history: History, summary: Summary, cost: Cost) -> str:
    """Writes the page and its style; returns its path."""
    package = resources.files("vidgen.report")
    with faults.around("report fleet style"):
        objects.put("report/fleet.css", (package / "fleet.css").read_bytes())
    axis, lanes = history.axis, _merged(history.lanes)
    settled = float((history.done + history.failed).sum())
    bars = max(count for count in BARS if count <= max(BARS[0], settled / 5))
    done, failed = (values.reshape(bars, -1).sum(1) for values in (history.done, history.failed))
    highest = max(1.0, float((done + failed).max()))
    failures = summary.failures()
    page = render(
        "fleet.html",
        title=title,
        output=objects.url,
        stamp=f"{time.time():.0f}",
        zone=time.strftime("%Z"),
        tiles=_tiles(history, summary, cost),
        bins=axis.bins,
        lanes=[_drawn(lane) for lane in lanes],
        grouped=len(history.lanes) if len(lanes) < len(history.lanes) else 0,
        ticks=_ticks(axis),
        cuts=_cuts(axis),
        busy=_area(history.busy),
        tail_left=100 * (1 - history.tail / axis.seconds),
        tail_text=duration(history.tail),
        bars=bars,
        done=_bars(done, highest),
        failed=_bars(failed, highest, below=done),
        pace_text=f"{highest * 3600 / (axis.seconds / bars):,.0f} items/h",
        failures=[
            {"count": f"{f.count:,}", "status": f.status, "signature": f.signature} for f in failures[:MOST_FAILURES]
        ],
        kinds=len(failures),
    )
    with faults.around("report fleet page"):
        objects.put(PAGE, page.encode())
    return PAGE


def _tiles(history: History, summary: Summary, cost: Cost) -> list[tuple[str, str, str]]:
    """(label, value, unit or remark)"""
    done, replicas = summary.statuses["done"], len(history.lanes)
    seconds = history.axis.seconds
    sessions = len(history.axis.segments)
    paused = f"in {sessions} stretches" if sessions > 1 else ""
    tiles = [("time", duration(seconds), paused), ("replicas", f"{replicas:,}", "")]
    tiles.append(("busy", f"{100 * float(history.busy.mean()):.0f}", "% of their time"))
    tiles.append(("pace", f"{done / seconds * 3600:,.0f}", "videos an hour"))
    tiles.append(("tail", duration(history.tail), f"{duration(history.tail_idle)} of replicas idle"))
    tiles.append(("GPU time", f"{cost.gpu_seconds / 3600:,.3g}", "hours"))
    if cost.total is not None:
        each = f"{cost.total / done:,.3g} a video" if done else ""
        tiles.append(("cost", f"{cost.total:,.2f}", each))
    tiles.append(("written", *size(summary.bytes).split(" ", 1)))  # type: ignore[arg-type]
    if history.retries:
        tiles.append(("tried again", f"{history.retries:,}", "times"))
    return tiles


# ---------------------------------------------------------------- lanes


def _merged(lanes: list[Lane]) -> list[Lane]:
    """At most MOST_LANES of them: neighbours as one, with the mean of their shares."""
    each = -(-len(lanes) // MOST_LANES)
    if each == 1:
        return lanes
    groups = [lanes[first : first + each] for first in range(0, len(lanes), each)]
    return [
        Lane(
            f"{group[0].name} … {group[-1].name}" if len(group) > 1 else group[0].name,
            ", ".join(sorted({lane.node for lane in group})[:3]),
            sum(lane.items for lane in group),
            np.mean([lane.stages for lane in group], axis=0),
        )
        for group in groups
    ]


def _drawn(lane: Lane) -> dict[str, object]:
    """A lane as the template takes it. Each bin has the colour of the stage that took most of it."""
    stages, busy = lane.stages[:3], lane.busy
    shades = np.ceil(busy * SHADES - 1e-3).clip(0, SHADES).astype(int)
    looks = np.where(shades > 0, stages.argmax(0) * SHADES + shades, 0)
    writing = lane.stages[3] > 0.05
    return {
        "name": lane.name,
        "about": f"{lane.name} on {lane.node}: {lane.items:,} items, busy {100 * float(busy.mean()):.0f} %",
        "items": f"{lane.items:,}",
        "share": f"{100 * float(busy.mean()):.0f} %",
        "paths": [
            {"stage": ENGINE[(look - 1) // SHADES], "shade": (look - 1) % SHADES + 1, "d": _runs(looks == look, 0, 8)}
            for look in np.unique(looks).tolist()
            if look
        ],
        "writing": _runs(writing, 8.8, 1.2),
    }


def _runs(mask: np.ndarray, top: float, height: float) -> str:
    """A rectangle for each unbroken run of True."""
    turns = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    pairs = zip(turns[::2].tolist(), turns[1::2].tolist(), strict=True)
    return "".join(f"M{begin} {top:g}h{end - begin}v{height:g}h{begin - end}z" for begin, end in pairs)


# ---------------------------------------------------------------- curves, bars, ticks


def _area(shares: np.ndarray) -> str:
    """The area below a line of shares, in a box of 100 units height."""
    heights = np.round(100 * (1 - shares), 1).tolist()
    steps = "".join(f"V{height:g}h1" for height in heights)
    return f"M0 100{steps}V100z"


def _bars(values: np.ndarray, highest: float, below: np.ndarray | None = None) -> str:
    """Bars of one unit width, in a box of 100 units height, on top of those `below`."""
    feet = np.zeros_like(values) if below is None else below
    tops = np.round(100 * (1 - (feet + values) / highest), 1)
    heights = np.round(100 * values / highest, 1)
    drawn = enumerate(zip(tops.tolist(), heights.tolist(), strict=True))
    return "".join(f"M{x + 0.08:g} {top:g}h.84v{height:g}h-.84z" for x, (top, height) in drawn if height)


def _ticks(axis: Axis) -> list[dict[str, object]]:
    """Clock times at round intervals, about six of them, none too near the end for its label."""
    choices = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400]
    step = next(
        (choice for choice in choices if axis.seconds / choice <= 6), 86400 * max(1, int(axis.seconds / 518400))
    )
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 43200 else "%d %b"
    offset = time.localtime(axis.segments[0][0]).tm_gmtoff
    ticks, before = [], -100.0
    for begin, end in axis.segments:
        moment = -(-(begin + offset) // step) * step - offset
        while moment <= end:
            left = 100 * float(axis.place(np.array([moment]))[0]) / axis.bins
            if left - before >= 11 and left <= 96:
                ticks.append({"left": round(left, 2), "text": time.strftime(form, time.localtime(moment))})
                before = left
            moment += step
    return ticks


def _cuts(axis: Axis) -> list[dict[str, object]]:
    """Where gaps were cut out, and how long they were."""
    pairs = zip(axis.segments, axis.segments[1:], strict=False)
    return [
        {
            "left": round(100 * float(axis.place(np.array([after[0]]))[0]) / axis.bins, 2),
            "text": f"{duration(after[0] - before[1])} without work",
        }
        for before, after in pairs
    ]
