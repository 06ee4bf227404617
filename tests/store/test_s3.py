"""S3 by its own rules: one request a verb, files in parts, pages, and who may overwrite what."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.store.proxy import Fault, Proxy
from vidgen.errors import ConfigError, InfrastructureError
from vidgen.store import kind
from vidgen.store import s3 as stores
from vidgen.store.objects import Objects, new_token


@pytest.fixture
def seen(s3_at: Callable[[str], str], proxy: Proxy) -> Objects:
    """A store behind a proxy that only counts, with its connection open."""
    objects = Objects(s3_at(proxy.url))
    objects.put("warm", b"")
    proxy.forget()
    return objects


def test_each_verb_is_one_request(seen: Objects, proxy: Proxy, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 1000)
    done = []

    def made(verb: str, *requests: str) -> None:
        done.append((verb, [one.method for one in proxy.seen], list(requests)))
        proxy.forget()

    seen.put("a", b"1")
    made("put", "PUT")
    seen.put_file("b", source)
    made("put_file", "PUT")
    seen.create("c", b"t", "t")
    made("create", "PUT")
    seen.create("c", b"u", "u")
    made("create what is there", "PUT", "GET")
    seen.read("a")
    made("read", "GET")
    seen.exists("a"), seen.size("a"), seen.exists("none")
    made("head", "HEAD", "HEAD", "HEAD")
    list(seen.list("none"))
    made("list", "GET")
    seen.delete("a")
    made("delete", "DELETE")
    assert all(requests == wanted for _, requests, wanted in done), done


def test_create_only_is_the_stores_own_condition(seen: Objects, proxy: Proxy) -> None:
    seen.create("a", b"t", "t")
    seen.put("b", b"t")
    sent = {one.path.rsplit("/", 1)[-1].split("?")[0]: one.headers for one in proxy.seen if one.method == "PUT"}
    assert sent["a"]["If-None-Match"] == "*"
    assert "If-None-Match" not in sent["b"]


def test_a_store_that_ignores_the_condition_is_refused(seen: Objects, proxy: Proxy) -> None:
    call = seen.kind.fs.call_s3  # type: ignore[attr-defined]

    def deaf(method: str, **arguments: object) -> object:
        arguments.pop("IfNoneMatch", None)
        return call(method, **arguments)

    seen.kind.fs.call_s3 = deaf  # type: ignore[attr-defined]
    try:
        with pytest.raises(ConfigError, match=r"ignores create-only writes.*run\.single_writer: true"):
            seen.probe(new_token())
    finally:
        seen.kind.fs.call_s3 = call  # type: ignore[attr-defined]


def test_a_store_that_does_not_know_the_condition_is_refused(seen: Objects, proxy: Proxy) -> None:
    proxy.spoil(Fault("answer", times=9, status=501, code="NotImplemented"))
    with pytest.raises(ConfigError, match=r"has no create-only writes.*run\.single_writer: true"):
        seen.probe(new_token())


def test_a_single_writer_looks_puts_and_reads_back(seen: Objects, proxy: Proxy, hasty: None) -> None:
    alone = Objects(seen.url, single_writer=True)
    proxy.forget()
    assert alone.create("a", b"mine", "mine")
    assert [one.method for one in proxy.seen] == ["GET", "PUT", "GET"]
    assert not alone.create("a", b"yours", "yours")
    proxy.spoil(Fault("reset-after"))
    assert alone.create("b", b"mine", "mine")
    assert alone.create("b", b"mine", "mine")


def big_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> tuple[Path, bytes]:
    """A file of so many parts of the least size that S3 takes."""
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    data = os.urandom(1 << 20) * (5 * parts)
    source = tmp_path / "big"
    source.write_bytes(data)
    return source, data


@pytest.mark.parametrize("kind_of_fault", ["answer", "reset-before", "reset-after"])
def test_a_large_file_goes_in_parts_and_a_failed_part_goes_alone_again(
    spoilt: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind_of_fault: str
) -> None:
    source, data = big_file(tmp_path, monkeypatch, 3)
    proxy.spoil(
        Fault(kind_of_fault, path="partNumber=2", status=503, code="SlowDown"),
        Fault(kind_of_fault, method="POST", path="uploadId", status=500),
        Fault(kind_of_fault, method="POST", path="uploads", status=500),
    )
    spoilt.put_file("a", source)
    assert spoilt.read("a") == data
    assert proxy.count("PUT", "partNumber") == 4


def test_a_large_file_that_cannot_be_put_leaves_no_parts_behind(
    spoilt: Objects, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = big_file(tmp_path, monkeypatch, 3)
    proxy.spoil(Fault("answer", path="partNumber=3", times=99, status=403, code="AccessDenied"))
    with pytest.raises(InfrastructureError, match="permission is missing"):
        spoilt.put_file("a", source)
    bucket = spoilt.root.split("/")[0]
    assert not spoilt.kind.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")  # type: ignore[attr-defined]
    assert not spoilt.exists("a")


def test_memory_does_not_grow_with_a_file(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = big_file(tmp_path, monkeypatch, 12)
    size, objects = len(data), Objects(s3)
    del data
    objects.put("warm", b"")
    tracemalloc.start()
    objects.put_file("a", source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert objects.size("a") == size
    assert peak < 2 * (kind.PARTS_AT_ONCE + 1) * (5 << 20) < size, "the client holds a copy of each part under way"


def test_a_listing_holds_one_page_at_a_time_and_a_folder_is_not_its_namesakes(seen: Objects, proxy: Proxy) -> None:
    for name in ("commits/g1/a", "commits/g1/b", "commits/g10/c", "commits/g1x"):
        seen.put(name, b"1")
    proxy.forget()
    assert [entry.path for entry in seen.list("commits/g1")] == ["commits/g1/a", "commits/g1/b"]
    assert proxy.count("GET") == 1


def test_a_listing_sees_what_another_process_wrote_and_deleted(seen: Objects, moto: str) -> None:
    import fsspec

    other = fsspec.filesystem("s3", endpoint_url=moto, key="x", secret="y", skip_instance_cache=True)
    assert not seen.exists("a") and not list(seen.list("x"))
    other.pipe_file(f"{seen.root}/a", b"1")
    other.pipe_file(f"{seen.root}/x/b", b"1")
    assert seen.exists("a") and [entry.path for entry in seen.list("x")] == ["x/b"]
    other.rm_file(f"{seen.root}/a")
    assert not seen.exists("a")


def test_the_users_own_options_of_the_client_stay(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    options = {**fsspec.config.conf["s3"], "config_kwargs": {"s3": {"addressing_style": "path"}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    used = Objects(s3).kind.fs.config_kwargs  # type: ignore[attr-defined]
    assert used["s3"] == {"addressing_style": "path"} and used["retries"]["total_max_attempts"] == 1


ODD = ("a b/c", "ü/日本", "100%/%41", "q?v=1&w=2/z", "h#frag/z", "a+b=c;,/[*]", "x//y", "a/../b", " lead", "a:b@c/~")


@pytest.mark.parametrize("name", ODD)
def test_any_name_of_a_folder_is_itself(s3: str, name: str) -> None:
    """Nothing in it is taken for a pattern, an escape, a query or a way up."""
    bucket = s3.rsplit("/", 2)[0]
    objects, beside = Objects(f"{bucket}/{name}"), Objects(bucket)
    assert objects.create("x/1", b"t", "t") and not objects.create("x/1", b"u", "u")
    objects.put("x/2", b"two")
    assert [entry.path for entry in objects.list("x")] == ["x/1", "x/2"]
    assert [entry.path for entry in beside.list("")] == [f"{name}/x/1", f"{name}/x/2"]
    assert objects.read("x/1") == b"t" and objects.size("x/2") == 3
    objects.delete("x/1")
    assert not objects.exists("x/1")


def test_a_name_that_would_be_cut_is_refused(s3: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be opened as a store.*\?versionId="):
        Objects(f"{s3}?versionId=7")


def test_a_wrong_address_is_said_in_words(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {**fsspec.config.conf["s3"], "endpoint_url": "nonsense"})
    with pytest.raises(ConfigError, match=r"address or options are wrong \(Invalid endpoint: nonsense"):
        Objects(s3).probe(new_token())
