"""Google's own: conditions, resumable uploads and clocks, by gcsfs over HTTP against a stub of the JSON API."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.store.google_stub import GoogleStub
from vidgen.errors import ConfigError
from vidgen.store import commits, gc
from vidgen.store import google as stores
from vidgen.store.objects import Objects, new_token


def test_create_only_is_the_stores_own_condition(google: GoogleStub) -> None:
    objects = Objects(google.bucket("one"))
    objects.create("a", b"t", "t")
    objects.put("b", b"t")
    posts = [target for method, target in google.seen if method == "POST"]
    assert ["ifGenerationMatch=0" in target for target in posts] == [True, False]


def test_a_store_that_ignores_the_condition_is_refused(google: GoogleStub) -> None:
    google.careless = True
    with pytest.raises(ConfigError, match=r"ignores create-only writes.*run\.single_writer: true"):
        Objects(google.bucket("one")).probe(new_token())


def test_temporary_trouble_is_tried_again_and_final_trouble_is_not(google: GoogleStub, hasty: None) -> None:
    objects = Objects(google.bucket("one"))
    google.fail += [("POST", 503), ("POST", 500), ("POST", 429), ("GET", 502)]
    google.words = "Invalid Credentials"
    google.fail += [("POST", 401)]
    assert objects.create("a", b"mine", "mine")
    assert objects.read("a") == b"mine"
    google.words = "made up by the stub"
    google.seen.clear()
    google.fail += [("POST", 403)]
    with pytest.raises(ConfigError, match="permission is missing"):
        objects.put("a", b"1")
    google.fail += [("POST", 401)]
    with pytest.raises(ConfigError, match="credentials"):
        objects.put("a", b"1")
    assert len(google.seen) == 2
    with pytest.raises(ConfigError, match="no such bucket"):
        Objects("gs://nobody-made-this/x").probe(new_token())


def test_each_verb_is_one_request(google: GoogleStub, tmp_path: Path) -> None:
    objects = Objects(google.bucket("one"))
    objects.put("a", b"1")
    for act in (
        lambda: objects.read("a"),
        lambda: objects.size("a"),
        lambda: objects.exists("none"),
        lambda: list(objects.list("x")),
        lambda: objects.create("b", b"t", "t"),
        lambda: objects.delete("a"),
    ):
        google.seen.clear()
        act()
        assert len(google.seen) == 1, google.seen


def test_a_large_file_is_uploaded_in_chunks(
    google: GoogleStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PART_BYTES", 4 << 20)
    objects, data = Objects(google.bucket("one")), os.urandom(9 << 20)
    (tmp_path / "big").write_bytes(data)
    objects.put_file("a", tmp_path / "big")
    assert objects.read("a") == data
    assert sum("upload_id" in target for _, target in google.seen) == 3


def test_a_listing_comes_in_pages(google: GoogleStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAGE", 3)
    objects = Objects(google.bucket("one"))
    for number in range(7):
        objects.put(f"x/{number}", b"")
    google.seen.clear()
    assert [entry.path for entry in objects.list("x")] == [f"x/{number}" for number in range(7)]
    assert len(google.seen) == 3


@pytest.mark.parametrize("ahead", [-5 * 3600.0, 5 * 3600.0])
def test_gc_goes_by_the_stores_clock_however_wrong_ours_is(google: GoogleStub, ahead: float) -> None:
    objects = Objects(google.bucket("one"))
    google.ahead = ahead
    objects.put(commits.video_path("a" * 32, "1" * 64, "mp4"), b"young, of a pending item")
    assert gc.collect(objects, older_than=0).removed == 0
    google.ahead += 3 * 3600
    assert gc.collect(objects, older_than=0).removed == 1
    assert not list(objects.list("epochs")), "nothing of the clock is left"
