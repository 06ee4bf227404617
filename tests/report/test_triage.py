"""Failures after a run: grouped, explained, and opened again by what they have in common."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from vidgen import where
from vidgen.cli import main
from vidgen.errors import ConfigError
from vidgen.fleet.dispatch import Rules
from vidgen.plan.build import build
from vidgen.plan.files import read_items
from vidgen.report import status
from vidgen.report.repair import retry
from vidgen.report.summary import like, signature
from vidgen.report.verify import verify
from vidgen.store import commits, epochs
from vidgen.store.objects import Objects
from vidgen.types import Record

TOPICS = ["sea", "sea", "city", "city", "sky", "sky", "sea", "sea"]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("failed"))


def run(folder: Path) -> Path:
    """A run of eight rows of two shapes: two failed by themselves, two did not fit, one is of one colour."""
    fails = ["", "item", "capacity", "", "item", "capacity", "black", ""]
    prompts = write_prompts(folder / "p.parquet", 8, fails=fails, tall=[64, 64, 64, 64, 96, 96, 64, 64], topic=TOPICS)
    drive(job(prompts, folder / "out"), rules=Rules(max_attempts=1))
    return folder / "out"


def job(prompts: str, output: Path) -> Any:
    config = config_for(prompts, str(output), sampling__width=64)
    config.dataset.columns |= {"params.fail": "fails", "height": "tall"}
    return config


@pytest.fixture
def output(failed: Path, tmp_path: Path) -> str:
    """A copy of it."""
    shutil.copytree(failed, tmp_path / "my out")
    return str(tmp_path / "my out")


def test_failures_are_grouped_with_an_example_and_the_command_that_opens_each_group_alone(
    output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", output, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["failures"]
    assert sorted(group["count"] for group in groups) == [1, 2, 2]
    for generation, group in enumerate(groups, 1):
        command = shlex.split(group["retry"])
        assert command[0] == "vidgen" and main([*command[1:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"items": group["count"], "generation": generation}
    assert status.read(output).failures == []


def test_the_commands_are_shown_to_a_person(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", output]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("vidgen retry") == 4
        and f"vidgen retry {shlex.quote(output)}\n" in shown
        and "error_class = '\"'\"'capacity'\"'\"'" in shown
    )


@pytest.mark.parametrize(
    ("condition", "items"),
    [
        ("error_class = 'capacity'", 2),
        ("error like '%flat colour%'", 1),
        ("height = 96 and width = 64 and num_frames = 5", 2),
        ("height = 96 and error_class = 'item'", 1),
        ("node = 'node0'", 5),
        ("node != 'node0'", 0),
        ("attempt >= 1 and status = 'failed'", 5),
        ("prompt like '%number 2'", 1),
        ("topic in ('sea', 'sky')", 4),
        ("status = 'done'", 0),
    ],
)
def test_failed_items_are_opened_by_class_text_shape_node_and_carried_columns(
    output: str, condition: str, items: int
) -> None:
    assert retry(output, where=condition).items == items


def test_a_bad_condition_opens_nothing_and_points_at_the_place(output: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown column hight.*did you mean height"):
        retry(output, where="hight = 96")
    assert not commits.list_generations(Objects(output))


def test_a_quarantined_item_is_grouped_and_opened_like_a_failed_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    objects = Objects(folder)
    plan = build(config_for(write_prompts(tmp_path / "p.parquet", 2), folder), objects).plan
    assert plan is not None
    killer, _ = read_items(objects, plan, plan.parts[0])
    record = Record(killer.item_id, killer.ordinal, "quarantined", 0, 2, error_class="replica", error="it died on two")
    commits.commit(objects, record, "token")
    (group,) = status.read(folder).failures
    assert (group.count, group.example) == (1, killer.item_id)
    assert retry(folder, where="status = 'quarantined'").items == 1
    assert status.read(folder).pending == 2


def test_what_was_tried_before_a_retry_stays_readable_and_counts_no_more(tmp_path: Path) -> None:
    folder = run(tmp_path)
    objects = Objects(str(folder))
    before = {attempt.path for attempt in commits.read_attempts(objects)}
    assert before and all("/g0-" in path for path in before)
    assert retry(str(folder), where="error_class = 'item' and error like '%asked to fail%'").items == 2
    outcome, fleet = drive(job(str(tmp_path / "p.parquet"), folder), rules=Rules(max_attempts=2))
    assert outcome.code == 3 and {work.item.ordinal for _, works in fleet.sent for work in works} == {1, 4}
    tries = {(work.item.item_id, work.attempt) for _, works in fleet.sent for work in works}
    assert len(tries) == 4, "two attempts each: those of generation 0 do not count"
    after = {attempt.path for attempt in commits.read_attempts(objects)}
    assert before < after
    for path in after:
        evidence = json.loads(objects.read(path))
        assert evidence["error"] and evidence["node"] == "node0"
    assert verify(str(folder)).ok


def test_notes_of_the_driver_are_part_of_the_status_while_it_runs(output: str) -> None:
    objects = Objects(output)
    lease = epochs.acquire(objects, lease=60)
    lease.beat(in_flight=[])
    note = "node gpu-7 gets no new items for 30 minutes"
    objects.put("progress.json", json.dumps({"notes": [note], "replicas": []}).encode())
    assert status.read(output).notes == [note]
    lease.release()
    assert status.read(output).notes == []


@pytest.mark.parametrize(
    "error",
    [
        "the file holds 4 frames of (64, 64), expected 5 of (64, 64)",
        "it's 100% wrong: C:\\temp\\x, see s3://bucket/a/b/c.mp4",
        "two\nlines  and a 0xdeadbeef12",
        "x" * 400,
        "y" * 155 + " /a/long/path/that/is/cut off",
        "",
    ],
)
def test_the_condition_of_a_signature_selects_its_failures(error: str) -> None:
    condition = like(signature("item", error), error)
    other = "something else happened"
    table = pa.table({"error_class": ["item", "item", "capacity"], "error": [error, other, error]})
    found = table.filter(where.compile(condition, table.schema))
    assert found.column("error").to_pylist() == ([error] if error else [error, other])
