"""What is taken away in mid-run: the bucket, the permission, the checkpoint, the room on a node's disk."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.fleet import inline
from tests.fleet.inline import config_for, drive, write_prompts
from tests.store import servers
from tests.store.proxy import Fault, Proxy
from vidgen import manifest
from vidgen.config import JobConfig
from vidgen.errors import UserError
from vidgen.fleet import driver as driving
from vidgen.fleet.dispatch import Rules
from vidgen.plan.files import read_plan
from vidgen.report.verify import verify
from vidgen.store import commits, epochs
from vidgen.store.objects import Objects
from vidgen.store.retry import Refused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch, hasty: None) -> None:
    """Beats and backoffs of a test."""
    monkeypatch.setattr(driving, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr("vidgen.fleet.judgement.INFRASTRUCTURE_BACKOFF", 0.05)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[[JobConfig, str], None]:
    """Drives a run that must end by a refusal in these words; its replicas are gone then, as with their process."""
    fleets: list[inline.InlineFleet] = []

    class Kept(inline.InlineFleet):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            fleets.append(self)

    monkeypatch.setattr(inline, "InlineFleet", Kept)

    def ended(config: JobConfig, words: str) -> None:
        try:
            with pytest.raises(Refused, match=words):
                drive(config)
        finally:
            fleets[-1].close()

    return ended


def after(commits_seen: int, objects: Objects, act: Callable[[], None]) -> threading.Thread:
    """Does something once so many items are committed."""

    def wait() -> None:
        end = time.monotonic() + 60
        while len(list(commits.list_commits(objects, 0))) < commits_seen:
            assert time.monotonic() < end
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def slow(tmp_path: Path, output: str, rows: int = 20) -> JobConfig:
    return config_for(write_prompts(tmp_path / "p.parquet", rows), output, sampling__params__step_seconds=0.1)


def test_a_run_whose_bucket_is_deleted_says_so_and_a_new_bucket_begins_anew(
    s3: str, moto: str, brisk: None, ends: Callable[[JobConfig, str], None], tmp_path: Path
) -> None:
    config, bucket = slow(tmp_path, s3), s3.removeprefix("s3://").split("/")[0]
    fs = fsspec.filesystem("s3")
    before = Objects(s3)

    def delete() -> None:
        for _ in range(100):  # replicas go on writing until the bucket is gone
            try:
                fs.rm(bucket, recursive=True)
                return
            except OSError:
                fs.invalidate_cache()
        raise AssertionError("the bucket could not be deleted")

    deleted = after(2, before, delete)
    ends(config, r"no such bucket.*made first")
    deleted.join()
    servers.put_bucket(moto, bucket)
    assert not list(before.list("")), "nothing claims to be done"
    outcome, _ = drive(config)
    assert (outcome.code, outcome.counts["done"]) == (0, 20)
    assert verify(s3, strict=True).ok


def test_a_run_that_loses_its_permission_stops_with_the_reason_and_goes_on_when_it_is_back(
    s3_at: Any, proxy: Proxy, brisk: None, ends: Callable[[JobConfig, str], None], tmp_path: Path
) -> None:
    output = s3_at(proxy.url)
    config, objects = slow(tmp_path, output), Objects(output)
    denied = [Fault("answer", method, times=10_000, status=403, code="AccessDenied") for method in ("PUT", "GET")]
    after(2, objects, lambda: proxy.spoil(*denied))
    ends(config, "permission is missing")
    proxy.faults.clear()
    committed = set(commits.list_commits(objects, 0))
    assert 2 <= len(committed) < 20 and not objects.exists(manifest.SUCCESS)
    assert not list(commits.read_attempts(objects)), "no row is charged"
    epochs.acquire(objects, lease=60, takeover=True).release()  # as if the process had ended
    outcome, fleet = drive(config)
    assert (outcome.code, outcome.counts["done"]) == (0, 20)
    assert {work.item.item_id for _, works in fleet.sent for work in works}.isdisjoint(committed)
    assert verify(output).ok


def test_a_replica_that_starts_after_the_checkpoint_was_replaced_never_becomes_ready_and_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first replica dies after the replacement; its successor sees another hash."""
    source = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "vidgen" / "demo" / "checkpoint", source)
    config = config_for(write_prompts(tmp_path / "p.parquet", ["a red circle moving left"] * 3), str(tmp_path / "out"))
    config.model.family, config.model.checkpoint = "wan", str(source)
    objects = Objects(config.output.path)
    settings_for = inline.settings_for

    def settings(config: JobConfig, objects: Objects) -> Any:
        found = settings_for(config, objects)
        return replace(found, model=replace(found.model, expected_hash=read_plan(objects)[0].checkpoint_hash))

    class Fleet(inline.InlineFleet):
        """Its replica is lost after the first item, and the checkpoint is another by then."""

        lost = False

        def start(self, name: str, *where: Any) -> None:
            try:
                super().start(name, *where)
            except UserError as error:
                self.workers.pop(name)
                self.waiting.append(inline.ev.ReplicaLost(name, "refused", str(error)))

        def send(self, name: str, *what: Any) -> None:
            if name in self.workers:  # else it goes the way of its replica
                super().send(name, *what)

        def poll(self, timeout: float) -> list[inline.ev.Event]:
            events = super().poll(timeout)
            if not self.lost and any(isinstance(event, inline.ev.ItemDone) for event in events):
                self.lost = True
                config_file = source / "transformer" / "config.json"
                config_file.write_text(config_file.read_text() + " ")
                for name in list(self.workers):
                    worker = self.workers.pop(name)
                    worker.recall(abandon=True)
                    worker.close()
                    events.append(inline.ev.ReplicaLost(name, "node", "its machine is gone"))
            return events

    monkeypatch.setattr(inline, "settings_for", settings)
    monkeypatch.setattr(inline, "InlineFleet", Fleet)
    outcome, _ = drive(config, replicas=1, rules=Rules(prefetch=0))
    assert outcome.code == 2
    assert "checkpoint_hash is" in outcome.reason and "the plan was made with" in outcome.reason
    assert 1 <= outcome.counts["done"] < 3 and not objects.exists(manifest.SUCCESS)
    assert outcome.counts["failed"] == 0 and not list(commits.read_attempts(objects))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB where replicas have their scratch."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("format", ["mp4", "png"])
def test_a_node_whose_disk_is_full_charges_no_row_leaves_nothing_there_and_stops_the_run(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brisk: None, format: str
) -> None:
    dataset = write_prompts(tmp_path / "p.parquet", 4)
    sizes = {"sampling__height": 512, "sampling__width": 512, "sampling__num_frames": 40, "output__crf": 1}
    config = config_for(dataset, str(tmp_path / "out"), output__format=format, **sizes)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    outcome, _ = drive(config, replicas=1, rules=Rules(breaker_failures=4))
    assert outcome.code == 4 and "No space left on device" in outcome.reason
    assert outcome.counts["pending"] == 4
    objects = Objects(config.output.path)
    assert not list(commits.read_attempts(objects)) and not list(objects.list("data"))
    assert not [path for path in small_disk.rglob("*") if path.is_file()], "what was half written is gone"
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert drive(config, replicas=1)[0].code == 0
    assert verify(config.output.path, strict=True).ok
