"""The whole path from Parquet to manifest, in one process: plan, drive, commit, verify. No cluster."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen import manifest
from vidgen.fleet import events as ev
from vidgen.fleet.dispatch import Rules
from vidgen.fleet.driver import Driver, Limits
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.report.repair import extend, retry
from vidgen.report.status import gpu_seconds
from vidgen.report.status import read as status
from vidgen.report.verify import verify
from vidgen.store import commits, epochs, ledger
from vidgen.store.objects import Objects


@pytest.fixture(params=["file", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "file" else f"memory://{uuid.uuid4().hex}"


def statuses(output: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for table in manifest.read(Objects(output)):
        for entry in pc.value_counts(table.column("status")).to_pylist():
            found[entry["values"]] = found.get(entry["values"], 0) + entry["counts"]
    return found


def test_every_row_becomes_a_video_and_a_manifest_row(output: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 7, note=[f"n{i}" for i in range(7)])
    outcome, _ = drive(config_for(prompts, output))
    assert (outcome.code, outcome.counts["done"]) == (0, 7)
    verdict = verify(output, strict=True)
    assert verdict.ok and verdict.checked == 7, verdict.problems
    (table,) = manifest.read(Objects(output))
    assert table.column("note").to_pylist() == [f"n{i}" for i in range(7)]


def test_a_rejected_row_stands_in_the_manifest_and_the_rest_runs(output: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", ["one", "", "three"])
    outcome, _ = drive(config_for(prompts, output))
    assert outcome.code == 0
    assert statuses(output) == {"done": 2, "rejected": 1}
    assert verify(output).ok


def test_rows_that_always_fail_are_committed_as_failed_with_their_error(output: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 8, fails=["item" if i == 3 else "" for i in range(8)])
    config = config_for(prompts, output)
    config.dataset.columns["params.fail"] = "fails"
    outcome, fleet = drive(config)
    assert outcome.code == 3
    assert statuses(output) == {"done": 7, "failed": 1}
    assert verify(output).ok
    assert {work.attempt for _, works in fleet.sent for work in works if work.item.ordinal == 3} == {1, 2, 3}
    (failures,) = status(output).failures
    assert failures.count == 1 and failures.error


def test_retry_reopens_failed_items_only_and_a_new_generation_settles_them(output: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 4, fails=["", "item", "", ""])
    config = config_for(prompts, output)
    config.dataset.columns["params.fail"] = "fails"
    drive(config)
    assert retry(output, where="prompt = 'nobody wrote this'").items == 0
    reopened = retry(output)
    assert (reopened.items, reopened.generation) == (1, 1)
    assert status(output).pending == 1 and not Objects(output).exists(manifest.SUCCESS)
    outcome, fleet = drive(config)
    assert {work.item.ordinal for _, works in fleet.sent for work in works} == {1}
    assert outcome.code == 3 and verify(output).ok


def test_retry_missing_makes_a_deleted_video_again(output: str, tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 3), output)
    drive(config)
    objects = Objects(output)
    victim = next(iter(objects.list("data"))).path
    objects.delete(victim)
    assert not verify(output).ok
    assert retry(output, missing=True).items == 1
    drive(config)
    assert verify(output).ok and objects.exists(victim)


def test_a_bad_configuration_trips_the_breaker_and_leaves_every_item_pending(output: str, tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 80), output, sampling__params__fail="item")
    outcome, fleet = drive(config, rules=Rules(breaker_failures=20))
    assert outcome.code == 4
    assert outcome.counts["pending"] == 80
    assert len(fleet.sent) <= 20 + 4
    assert sum(attempt.count for attempt in commits.read_attempts(Objects(output))) == 0


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    prompts = write_prompts(tmp_path / "p.parquet", 30)
    config = config_for(prompts, output, sampling__params__step_seconds=0.05)
    first, _ = drive(config, interrupt_at=3)
    assert first.code == 130 and 0 < first.counts["done"] < 30
    assert not Objects(output).exists(manifest.SUCCESS)
    committed = set(commits.list_commits(Objects(output), 0))
    second, fleet = drive(config)
    assert second.code == 0 and verify(output).ok
    assert len(committed) >= first.counts["done"]
    assert {work.item.item_id for _, works in fleet.sent for work in works}.isdisjoint(committed)


def test_a_spent_budget_stops_gracefully_and_is_cumulative(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    prompts = write_prompts(tmp_path / "p.parquet", 30)
    config = config_for(prompts, output, sampling__params__step_seconds=0.1)
    first, _ = drive(config, limits=Limits(gpu_seconds=2.0))
    spent = gpu_seconds(Objects(output))
    assert first.code == 5 and 0 < first.counts["done"] < 30 and spent >= 2.0
    again, _ = drive(config, limits=Limits(gpu_seconds=0.1))
    assert again.code == 5 and gpu_seconds(Objects(output)) >= spent, "far more than what is in flight of one driver"


def test_a_damaged_manifest_of_a_finished_run_is_written_again(output: str, tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 3), output)
    drive(config)
    objects = Objects(output)
    part = next(iter(objects.list("manifest"))).path
    objects.put(part, b"damaged")
    assert not verify(output).ok
    outcome, fleet = drive(config)
    assert outcome.code == 0 and not fleet.sent and verify(output).ok


def test_the_write_of_one_item_overlaps_the_steps_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_file = Objects.put_file

    def slow(self: Objects, path: str, source: Any) -> None:
        time.sleep(2.0)
        put_file(self, path, source)

    monkeypatch.setattr(Objects, "put_file", slow)
    output = str(tmp_path / "out")
    prompts = write_prompts(tmp_path / "p.parquet", 3)
    drive(config_for(prompts, output, sampling__params__step_seconds=1.5), replicas=1)
    (table,) = ledger.read_tables(Objects(output))
    records = sorted(ledger.to_records(table), key=lambda record: record.started_at)
    for earlier, later in itertools.pairwise(records):
        last_step_ends = later.started_at + later.encode_s + later.denoise_s
        assert earlier.write_started_at < last_step_ends and later.started_at < earlier.created_at


def test_a_constant_video_is_a_failure_unless_it_is_allowed(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 2)
    refused = config_for(prompts, str(tmp_path / "a"), sampling__params__fail="black")
    assert drive(refused)[0].counts["failed"] == 2
    allowed = config_for(prompts, str(tmp_path / "b"), sampling__params__fail="black", run__allow_constant="true")
    assert drive(allowed)[0].counts["done"] == 2


@pytest.mark.parametrize("format", ["webm", "gif", "png"])
def test_every_output_format_is_made_and_verified(format: str, tmp_path: Path) -> None:
    config = config_for(write_prompts(tmp_path / "p.parquet", 2), str(tmp_path / "out"), output__format=format)
    outcome, _ = drive(config)
    assert outcome.code == 0
    verdict = verify(config.output.path, strict=True)
    assert verdict.ok and verdict.checked == 2, verdict.problems


def test_an_extended_run_makes_only_what_is_new_and_its_manifest_covers_both_plans(output: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 6)
    drive(config_for(prompts, output, dataset__limit=2))
    wider = config_for(prompts, output, dataset__limit=5)
    assert extend(wider, Objects(output)).plan.k == 1
    assert not Objects(output).exists(manifest.SUCCESS)
    outcome, fleet = drive(wider)
    assert outcome.code == 0 and outcome.counts["done"] == 5
    assert {work.item.ordinal for _, works in fleet.sent for work in works} == {2, 3, 4}
    assert verify(output, strict=True).ok


def test_samples_and_sweeps_are_items_of_their_own(output: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", 2)
    config = config_for(prompts, output, dataset__samples_per_row=2, sweep__over="{num_inference_steps: [1, 2]}")
    outcome, _ = drive(config)
    assert outcome.counts["done"] == 8 and verify(output).ok
    (table,) = manifest.read(Objects(output))
    seeds = {(row["row_id"], row["sample"]): set() for row in table.to_pylist()}  # type: dict[tuple[str, int], set[int]]
    for row in table.to_pylist():
        seeds[row["row_id"], row["sample"]].add(row["seed"])
    assert len(seeds) == 4 and all(len(of_sample) == 1 for of_sample in seeds.values()), "variants share their seed"


def test_what_was_in_flight_at_a_death_goes_last_and_alone_and_counts_only_when_it_was_a_lone_suspect(
    tmp_path: Path,
) -> None:
    output = str(tmp_path / "out")
    config = config_for(write_prompts(tmp_path / "p.parquet", 5), output)
    objects = Objects(output)
    plan = build(config, objects).plan
    first, second = (item.item_id for item in list(read_items(objects, plan, plan.parts[0]))[:2])
    dead = epochs.acquire(objects, lease=60)
    dead.beat(in_flight=[first, second])
    holder = json.loads(objects.read("epochs/0.json"))
    objects.put("epochs/0.json", json.dumps({**holder, "start_time": "1"}).encode())
    outcome, fleet = drive(config)
    assert outcome.code == 0
    assert {work.item.item_id for _, works in fleet.sent[-2:] for work in works} == {first, second}
    assert not list(commits.read_attempts(objects))


def test_a_lone_suspect_of_another_death_gets_one_count(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = config_for(write_prompts(tmp_path / "p.parquet", 2), output)
    objects = Objects(output)
    plan = build(config, objects).plan
    suspect = next(read_items(objects, plan, plan.parts[0])).item_id
    dead = epochs.acquire(objects, lease=60)
    dead.beat(in_flight=[suspect], lone_suspect=0)
    holder = json.loads(objects.read("epochs/0.json"))
    objects.put("epochs/0.json", json.dumps({**holder, "start_time": "1"}).encode())
    outcome, _ = drive(config, rules=Rules(max_attempts=1))
    (attempt,) = commits.read_attempts(objects)
    assert (attempt.item_id, attempt.error_class, attempt.count, attempt.token) == (suspect, "replica", 1.0, "epoch0")
    assert outcome.code == 3 and outcome.counts == {"done": 1, "failed": 1, "quarantined": 0, "pending": 0}


def test_a_driver_that_lost_its_run_gives_up_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes over between the failure and its commit, long before this one's next beat."""
    prompts, output = write_prompts(tmp_path / "p.parquet", ["bad"], fails=["item"]), str(tmp_path / "out")
    config = config_for(prompts, output, run__max_attempts=1)
    config.dataset.columns["params.fail"] = "fails"
    give_up = Driver._give_up

    def overtaken(self: Driver, action: ev.Settle) -> None:
        epochs.acquire(self.objects, lease=60, takeover=True)
        give_up(self, action)

    monkeypatch.setattr(Driver, "_give_up", overtaken)
    with pytest.raises(epochs.Held):
        drive(config)
    assert not list(commits.list_commits(Objects(output), 0))


def test_the_manifest_has_the_record_of_an_items_own_generation_in_whatever_order_parts_are_read(
    tmp_path: Path,
) -> None:
    output = f"memory://{uuid.uuid4().hex}"
    config, objects = config_for(write_prompts(tmp_path / "p.parquet", 1), output), Objects(output)
    drive(config)
    (old,) = ledger.to_records(next(ledger.read_tables(objects)))
    objects.delete(old.video)
    assert retry(output, missing=True).items == 1
    drive(config)
    for number in range(20):  # their names end in a hash: some come after the newer one's
        ledger.write_part(objects, [replace(old, created_at=float(number))])
    objects.delete(manifest.SUCCESS)
    assert drive(config)[0].code == 0
    (row,) = next(manifest.read(objects)).to_pylist()
    assert row["generation"] == 1
