"""A whole run whose inputs and outputs all lie on S3: killed, resumed, repaired, verified and shown, over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.fleet.inline import config_for, drive, write_prompts
from tests.store.proxy import Fault, Proxy
from vidgen import manifest
from vidgen.checkpoint.fetch import fetched
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.report import gallery, repair
from vidgen.report.status import read as status
from vidgen.report.verify import verify
from vidgen.store import commits, ledger
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
DRIVE = """
import json, sys
from tests.fleet.inline import config_for, drive
path, output, overrides, columns = json.loads(sys.argv[1])
config = config_for(path, output, **overrides)
config.dataset.columns.update(columns)
drive(config)
"""


def killed_after(commits_seen: int, objects: Objects, *job: object) -> set[str]:
    """Drives a job in another process until so many items are committed, and kills it; returns what was committed."""
    environment = {**os.environ, "FSSPEC_S3": json.dumps(fsspec.config.conf["s3"]), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", DRIVE, json.dumps(job)], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 60
        while len(list(commits.list_commits(objects, 0))) < commits_seen:
            assert process.poll() is None and time.monotonic() < deadline, "it should have committed something"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return set(commits.list_commits(objects, 0))


def test_plan_run_kill_resume_retry_gc_verify_and_report(s3: str, tmp_path: Path) -> None:
    objects, source = Objects(s3), f"{s3.rsplit('/', 1)[0]}/input"
    local = write_prompts(tmp_path / "p.parquet", 12, fails=["item" if i == 5 else "" for i in range(12)])
    fsspec.filesystem("s3").put_file(local, f"{source}/p.parquet")
    job = (f"{source}/p.parquet", s3, {"sampling__params__step_seconds": 0.05}, {"params.fail": "fails"})
    config = config_for(job[0], s3, **job[2])
    config.dataset.columns.update(job[3])

    committed = killed_after(3, objects, *job)
    assert 0 < len(committed) < 12 and not objects.exists(manifest.SUCCESS)
    outcome, fleet = drive(config)
    assert outcome.code == 3 and outcome.counts == {"done": 11, "failed": 1, "quarantined": 0, "pending": 0}
    assert {work.item.item_id for _, works in fleet.sent for work in works}.isdisjoint(committed)
    assert verify(s3).ok

    victim = next(objects.list("data")).path
    objects.delete(victim)
    assert not verify(s3).ok
    assert repair.retry(s3, missing=True).items == 1
    assert repair.retry(s3).items == 1
    assert status(s3).pending == 2
    assert drive(config)[0].code == 3
    assert objects.exists(victim)

    orphan = commits.video_path("f" * 32, "0" * 64, "mp4")
    twin = victim.rsplit("-", 1)[0] + "-000000000000.mp4"
    for path in (orphan, twin):
        objects.put(path, b"not a video")
    assert verify(s3).orphans >= 2
    assert repair.collect(s3, older_than=24 * 3600).removed == 0
    assert repair.collect(s3, older_than=0).removed >= 1
    assert objects.exists(orphan) and not objects.exists(twin), "an item that nobody settled keeps its young object"
    objects.delete(orphan)
    assert verify(s3, strict=True).ok, verify(s3, strict=True).problems

    page = gallery.report(s3)
    assert page.startswith(s3) and b"prompt number 7" in b"".join(
        objects.read(entry.path) for entry in objects.list("report") if entry.path.endswith((".html", ".js", ".json"))
    )
    assert sum(table.num_rows for table in ledger.read_tables(objects)) >= 12


def test_a_run_behind_a_failing_store_loses_nothing(s3_at: object, proxy: Proxy, hasty: None, tmp_path: Path) -> None:
    output = s3_at(proxy.url)  # type: ignore[operator]
    for number in range(12):
        kind = ("answer", "reset-before", "reset-after", "lost-answer")[number % 4]
        proxy.spoil(Fault(kind, method="PUT", path=("data/", "commits/", "epochs/")[number % 3], status=503))
        proxy.spoil(Fault(("answer", "reset-before", "truncate")[number % 3], method="GET", status=500))
    config = config_for(write_prompts(tmp_path / "p.parquet", 8), output)
    outcome, _ = drive(config)
    assert (outcome.code, outcome.counts["done"]) == (0, 8)
    assert sum(fault.times for fault in proxy.faults) < 12, "the faults happened"
    verdict = verify(output, strict=True)
    assert verdict.ok and verdict.checked == 8, verdict.problems


def test_a_store_that_fails_for_good_charges_no_item(
    s3_at: object, proxy: Proxy, hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidgen.fleet.dispatch import Rules

    monkeypatch.setattr("vidgen.fleet.judgement.INFRASTRUCTURE_BACKOFF", 0.01)
    output = s3_at(proxy.url)  # type: ignore[operator]
    proxy.spoil(Fault("answer", method="PUT", path="/data/", times=10_000, status=403, code="AccessDenied"))
    config = config_for(write_prompts(tmp_path / "p.parquet", 6), output)
    outcome, _ = drive(config, rules=Rules(breaker_failures=8))
    assert outcome.code == 4 and "permission is missing" in outcome.reason
    assert outcome.counts["pending"] == 6
    assert not list(commits.read_attempts(Objects(output)))
    proxy.faults.clear()
    assert drive(config)[0].code == 0


def test_dataset_and_conditioning_images_are_read_from_s3(s3: str, tmp_path: Path) -> None:
    folder = f"{s3.rsplit('/', 1)[0]}/images"
    fs = fsspec.filesystem("s3")
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 20, 200)).save(tmp_path / "p.png")
        fs.put_file(str(tmp_path / "p.png"), f"{folder}/pictures/{number}.png")
    table = pa.table({"prompt": ["a", "b", "c", "d"], "image": [f"pictures/{n}.png" for n in range(4)]})
    pq.write_table(table, tmp_path / "p.parquet")
    fs.put_file(str(tmp_path / "p.parquet"), f"{folder}/p.parquet")
    config = config_for(f"{folder}/p.parquet", s3, model__task="i2v")
    config.dataset.columns["image"] = "image"
    outcome, _ = drive(config)
    assert (outcome.code, outcome.counts["done"]) == (0, 3)
    rejected = [row for one in manifest.read(Objects(s3)) for row in one.to_pylist() if row["status"] == "rejected"]
    assert len(rejected) == 1 and "pictures/3.png" in rejected[0]["error"]
    assert verify(s3).ok


def test_a_checkpoint_on_s3_is_the_one_it_was_copied_from(s3: str, tmp_path: Path) -> None:
    from vidgen import demo

    source = Path(demo.__file__ or "").parent / "checkpoint" if demo.__file__ else ROOT / "vidgen/demo/checkpoint"
    place = f"{s3.rsplit('/', 1)[0]}/checkpoint"
    fs = fsspec.filesystem("s3")
    for path in source.rglob("*"):
        if path.is_file():
            fs.put_file(str(path), f"{place}/{path.relative_to(source).as_posix()}")
    there, here = open_checkpoint(place), open_checkpoint(str(source))
    assert there.hash() == here.hash()
    copy = fetched(there, tmp_path / "cache")
    assert copy.hash() == here.hash()
    assert copy.resolved.name == place
