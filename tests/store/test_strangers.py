"""A run whose files others have touched: what is not ours is passed over, what is damaged is named, and no item is lost
by either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.fleet.inline import config_for, drive, write_prompts
from tests.store.test_commits import record
from vidgen import cli, manifest
from vidgen.errors import DamagedError, PlanError
from vidgen.plan.files import read_plan
from vidgen.report.verify import verify
from vidgen.store import commits, epochs, gc, ledger
from vidgen.store import state as states
from vidgen.store.objects import TEMPORARY, Objects

FOREIGN = (".DS_Store", "notes.txt", "0 (1).json", "1 copy.parquet", "x-y-z.parquet", f"{TEMPORARY}0a-{'0' * 32}.json")

SMALL = {"sampling__num_frames": 2, "sampling__num_inference_steps": 1, "output__format": "png"}


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Objects:
    return Objects(f"memory://{request.node.name}")


@pytest.fixture
def finished(tmp_path: Path) -> Objects:
    """A run of three items that has ended, on a disk."""
    config = config_for(write_prompts(tmp_path / "p.parquet", 3), str(tmp_path / "out"), **SMALL)
    assert drive(config, replicas=1)[0].code == 0
    return Objects(config.output.path)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_nobody_here_wrote_is_passed_over_wherever_it_lies(memory: Objects, name: str) -> None:
    for ordinal in range(3):
        commits.commit(memory, record(ordinal), "t")
    ledger.write_part(memory, [record(0)])
    commits.create_generation(memory, 1, [record(2).item_id], "t")
    commits.record_attempt(memory, commits.Attempt(record(2).item_id, 1, "item", 1.0, "t"), {})
    epochs.acquire(memory, lease=60).release()
    for folder in ("commits/g0/00", "ledger", "generations", f"attempts/{record(2).item_id}", "attempts", "epochs"):
        memory.put(f"{folder}/{name}", b"not ours")
    assert states.load(memory, 3, compact=True).counts() == {"done": 2, "failed": 0, "quarantined": 0, "pending": 1}
    assert sum(attempt.count for attempt in commits.read_attempts(memory)) == 1.0
    assert epochs.acquire(memory, lease=60).epoch == 1
    assert gc.collect(memory, 0.0).removed == 0


def test_a_ledger_part_with_any_byte_wrong_is_passed_over(memory: Objects) -> None:
    records = [record(ordinal, "failed" if ordinal % 2 else "done") for ordinal in range(5)]
    for one in records:
        commits.commit(memory, one, "t")
    path = ledger.write_part(memory, records)
    whole = memory.read(path)
    for place in range(0, len(whole), 97):
        memory.put(path, whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert list(ledger.read_tables(memory)) == []
    memory.put(path, whole[: len(whole) // 2])
    assert states.load(memory, 5).counts() == {"done": 3, "failed": 2, "quarantined": 0, "pending": 0}
    memory.put(path, whole)
    assert [table.num_rows for table in ledger.read_tables(memory)] == [5]


@pytest.mark.parametrize("damage", [b"", b'{"item_id": "00', b"[]", b"\xff\xfe"])
def test_a_damaged_commit_is_named_with_the_way_out_and_never_taken_for_done(memory: Objects, damage: bytes) -> None:
    commits.commit(memory, record(1), "t")
    path = commits.commit_path(0, record(1).item_id)
    memory.put(path, damage)
    for look in (
        lambda: states.load(memory, 2),
        lambda: commits.commit(memory, record(1), "other"),
    ):
        with pytest.raises(DamagedError, match=f"{path} is damaged .*delete it, and its item is made again"):
            look()
    memory.delete(path)
    assert states.load(memory, 2).count("pending") == 2


def test_a_torn_plan_is_named(finished: Objects) -> None:
    finished.put("plan/0/PLAN.json", finished.read("plan/0/PLAN.json")[:100])
    with pytest.raises(PlanError, match=r"plan/0/PLAN.json is not a whole plan"):
        read_plan(finished)


@pytest.mark.parametrize("success", [b"", b"{", b"[]", b'{"plan": 0, "generation": 0, "parts": []}'])
def test_a_success_that_is_none_is_written_again(finished: Objects, success: bytes) -> None:
    finished.put(manifest.SUCCESS, success)
    assert not verify(finished.url).ok
    assert cli.main(["generate", finished.url, "--no-report", "--json"]) == 0
    assert verify(finished.url, strict=True).ok


def test_success_without_one_of_its_commits_is_no_success(finished: Objects) -> None:
    """Both the commit and the ledger part that named it are gone: its item is made again, and nothing else is."""
    (plan,) = read_plan(finished)
    for entry in [*finished.list("ledger")]:
        finished.delete(entry.path)
    gone = next(finished.list("commits")).path
    finished.delete(gone)
    assert not verify(finished.url).ok
    config = config_for(plan.config["dataset"]["path"], finished.url, **SMALL)
    outcome, fleet = drive(config, replicas=1)
    assert outcome.code == 0 and [len(works) for _, works in fleet.sent] == [1]
    assert finished.exists(gone) and verify(finished.url, strict=True).ok


def test_a_run_that_was_copied_goes_on_where_it_lies_and_leaves_the_first_alone(
    finished: Objects, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(finished.root, copy)
    before = sorted(entry.path for entry in finished.list(""))
    assert cli.main(["generate", str(copy), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(copy) and said["report"].startswith(str(copy)) and Path(said["report"]).exists()
    assert sorted(entry.path for entry in finished.list("")) == before
    shutil.rmtree(finished.root)
    assert cli.main(["generate", str(copy), "--no-report"]) == 0
    assert f"output  {copy}" in capsys.readouterr().out and not Path(finished.root).exists()


def test_folders_of_an_output_may_be_links_to_other_disks(finished: Objects, tmp_path: Path) -> None:
    root = Path(finished.root)
    for number, folder in enumerate([next((root / "data").iterdir()), root / "commits", root / "data"]):
        shutil.move(folder, tmp_path / f"disk{number}")
        folder.symlink_to(tmp_path / f"disk{number}")
    assert verify(finished.url, strict=True).ok
    assert gc.collect(finished, 0.0).removed == 0
    assert verify(finished.url, strict=True).ok
