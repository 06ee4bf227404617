"""`vidgen report`: one static HTML gallery below the output's `report/`, opened from a folder or a bucket alike.

Rows go into script files of a thousand (a page opened from a folder may not fetch anything else): `rows/` holds what
the grid shows and searches, `more/` the rest of each row, read when its video is opened. Posters are made once and
kept. Refuses to know how rows are joined from plan and commits (`vidgen.manifest`), and shows what that says.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from vidgen import faults, manifest, media
from vidgen.errors import GenerationError
from vidgen.plan.files import require_plan, total_items
from vidgen.report import history, status, timeline
from vidgen.report.page import render
from vidgen.report.summary import STATUSES, Summary, signature
from vidgen.report.wording import duration
from vidgen.store import state as states
from vidgen.store.objects import Objects

CHUNK = 1000
"""Rows a script file."""
MOST_ROWS = 100_000
"""Rows the gallery shows, in the order of the plan; failures beyond them are shown too, up to as many again."""
NEW_POSTERS = 1_000
"""Posters made by one report; a video without one shows its own middle frame as soon as it is in view."""
MOST_FAILURES = 50
"""Kinds of failure listed, the most frequent first."""
LONGEST = 4_000
"""Characters of one value that the page holds."""

GRID = (
    *("item_id", "row_id", "status", "prompt", "seed", "width", "height", "frames", "fps", "video", "poster"),
    *("failure", "error", "seconds", "created_at"),
)
"""What `rows/` holds of a row, in this order; `status` is an index into STATUSES, `failure` into the kinds."""


@dataclass(slots=True)
class Gallery:
    """What was written: path of the page below the output, rows shown, and posters made, kept, and impossible."""

    page: str
    rows: int = 0
    chunks: int = 0
    made: int = 0
    kept: int = 0
    impossible: int = 0
    summary: Summary = field(default_factory=Summary)


def report(
    output: str,
    *,
    posters: int = NEW_POSTERS,
    most: int = MOST_ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Writes `report/index.html` of a finished or unfinished run; returns its path or URL. PlanError if there is no
    run. `progress(done, total)` counts posters."""
    objects = Objects(output)
    plans = require_plan(objects)
    finished = objects.exists(manifest.SUCCESS)
    if finished:
        tables = manifest.read(objects)
    else:
        tables = manifest.rows(objects, plans, states.load(objects, total_items(plans)))
    title = str(plans[0].config.get("name") or PurePosixPath(output).name)
    past = history.read(objects, finished)
    gallery = write_gallery(
        tables, objects, title=title, posters=posters, most=most, progress=progress, fleet=past is not None
    )
    if past is not None:
        spent = status.gpu_seconds(objects)
        cost = timeline.Cost(spent, status.cost_of(status.progress_of(objects), plans[-1], spent))
        timeline.write(objects, title, past, gallery.summary, cost)
    return f"{output.rstrip('/')}/{gallery.page}"


def write_gallery(
    tables: Iterable[pa.Table],
    objects: Objects,
    *,
    title: str,
    posters: int = NEW_POSTERS,
    most: int = MOST_ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    fleet: bool = False,
) -> Gallery:
    """Writes the gallery of manifest-shaped tables below `report/` of `objects`, the page itself last. `posters`: most
    new ones to make; `most`: most rows to show; `fleet`: whether there is a page of the fleet to name."""
    gallery = Gallery("report/index.html")
    sheets = _Sheets(objects, posters)
    shown = failures = 0
    for row in _rows(tables):
        gallery.summary.add(row)
        failed = row["status"] not in ("done", "pending")
        if shown < most or (failed and failures < most):
            shown += 1
            failures += failed
            sheets.add(row, gallery.summary)
    sheets.flush()
    gallery.rows, gallery.chunks, gallery.kept = sheets.rows, sheets.chunks, sheets.kept
    gallery.made = _make_posters(objects, sheets.wanted, progress)
    gallery.impossible = len(sheets.wanted) - gallery.made
    _write_page(objects, gallery, title, fleet)
    return gallery


def _rows(tables: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    for table in tables:
        binary = [f.name for f in table.schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
        for batch in table.drop_columns(binary).to_batches(max_chunksize=CHUNK):
            columns = [_cells(column) for column in batch.columns]
            for row in zip(*columns, strict=True):
                yield dict(zip(batch.schema.names, row, strict=True))


def _cells(column: pa.Array) -> list[Any]:
    """A column's values; of cells that Python has no value for (years beyond 9999, nanoseconds, unknown time zones,
    text that is not UTF-8) what Arrow writes for them, or what they are."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        return [_cell(cell) for cell in column]


def _cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        pass
    try:
        text: str = cell.cast(pa.string()).as_py()
        return text
    except (ValueError, pa.ArrowException):
        return f"({cell.type} that cannot be shown)"


class _Sheets:
    """The script files of rows, a thousand each, and the list of posters that they want."""

    def __init__(self, objects: Objects, posters: int) -> None:
        self._objects = objects
        self._new = posters
        self._have = {entry.path for entry in objects.list("report/posters")}
        self._grid: list[list[Any]] = []
        self._more: list[dict[str, Any]] = []
        self.wanted: list[tuple[str, str]] = []
        self.rows = self.chunks = self.kept = 0

    def add(self, row: Mapping[str, Any], summary: Summary) -> None:
        status = row["status"]
        failure = -1
        if status not in ("done", "pending"):
            failure = summary.number(signature(row.get("error_class") or status, row.get("error") or ""))
        seconds = sum(row.get(f"{stage}_s") or 0.0 for stage in ("encode", "denoise", "decode", "write"))
        values = {
            **{name: row.get(name) for name in ("item_id", "row_id", "seed", "width", "height", "fps", "video")},
            "prompt": (row.get("prompt") or "")[:LONGEST],
            "frames": row.get("num_frames"),
            "status": STATUSES.index(status),
            "poster": int(self._poster(row)),
            "failure": failure,
            "error": (row.get("error") or "")[:200],
            "seconds": round(seconds, 3),
            "created_at": round(row.get("created_at") or 0.0, 3),
        }
        self._grid.append([_plain(values[name]) for name in GRID])
        self._more.append({name: _plain(value) for name, value in row.items() if value is not None})
        if len(self._grid) == CHUNK:
            self.flush()

    def flush(self) -> None:
        """Writes what is gathered, if anything."""
        if not self._grid:
            return
        for folder, call, rows in (("rows", "rows", self._grid), ("more", "more", self._more)):
            text = ",\n".join(_json(row) for row in rows)
            script = f"vidgenReport.{call}({self.chunks}, [\n{text}\n]);\n"
            with faults.around("report rows"):
                self._objects.put(f"report/{folder}/{self.chunks:05d}.js", script.encode())
        self.rows += len(self._grid)
        self.chunks += 1
        self._grid, self._more = [], []

    def _poster(self, row: Mapping[str, Any]) -> bool:
        if row["status"] != "done" or not row.get("video"):
            return False
        path = poster_path(row["video"])
        if path in self._have:
            self.kept += 1
            return True
        if len(self.wanted) < self._new:
            self.wanted.append((row["video"], path))
            return True
        return False


def poster_path(video: str) -> str:
    """Where the poster of a video lies: named as the video, whose name holds its hash, so it never goes stale."""
    return f"report/posters/{PurePosixPath(video).stem}.jpg"


def _make_posters(objects: Objects, wanted: list[tuple[str, str]], progress: Callable[[int, int], None]) -> int:
    """Makes posters in parallel, a process of ffmpeg each; returns how many there now are. A video that is gone or
    damaged has none: the page says so where it would be."""

    def one(pair: tuple[str, str]) -> bool:
        video, path = pair
        try:
            if objects.local:
                picture = media.poster(objects.path(video))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    copy = Path(folder) / PurePosixPath(video).name
                    copy.write_bytes(objects.read(video))
                    picture = media.poster(copy)
            with faults.around("poster"):
                objects.put(path, picture)
            return True
        except (FileNotFoundError, GenerationError):
            return False

    made = 0
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for count, done in enumerate(pool.map(one, wanted), start=1):
            made += done
            progress(count, len(wanted))
    return made


def _write_page(objects: Objects, gallery: Gallery, title: str, fleet: bool) -> None:
    summary, package = gallery.summary, resources.files("vidgen.report")
    for name in ("gallery.css", "gallery.js"):
        with faults.around("report style"):
            objects.put(f"report/{name}", (package / name).read_bytes())
    failures = summary.failures()
    strip = [
        {"status": status, "count": summary.statuses[status], "count_text": f"{summary.statuses[status]:,}"}
        for status in STATUSES
        if summary.statuses[status]
    ]
    meta = {
        "columns": GRID,
        "statuses": STATUSES,
        "chunk": CHUNK,
        "chunks": gallery.chunks,
        "rows": gallery.rows,
        "total": summary.items,
        "aspect": _aspect(summary),
        "failures": {failure.number: failure.signature[:120] for failure in failures},
        "retry": f"vidgen retry {shlex.quote(objects.url)} --where",
        "stamp": f"{time.time():.0f}",
    }
    page = render(
        "index.html",
        title=title,
        output=objects.url,
        fleet=PurePosixPath(timeline.PAGE).name if fleet else "",
        when=time.strftime("%Y-%m-%d %H:%M %Z"),
        tiles=_tiles(summary),
        strip=strip,
        strip_text=", ".join(f"{part['count_text']} {part['status']}" for part in strip),
        stages=_stages(summary),
        facts=_facts(summary),
        failures=[
            {name: getattr(failure, name) for name in ("number", "status", "error_class", "row_id", "item_id")}
            | {"count_text": f"{failure.count:,}", "signature": failure.signature}
            | {"error": failure.error[:300], "prompt": failure.prompt[:120]}
            for failure in failures[:MOST_FAILURES]
        ],
        more_failures=len(failures) if len(failures) > MOST_FAILURES else 0,
        total_text=f"{summary.items:,}",
        meta=meta,
        stamp=meta["stamp"],
    )
    with faults.around("report page"):
        objects.put(gallery.page, page.encode())


def _tiles(summary: Summary) -> list[dict[str, str]]:
    done = summary.statuses["done"]
    tiles = [{"label": "videos", "value": f"{done:,}", "unit": f"of {summary.items:,}" if summary.items > done else ""}]
    if not done:
        return tiles
    span = summary.last_at - summary.first_at
    size, unit = _size(summary.bytes)
    tiles.append({"label": "footage", "value": duration(summary.video_seconds), "unit": ""})
    tiles.append({"label": "frames", "value": f"{summary.frames:,}", "unit": ""})
    tiles.append({"label": "size", "value": size, "unit": unit})
    if done > 1 and span > 0:
        each = span / (done - 1)
        value, unit = (f"{each:.2g}", "s each") if each >= 1 else (f"{1 / each:.3g}", "a second")
        tiles.append({"label": "pace", "value": value, "unit": unit})
    return tiles


def _stages(summary: Summary) -> list[dict[str, str]]:
    total = sum(spread.total for spread in summary.stages.values())
    return [
        {
            "name": name,
            "share": f"{100 * spread.total / total:.1f}",
            **{key: _seconds(getattr(spread, key)) for key in ("mean", "least", "most")},
            "total": duration(spread.total) if spread.total >= 1 else _seconds(spread.total),
        }
        for name, spread in summary.stages.items()
        if spread.count and total > 0
    ]


def _facts(summary: Summary) -> list[str]:
    facts = [f"{size}: {count:,}" for size, count in summary.sizes.most_common(3)]
    if len(summary.sizes) > 3:
        facts.append(f"{len(summary.sizes) - 3} more sizes")
    facts += [model for model, _ in summary.models.most_common(3)]
    nodes = len(summary.nodes)
    facts.append(f"{nodes} nodes" if nodes != 1 else f"on {next(iter(summary.nodes))}")
    return facts if summary.statuses["done"] else []


def _aspect(summary: Summary) -> float:
    """Height over width of the commonest size, 0.75 where nothing is done."""
    for size, _ in summary.sizes.most_common(1):
        width, height, _frames = (int(value) for value in size.split("×"))
        return round(height / width, 4)
    return 0.75


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.3f}"


def _size(count: float) -> tuple[str, str]:
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return (f"{count:,.0f}" if unit == "bytes" or count >= 100 else f"{count:.1f}"), unit
        count /= 1000
    raise AssertionError("unreachable")


def _plain(value: Any) -> Any:
    """A value as JavaScript can hold it: whole numbers beyond 2**53 and what is not JSON as text, long text cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) <= 2**53 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value[:LONGEST]
    if isinstance(value, (list, dict)):
        return json.dumps(value, default=str)[:LONGEST]
    return str(value)[:LONGEST]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
