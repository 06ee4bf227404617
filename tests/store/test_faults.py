"""What goes wrong between us and an object store, over real HTTP: nothing lost, written twice or waited for in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.conftest import SECRET
from tests.store.proxy import Fault, Proxy
from tests.store.test_objects import race
from vidgen.errors import ConfigError, InfrastructureError, UserError
from vidgen.fleet.failures import classify
from vidgen.store import retry
from vidgen.store.objects import Objects, new_token

TEMPORARY = {
    "internal error": Fault("answer", times=2),
    "throttled": Fault("answer", times=2, status=503, code="SlowDown"),
    "too many requests": Fault("answer", times=2, status=429, code="TooManyRequests"),
    "bad gateway": Fault("answer", times=2, status=502, code="BadGateway"),
    "conflict": Fault("answer", times=2, status=409, code="ConditionalRequestConflict"),
    "damaged on the way": Fault("answer", times=2, status=400, code="BadDigest"),
    "cut on the way": Fault("answer", times=2, status=400, code="IncompleteBody"),
    "request timeout": Fault("answer", times=2, status=400, code="RequestTimeout"),
    "reset before": Fault("reset-before", times=2),
    "reset after": Fault("reset-after", times=1),
    "answer lost": Fault("lost-answer", times=1, status=500),
    "answer lost to throttling": Fault("lost-answer", times=1, status=503, code="SlowDown"),
}
FINAL = {
    "permission": (403, "AccessDenied", "permission is missing"),
    "wrong key": (403, "InvalidAccessKeyId", "credentials"),
    "wrong secret": (403, "SignatureDoesNotMatch", "credentials"),
    "expired": (400, "ExpiredToken", "credentials"),
    "clock skew": (403, "RequestTimeTooSkewed", "clock"),
    "no bucket": (404, "NoSuchBucket", "no such bucket"),
    "region": (301, "PermanentRedirect", "another region"),
    "malformed": (400, "InvalidRequest", "does not accept"),
}


def spoil(proxy: Proxy, fault: Fault, **changes: object) -> None:
    proxy.spoil(Fault(**{**vars(fault), **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_create_whose_outcome_is_unknown_is_ours_once_and_stays_ours(
    spoilt: Objects, proxy: Proxy, name: str
) -> None:
    spoil(proxy, TEMPORARY[name])
    assert spoilt.create("a.json", b"mine 1", "mine")
    assert spoilt.read("a.json") == b"mine 1"
    assert not spoilt.create("a.json", b"yours 2", "yours")


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_create_that_lost_is_told_so_whatever_happens_on_the_way(spoilt: Objects, proxy: Proxy, name: str) -> None:
    assert spoilt.create("a.json", b"theirs 1", "theirs")
    spoil(proxy, TEMPORARY[name])
    assert not spoilt.create("a.json", b"mine 2", "mine")
    assert spoilt.read("a.json") == b"theirs 1"


@pytest.mark.parametrize("name", TEMPORARY)
def test_puts_reads_listings_and_deletes_get_through_temporary_trouble(
    spoilt: Objects, proxy: Proxy, name: str, tmp_path: Path
) -> None:
    fault, source = TEMPORARY[name], tmp_path / "file"
    source.write_bytes(b"file")
    spoil(proxy, fault)
    spoilt.put("a", b"put")
    spoil(proxy, fault)
    spoilt.put_file("b", source)
    methods = ("GET", "DELETE") if fault.status == 400 else ("GET", "HEAD", "DELETE")
    for method in methods:  # an answer to HEAD has no body that could tell one 400 from another
        spoil(proxy, fault, method=method)
    assert spoilt.read("a") == b"put"
    assert spoilt.size("b") == 4
    spoilt.delete("a")
    spoil(proxy, fault, method="GET", path="list-type")
    assert [entry.path for entry in spoilt.list("")] == ["b"]


def test_a_412_that_another_writer_caused_is_read_back(spoilt: Objects, proxy: Proxy) -> None:
    spoilt.put("a.json", b"theirs 1")
    spoil(proxy, Fault("answer", status=412, code="PreconditionFailed"))
    assert not spoilt.create("a.json", b"mine 2", "mine")


def test_a_412_about_an_object_that_is_gone_is_tried_again(spoilt: Objects, proxy: Proxy) -> None:
    spoil(proxy, Fault("answer", status=412, code="PreconditionFailed"))
    assert spoilt.create("a.json", b"mine 2", "mine")
    assert spoilt.read("a.json") == b"mine 2"


def test_of_many_writers_behind_a_failing_store_exactly_one_creates(spoilt: Objects, proxy: Proxy) -> None:
    for fault in TEMPORARY.values():
        spoil(proxy, fault)
    assert race(spoilt) == [spoilt.read("race")]


@pytest.mark.parametrize("kind", ["truncate", "slow"])
def test_a_body_that_comes_cut_or_too_slowly_is_read_again_whole(spoilt: Objects, proxy: Proxy, kind: str) -> None:
    data = bytes(range(256)) * 400
    spoilt.put("a", data)
    proxy.spoil(Fault(kind, method="GET", seconds=4.0))
    proxy.forget()
    assert spoilt.read("a") == data
    assert proxy.count("GET") == 2


def test_a_listing_goes_on_at_the_page_that_failed(
    spoilt: Objects, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        spoilt.put(f"x/{number}", b"")
    call = spoilt.kind.fs.call_s3  # type: ignore[attr-defined]
    monkeypatch.setattr(
        spoilt.kind.fs,  # type: ignore[attr-defined]
        "call_s3",
        lambda method, **arguments: call(method, **{**arguments, **({"MaxKeys": 3} if "list" in method else {})}),
    )
    proxy.forget()
    proxy.spoil(Fault("answer", method="GET", path="continuation-token", times=2, status=503, code="SlowDown"))
    assert [entry.path for entry in spoilt.list("x")] == [f"x/{number}" for number in range(7)]
    assert proxy.count("GET", "list-type") == 3 + 2


@pytest.mark.parametrize("name", FINAL)
def test_what_only_a_person_can_mend_is_said_at_once_in_words(spoilt: Objects, proxy: Proxy, name: str) -> None:
    status, code, words = FINAL[name]
    proxy.spoil(Fault("answer", times=100, status=status, code=code))
    with pytest.raises(ConfigError, match=words) as told:
        spoilt.create("a.json", b"mine", "mine")
    most = 2 if name == "region" else 1  # botocore asks for the region itself, once
    assert proxy.count("PUT") <= most, "a final error is not tried again"
    assert code in str(told.value) and f"{spoilt.url}/a.json" in str(told.value)
    assert classify(told.value) == "infrastructure", "it says nothing about the item"


def test_trouble_that_does_not_end_is_an_infrastructure_error_that_says_how_long(
    spoilt: Objects, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PATIENCE", 1.0)
    spoilt.put("warm", b"")
    proxy.forget()
    proxy.spoil(Fault("answer", times=1000, status=503, code="SlowDown"))
    with pytest.raises(InfrastructureError, match=r"fewer requests \(503 SlowDown.*gave up after \d+ tries") as told:
        spoilt.put("a", b"x")
    assert not isinstance(told.value, UserError)
    assert 3 <= proxy.count("PUT") <= 30


def test_pauses_between_tries_double_and_differ_from_writer_to_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = [0.0]
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: (slept.append(seconds), clock.append(clock[-1] + seconds)))
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[-1])

    def fail() -> None:
        raise retry.Unsettled("x")

    with pytest.raises(InfrastructureError):
        retry.tried(fail, lambda error: None, "a", patience=120.0)
    for number, seconds in enumerate(slept):
        whole = min(retry.FIRST_PAUSE * 2**number, retry.LONGEST_PAUSE)
        assert whole / 2 <= seconds <= whole
    assert len({round(seconds / min(0.1 * 2**n, 10.0), 6) for n, seconds in enumerate(slept)}) > 5
    assert 100.0 < sum(slept) <= 120.0


def test_a_store_that_never_answered_is_given_up_sooner_and_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(retry, "FIRST_PATIENCE", 0.3)
    monkeypatch.setitem(fsspec.config.conf, "s3", {**fsspec.config.conf["s3"], "endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(ConfigError, match=r"cannot be written: .*cannot be reached") as told:
        Objects(s3).probe(new_token())
    assert s3 in str(told.value) and SECRET not in str(told.value)


def test_a_bucket_that_is_not_there_is_a_mistake_of_the_configuration(s3: str, hasty: None) -> None:
    with pytest.raises(ConfigError, match="no such bucket"):
        Objects("s3://nobody-made-this-bucket/x").probe(new_token())
    with pytest.raises(ConfigError, match="no such bucket"):
        list(Objects("s3://nobody-made-this-bucket/x").list("data"))


def test_a_bug_of_ours_is_not_tried_again(spoilt: Objects) -> None:
    calls: list[int] = []

    def broken(name: str) -> bytes:
        calls.append(1)
        raise KeyError("bug")

    spoilt.kind.read = broken  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        spoilt.read("a")
    assert calls == [1]
