"""Atomic puts and create-only writes, on every kind of store."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.store.google_stub import GoogleStub
from vidgen.errors import ConfigError
from vidgen.store.objects import TEMPORARY, Objects, new_token


def test_the_first_to_create_wins_and_the_second_is_told(objects: Objects) -> None:
    assert objects.create("a/b.json", b"mine x", "mine")
    assert not objects.create("a/b.json", b"yours y", "yours")
    assert objects.read("a/b.json") == b"mine x"


def test_creating_again_with_ones_own_token_is_success(objects: Objects) -> None:
    assert objects.create("a", b"mine x", "mine")
    assert objects.create("a", b"mine x", "mine")


def race(objects: Objects) -> list[bytes]:
    """Eight writers create the object `race` at once, each with other bytes: those of whom it is told that it did."""
    won: list[bytes] = []
    barrier = threading.Barrier(8)

    def write() -> None:
        token = new_token()
        data = token.encode() * 1000
        barrier.wait()
        if objects.create("race", data, token):
            won.append(data)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_of_many_writers_at_once_exactly_one_creates(objects: Objects) -> None:
    assert race(objects) == [objects.read("race")]


def test_an_object_without_its_writers_token_is_our_mistake(objects: Objects) -> None:
    with pytest.raises(AssertionError):
        objects.create("a", b"data", "token")


def test_a_put_replaces_and_a_listing_sees_every_depth(objects: Objects, tmp_path: Path) -> None:
    objects.put("x/1", b"one")
    objects.put("x/1", b"uno!")
    source = tmp_path / "source"
    source.write_bytes(b"file")
    objects.put_file("x/y/2", source)
    assert [(entry.path, entry.size) for entry in objects.list("x")] == [("x/1", 4), ("x/y/2", 4)]
    assert objects.size("x/y/2") == 4 and objects.size("x/none") is None
    assert list(objects.list("nothing")) == []


def test_putting_a_file_twice_leaves_nothing_behind(tmp_path: Path) -> None:
    objects, source = Objects(str(tmp_path / "out")), tmp_path / "source"
    source.write_bytes(b"file")
    objects.put_file("x/1", source)
    objects.put_file("x/1", source)
    assert [path.name for path in (tmp_path / "out" / "x").iterdir()] == ["1"]


def test_deleting_what_is_not_there_is_no_error(objects: Objects) -> None:
    objects.put("x", b"1")
    objects.delete("x")
    objects.delete("x")
    assert not objects.exists("x")


def test_half_written_local_files_are_invisible_and_swept(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TEMPORARY}dead-x.mp4").write_bytes(b"half")
    assert list(objects.list("data")) == []
    assert objects.sweep_temporaries("", 0.0) == 0
    assert objects.sweep_temporaries("", time.time() + 60) == 1
    assert not list((tmp_path / "data").iterdir())


def test_a_half_written_file_that_is_published_while_it_is_looked_at_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(str(tmp_path))
    objects.put("data/x", b"1")
    real = os.walk
    monkeypatch.setattr(
        os, "walk", lambda top: [(place, [], [*names, f"{TEMPORARY}y"]) for place, _, names in real(top)]
    )
    assert objects.sweep_temporaries("", time.time() + 60) == 0


def test_a_disk_without_hard_links_is_refused_with_the_way_out_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(
        ConfigError, match=r"has no create-only writes \(the disk has no hard links.*single_writer: true"
    ):
        Objects(str(tmp_path)).probe(new_token())
    single = Objects(str(tmp_path), single_writer=True)
    single.probe(new_token())
    (tmp_path / "source").write_bytes(b"file")
    single.put_file("x", tmp_path / "source")
    assert single.read("x") == b"file"


def test_the_probe_accepts_a_store_that_honours_create_only(objects: Objects) -> None:
    objects.probe(new_token())
    assert list(objects.list("epochs")) == []


def test_the_probe_refuses_a_store_that_ignores_create_only_and_says_the_way_out(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.kind.create = objects.kind.put  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"ignores create-only writes.*single_writer: true"):
        objects.probe(new_token())


def test_the_probe_refuses_a_store_without_create_only_and_says_the_way_out(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))

    def create(name: str, data: bytes) -> None:
        raise NotImplementedError("If-None-Match")

    objects.kind.create = create  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"has no create-only writes \(If-None-Match\).*single_writer: true"):
        objects.probe(new_token())


def test_an_output_that_cannot_be_written_is_a_configuration_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"file/out.*cannot be written"):
        Objects(str(tmp_path / "file" / "out")).probe(new_token())


def test_a_single_writer_store_still_refuses_to_overwrite_what_is_there(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path), single_writer=True)
    assert objects.create("a", b"mine", "mine")
    assert not objects.create("a", b"yours", "yours")


def test_a_store_whose_library_is_missing_names_the_extra_to_install() -> None:
    code = """
import sys
sys.modules.update(s3fs=None, gcsfs=None, adlfs=None)
from vidgen.store.objects import Objects
for url in ("s3://b/x", "gs://b/x", "abfs://b/x", "az://b/x", "nonsense://b/x"):
    try:
        Objects(url)
    except Exception as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(line.startswith("ConfigError") for line in lines), done
    for line, extra in zip(lines, ("s3", "gcs", "azure", "azure"), strict=False):
        assert f'pip install "vidgen[{extra}]"' in line
    assert "'nonsense://b/x' cannot be opened" in lines[4]


def test_every_spelling_of_a_protocol_opens_the_same_store(azure: str, s3: str, google: GoogleStub) -> None:
    for url, spellings in (
        (azure, ("abfs", "az", "abfss")),
        (s3, ("s3", "s3a")),
        (google.bucket("one"), ("gs", "gcs")),
    ):
        for spelling in spellings:
            Objects(f"{spelling}://{url.split('://')[1]}").put(spelling, b"1")
        assert {entry.path for entry in Objects(url).list("")} == set(spellings)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    Objects(f"file://{tmp_path}/out").create("a", b"t", "t")
    assert Objects(str(tmp_path / "out")).read("a") == b"t"
