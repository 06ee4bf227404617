"""What the fleet did, from the records: gaps, the tail, cost; and a page of it that stays small."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen.report import gallery, history, timeline
from vidgen.report.history import BINS
from vidgen.report.summary import Summary
from vidgen.store import ledger
from vidgen.store.objects import Objects
from vidgen.types import Record

T0 = 1_760_000_000.0


def record(ordinal: int, replica: str, begin: float, denoise: float = 8.0, **changes: object) -> Record:
    """Encode 1 s, denoise, decode 1 s, write 1 s, from `begin` seconds after T0."""
    start, end = T0 + begin, T0 + begin + denoise + 2
    values = {
        "encode_s": 1.0,
        "denoise_s": denoise,
        "decode_s": 1.0,
        "started_at": start,
        "write_started_at": end,
        "created_at": end + 1,
        "replica": replica,
        "node": "n0",
        "attempt": 1,
        "generation": 0,
    }
    return Record(f"{ordinal:032x}", ordinal, "done", **{**values, **changes})  # type: ignore[arg-type]


def past(*records: Record) -> history.History:
    columns = {name: [getattr(one, name) for one in records] for name in ledger.SCHEMA.names}
    table = pa.table(columns, schema=ledger.SCHEMA)
    found = history.of(lambda: iter([table.slice(0, 1), table.slice(1)]))
    assert found is not None
    return found


def seconds(found: history.History, lane: int, stage: int) -> float:
    return float(found.lanes[lane].stages[stage].sum() * found.axis.bin_seconds)


def test_each_stage_takes_its_seconds_wherever_the_bins_fall() -> None:
    found = past(record(0, "r0", 0), record(1, "r0", 10.7, denoise=31.3), record(2, "r1", 3))
    assert [lane.name for lane in found.lanes] == ["r0", "r1"]
    assert [lane.items for lane in found.lanes] == [2, 1]
    assert [seconds(found, 0, stage) for stage in range(4)] == pytest.approx([2, 39.3, 2, 2], abs=1e-3)
    assert [seconds(found, 1, stage) for stage in range(4)] == pytest.approx([1, 8, 1, 1], abs=1e-3)
    assert found.axis.seconds == pytest.approx(45, abs=0.01)


def test_the_items_of_a_batch_are_one_stretch_of_denoising_and_a_decode_each() -> None:
    batch = [record(k, "r0", 0, batch=3, write_started_at=T0 + 10 + k, created_at=T0 + 11 + k) for k in range(3)]
    found = past(record(9, "r1", 0), *batch)
    assert [seconds(found, 0, stage) for stage in range(3)] == pytest.approx([1, 8, 3], abs=1e-3)


def test_a_gap_between_items_is_seen_and_a_night_between_two_drivers_is_cut_out() -> None:
    night = 10 * 3600
    found = past(record(0, "r0", 0), record(1, "r0", 31), record(2, "r0", night), record(3, "r0", night + 11))
    assert len(found.axis.segments) == 2
    assert found.axis.seconds == pytest.approx(42 + 22, abs=5)
    busy = found.lanes[0].busy
    gap = busy[int(15 / found.axis.bin_seconds) : int(28 / found.axis.bin_seconds)]
    assert not gap.any() and busy.max() == pytest.approx(1.0)
    assert busy.sum() * found.axis.bin_seconds == pytest.approx(40, abs=5)


def test_the_tail_is_how_long_the_last_items_kept_most_replicas_idle() -> None:
    even = [record(k, f"r{k}", 0, denoise=98) for k in range(10)]
    assert past(*even).tail < 2
    late = past(*even[:9], record(9, "r9", 0, denoise=298))
    assert late.tail == pytest.approx(201, abs=2)
    assert late.tail_idle == pytest.approx(9 * 201, rel=0.02)


def test_failed_items_and_further_attempts_are_counted_where_they_happened() -> None:
    lost = Record(f"{1:032x}", 1, "failed", 0, 3, error_class="item", error="e", created_at=T0 + 20)
    found = past(record(0, "r0", 0), lost, record(2, "r0", 11, attempt=2))
    assert (found.done.sum(), found.failed.sum(), found.retries) == (2, 1, 3)
    assert int(np.flatnonzero(found.failed)[0]) == pytest.approx(20 / 22 * BINS, abs=2)


def test_nothing_done_has_no_history() -> None:
    assert history.of(lambda: iter([])) is None


@pytest.mark.parametrize(("items", "replicas"), [(10_000, 64), (10_000, 1000), (1, 1)])
def test_the_page_stays_small_however_many_items_and_replicas_there_are(
    items: int, replicas: int, tmp_path: Path
) -> None:
    records = [record(k, f"r{k % replicas}", 11.0 * (k // replicas) + 0.01 * (k % replicas)) for k in range(items)]
    page = write(tmp_path, past(*records))
    assert len(page) < 1_000_000
    assert page.count('class="share"') == min(replicas, 63 if replicas == 1000 else replicas)
    assert f"{replicas:,} of them, in groups" in page or replicas <= timeline.MOST_LANES


def test_what_a_run_is_called_and_what_its_errors_say_never_becomes_markup(tmp_path: Path) -> None:
    summary = Summary()
    summary.add({"status": "failed", "error_class": "item", "error": "<script>alert(1)</script>"})
    found = past(record(0, "<b>r0</b>", 0, node="<i>n</i>"))
    page = write(tmp_path, found, title="<img src=x>", summary=summary)
    for evil in ("<script", "<b>r0", "<i>n", "<img"):
        assert evil not in page
    assert "&lt;script&gt;" in page


def test_the_page_asks_for_nothing_from_a_network(tmp_path: Path) -> None:
    page = write(tmp_path, past(record(0, "r0", 0)))
    assert not re.search(r"(https?:)?//[a-z]|<script|@import", page.replace(str(tmp_path), ""))
    for name in re.findall(r'(?:href|src)="([^"]+)"', page):
        file = name.split("?")[0]
        assert (
            name.startswith("data:") or file in ("gallery.css", "index.html") or (tmp_path / "report" / file).exists()
        )


def test_cost_and_gpu_time_are_what_the_drivers_spent(tmp_path: Path) -> None:
    priced = write(tmp_path, past(record(0, "r0", 0)), cost=timeline.Cost(7200.0, 5.0))
    assert "<dd>5.00<small>5 a video" in priced and "<dd>2<small>hours" in priced
    assert "<dt>cost" not in write(tmp_path, past(record(0, "r0", 0)), cost=timeline.Cost(7200.0, None))


def test_the_report_of_a_run_names_the_fleets_page_and_that_of_an_unfinished_one_too(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = config_for(
        write_prompts(tmp_path / "p.parquet", 20), output, sampling__params__step_seconds=0.05,
        run__price_per_gpu_hour=3600,
    )  # fmt: skip
    first, _ = drive(config, interrupt_at=3)
    assert first.code == 130
    for driven in (False, True):
        if driven:
            drive(config)
        index = Path(gallery.report(output))
        assert 'href="fleet.html"' in index.read_text()
        page = (index.parent / "fleet.html").read_text()
        assert "r0" in page and "r1" in page and "cost" in page
        assert (index.parent / "fleet.css").is_file()


def write(
    folder: Path,
    found: history.History,
    title: str = "clips",
    summary: Summary | None = None,
    cost: timeline.Cost | None = None,
) -> str:
    if summary is None:
        summary = Summary()
        summary.add({"status": "done", "bytes": 1000})
    path = timeline.write(Objects(str(folder)), title, found, summary, cost or timeline.Cost(3600.0, None))
    return (folder / path).read_text()
