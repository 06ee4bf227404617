"""The job: the same bytes however often it dies, nothing made twice, nothing of others touched, all of it whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.inline import drive
from tests.pack.conftest import DONE, a_job, done_rows, tree
from vidgen.cli import main
from vidgen.errors import UserError
from vidgen.pack import reading
from vidgen.pack import source as sources
from vidgen.pack.options import options
from vidgen.pack.shards import shards
from vidgen.pack.source import Source
from vidgen.store.objects import Objects

Pack = Callable[..., tuple[Path, Any]]
FORMATS = ("webdataset", "parquet", "hf", "folder")


class Killed(BaseException):
    """As sudden as a signal, for whoever catches exceptions."""


@contextlib.contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """Everything that changes a store dies just before its `at`-th time, and stays dead. Yields what was done."""
    done: list[str] = []
    lock = threading.Lock()

    def mortal(verb: str) -> Callable[..., Any]:
        act = getattr(Objects, verb)

        def verb_or_death(self: Objects, path: str, *rest: Any, **given: Any) -> Any:
            with lock:
                if len(done) >= at:
                    raise Killed
                done.append(f"{verb} {path}")
            return act(self, path, *rest, **given)

        return verb_or_death

    with monkeypatch.context() as patched:
        for verb in ("create", "put", "put_file", "delete"):
            patched.setattr(Objects, verb, mortal(verb))
        yield done


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_manifest_gives_the_same_bytes_wherever_the_run_lies(format: str, packed: Pack, run: str) -> None:
    one, _ = packed(format, "one", split="train=0.5,test=0.5")
    two, _ = packed(format, "two", split="train=0.5,test=0.5", output=run)
    assert tree(one) == tree(two) and len(tree(one)) > 8


@pytest.mark.parametrize("format", FORMATS)
def test_a_pack_that_dies_before_any_of_its_writes_ends_with_the_same_bytes(
    format: str, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = packed(format, "whole")
    with dying(monkeypatch, at=10**9) as done:
        packed(format, "counted")
    for at in range(len(done)):
        with dying(monkeypatch, at), pytest.raises(Killed):
            packed(format, f"killed{at}")
        place, _ = packed(format, f"killed{at}")
        assert tree(place) == tree(whole), f"died before {done[at]}"


def test_dying_at_every_run_again_still_ends_and_makes_no_finished_shard_twice(
    packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = packed("webdataset", "whole")
    written: list[str] = []
    for _ in range(50):
        with dying(monkeypatch, at=3) as done:
            try:
                place, _ = packed("webdataset", "mortal")
                break
            except Killed:
                pass
            finally:
                written += done
    assert tree(place) == tree(whole)
    for number in range(4):
        name = f"train-{number:06d}"
        assert f"put_file data/{name}.tar" not in written[written.index(f"put index/{name}.json") :]


def test_a_killed_process_goes_on_where_it_was(packed: Pack, finished: str, tmp_path: Path) -> None:
    whole, _ = packed("webdataset", "whole", shard_size="12KB")
    place = tmp_path / "killed"
    command = [sys.executable, "-m", "vidgen.cli", "pack", finished, str(place), "--format", "webdataset"]
    process = subprocess.Popen([*command, "--shard-size", "12KB"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and len(list(place.glob("index/train-*.json"))) < 2:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in place.glob("data/*.tar")}
    entries = {path.stem for path in place.glob("index/train-*.json")}
    done = subprocess.run([*command, "--shard-size", "12KB", "--json"], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["kept"] == len(entries) and said["made"] + said["kept"] == len(list(whole.glob("data/*.tar")))
    assert all((place / f"data/{name}.tar").stat().st_mtime_ns == before[f"{name}.tar"] for name in entries)
    left_over = [name for name in tree(place) if "/.tmp-" in f"/{name}"]
    assert {name: data for name, data in tree(place).items() if name not in left_over} == tree(whole)


def test_a_finished_pack_is_left_alone(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    packed("hf")
    with dying(monkeypatch, at=0):
        _, again = packed("hf")
    assert (again.made, again.kept) == (0, 4)


def test_a_shard_that_is_gone_is_made_again(packed: Pack) -> None:
    place, _ = packed("webdataset")
    before = tree(place)
    (place / "data/train-000001.tar").unlink()
    os.truncate(place / "data/train-000002.tar", 5)
    _, again = packed("webdataset")
    assert again.made == 2 and tree(place) == before


@pytest.mark.parametrize("format", FORMATS)
def test_verify_of_a_pack_finds_damage_of_the_same_size_and_names_what_makes_it_whole(
    format: str, packed: Pack, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = packed(format)
    before = tree(place)

    def verified(*flags: str) -> tuple[int, dict[str, Any]]:
        code = main(["verify", str(place), "--json", *flags])
        return code, json.loads(capsys.readouterr().out)

    code, found = verified()
    assert (code, found["videos"], found["problems"]) == (0, DONE, []) and found["read"] == found["files"] > 0
    entry = place / "index/train-000001.json"
    file = place / json.loads(entry.read_bytes())["files"][0]["name"]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, found = verified()
    (problem,) = found["problems"]
    assert code == 1 and str(file.relative_to(place)) in problem and f"delete index/{entry.name}" in problem
    assert verified("--fast")[0] == 0, "sizes are as they were"
    entry.unlink()
    assert "its entry below index/ is gone" in verified()[1]["problems"][0]
    packed(format)
    assert verified()[0] == 0 and tree(place) == before
    (place / "README.md").write_text("other words")
    assert "README.md is not what _SUCCESS.json names" in verified()[1]["problems"][0]
    (place / "_SUCCESS.json").unlink()
    assert verified()[0] == 1


# ---------------------------------------------------------------- another pack, other files


def test_other_options_are_refused_with_both_values_until_they_are_to_replace(packed: Pack) -> None:
    place, _ = packed("webdataset")
    before = tree(place)
    with pytest.raises(UserError, match=r"(?s)--split: None there, now 'train=0.5,test=0.5'.*"):
        packed("webdataset", split="train=0.5,test=0.5")
    with pytest.raises(UserError, match="--format: 'webdataset' there, now 'hf'"):
        packed("hf")
    assert tree(place) == before
    for format in ("folder", "hf", "parquet", "webdataset"):
        packed(format, replace=True)
        fresh, _ = packed(format, f"fresh-{format}")
        assert tree(place) == tree(fresh)


def test_a_changed_manifest_is_refused_and_a_replacement_keeps_what_has_not_changed(
    packed: Pack, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    config = a_job(tmp_path, run)
    drive(config)
    place, first = packed("webdataset", output=run)
    last = list(done_rows(run).values())[-1]
    (Path(run) / last["video"]).unlink()
    assert main(["retry", run, "--missing"]) == 0
    with pytest.raises(UserError, match="has not finished"):
        packed("webdataset", output=run)
    drive(config)
    with pytest.raises(UserError, match="the manifest has changed since"):
        packed("webdataset", output=run)
    _, again = packed("webdataset", output=run, replace=True)
    assert (again.made, again.kept) == (1, first.made - 1)
    fresh, _ = packed("webdataset", "fresh", output=run)
    assert tree(place) == tree(fresh)


@pytest.mark.parametrize("format", FORMATS)
def test_a_replacement_that_dies_anywhere_leaves_nothing_of_the_old_pack(
    format: str, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = packed(format, "whole", where="row_id < 'r06'")
    for at in range(0, 30, 3):
        packed(format, f"killed{at}")
        with dying(monkeypatch, at), contextlib.suppress(Killed):
            packed(format, f"killed{at}", where="row_id < 'r06'", replace=True)
        place, _ = packed(format, f"killed{at}", where="row_id < 'r06'", replace=at == 0)
        assert tree(place) == tree(whole)


def test_a_place_with_other_files_is_refused_untouched(packed: Pack, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "r00_0.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"r00_0\.mp4 is there, and no PACK\.json"):
        packed("folder", name="{row_id}_{sample}.mp4", replace=True)
    assert tree(tmp_path / "pack") == {"r00_0.mp4": b"mine"}


def test_a_pack_lies_neither_within_its_run_nor_around_it(packed: Pack, run: str, tmp_path: Path) -> None:
    for place in ("run/data", "run", "."):
        with pytest.raises(UserError, match="neither within it nor around it"):
            packed("folder", place, output=run)


# ---------------------------------------------------------------- videos that are not as the manifest says


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_video_that_is_gone_or_damaged_is_named_with_the_way_out(
    format: str, harm: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = list(done_rows(run).values())[12]
    video = Path(run) / row["video"]
    video.unlink() if harm == "gone" else video.write_bytes(video.read_bytes()[:-1] + b"x")
    dest = tmp_path / "pack"
    command = ["pack", run, str(dest), "--format", format, "--shard-size", "30KB"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert f"item {row['item_id']}" in said and f"vidgen retry {run} --missing" in said and "Traceback" not in said
    assert not (dest / "_SUCCESS.json").exists() and list(dest.glob("index/*.json")), "what was finished stays"
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["exit"] == 1


def test_a_manifest_part_that_is_not_the_one_of_success_is_refused(packed: Pack, run: str) -> None:
    part = next(Path(run).glob("manifest/part-0*.parquet"))
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"is not what _SUCCESS\.json names"):
        packed("folder", output=run)


# ---------------------------------------------------------------- what goes in


def test_what_is_left_out_is_counted(packed: Pack) -> None:
    place, made = packed("webdataset", where="topic = 'sky'")
    assert made.videos == 12 and made.left_out == {"failed": 2, "rejected": 1, "not selected": 8}
    card = (place / "README.md").read_text()
    assert "Left out: 2 failed, 8 by the condition, 1 rejected." in card
    with pytest.raises(UserError, match="unknown column"):
        packed("webdataset", "other", where="topik = 'sky'")
    with pytest.raises(UserError, match="there is no video to pack"):
        packed("webdataset", "other", where="topic = 'land'")


def test_a_run_that_has_not_finished_is_packed_only_on_request(packed: Pack, tmp_path: Path) -> None:
    output = str(tmp_path / "half")
    config = a_job(tmp_path, output)
    config.sampling.params = {"step_seconds": 0.05}
    drive(config, interrupt_at=4)
    with pytest.raises(UserError, match=r"has not finished; .*--partial packs what is done"):
        packed("webdataset", output=output)
    _, half = packed("webdataset", output=output, partial=True)
    assert 4 <= half.videos < DONE and half.left_out["pending"] > 0
    drive(config)
    with pytest.raises(UserError, match="the manifest has changed since"):
        packed("webdataset", output=output)
    _, whole = packed("webdataset", output=output, replace=True)
    assert whole.videos == DONE and "pending" not in whole.left_out


# ---------------------------------------------------------------- memory


def test_no_more_than_the_bound_is_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 100)
    lock, held, most = threading.Lock(), [0], [0]

    def act(row: reading.Row) -> int:
        with lock:
            held[0] += row["bytes"]
            most[0] = max(most[0], held[0])
        return int(row["number"])

    sizes = [10, 60, 50, 5, 90, 250, 1, 1, 99, 30] * 5
    seen = []
    for row, number in reading.ahead(act, ({"number": n, "bytes": size} for n, size in enumerate(sizes))):
        assert row["number"] == number
        seen.append(number)
        with lock:
            held[0] -= row["bytes"]
    assert seen == list(range(50))
    assert most[0] <= 250 + 100, "one that is larger alone, and what was taken but not yet let go"


def test_rows_are_read_as_a_stream_and_not_kept(finished: str) -> None:
    """A thousand tables of which each is made when it is asked for: never more than a few are alive."""
    real = sources.of_run(finished)
    table = next(real.rows())
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def tables() -> Iterator[Any]:
        nonlocal alive, most
        for _ in range(300):
            one = table.slice(0)
            alive += 1
            weakref.finalize(one, gone)
            most = max(most, alive)
            yield one

    many = Source(real.objects, tables, real.schema, "many", (), "")
    found = sum(shard.rows.num_rows for shard in shards(many, options("webdataset", shard_size="1MB")))
    assert found == 300 * DONE and most < 5
