"""Azure's own: pages, conflicts and large files, against Azurite."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from tests.store.proxy import Fault, Proxy
from vidgen.errors import ConfigError
from vidgen.store import azure as stores
from vidgen.store.objects import Objects, new_token


@pytest.fixture
def spoilt_azure(azure: str, azurite: str, hasty: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Objects, Proxy]:
    endpoint = azurite.split("BlobEndpoint=")[1].split(";")[0]
    host = endpoint.rsplit("/", 1)[0]
    with Proxy(host) as proxy:
        monkeypatch.setitem(fsspec.config.conf, "abfs", {"connection_string": azurite.replace(host, proxy.url)})
        yield Objects(azure), proxy  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["answer", "lost-answer", "reset-before", "reset-after"])
def test_a_create_whose_outcome_is_unknown_is_ours_once_and_stays_ours(
    spoilt_azure: tuple[Objects, Proxy], kind: str
) -> None:
    objects, proxy = spoilt_azure
    proxy.spoil(Fault(kind, status=503, code="ServerBusy"))
    assert objects.create("a.json", b"mine 1", "mine")
    proxy.spoil(Fault(kind, status=503, code="ServerBusy"))
    assert not objects.create("a.json", b"yours 2", "yours")
    for method in ("GET", "HEAD", "DELETE"):
        proxy.spoil(Fault(kind, method=method, status=500))
    assert objects.read("a.json") == b"mine 1" and objects.size("a.json") == 6
    objects.delete("a.json")
    assert not objects.exists("a.json")


def test_a_409_that_is_not_about_the_blob_being_there_is_tried_again(spoilt_azure: tuple[Objects, Proxy]) -> None:
    objects, proxy = spoilt_azure
    proxy.spoil(Fault("answer", status=409, code="PendingCopyOperation", times=2))
    assert objects.create("a.json", b"mine 1", "mine")


def test_what_only_a_person_can_mend_is_said_at_once_in_words(spoilt_azure: tuple[Objects, Proxy]) -> None:
    objects, proxy = spoilt_azure
    for status, code, words in (
        (403, "AuthorizationPermissionMismatch", "permission"),
        (403, "AuthenticationFailed", "c"),
    ):
        proxy.forget()
        proxy.spoil(Fault("answer", status=status, code=code, times=1))
        with pytest.raises(ConfigError, match=words):
            objects.put("a", b"1")
        assert proxy.count("PUT") == 1
    with pytest.raises(ConfigError, match="no such bucket or container"):
        Objects("abfs://nobody-made-this/x").probe(new_token())
    with pytest.raises(ConfigError, match="no such bucket or container"):
        Objects("abfs://nobody-made-this/x").read("a")


def test_a_listing_comes_in_pages(azure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAGE", 3)
    objects = Objects(azure)
    for number in range(7):
        objects.put(f"x/{number}", b"")
    objects.put("xx", b"")
    assert [entry.path for entry in objects.list("x")] == [f"x/{number}" for number in range(7)]
    pages, cursor = 0, None
    while pages == 0 or cursor:
        _, cursor = objects.kind.page(objects.path("x"), cursor)
        pages += 1
    assert pages == 3


def test_a_large_file_goes_in_blocks(azure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(azure)
    monkeypatch.setattr(objects.kind.fs.service_client._config, "max_single_put_size", 1 << 20)  # type: ignore[attr-defined]
    data = os.urandom(9 << 20)
    (tmp_path / "big").write_bytes(data)
    objects.put_file("a", tmp_path / "big")
    assert objects.read("a") == data
