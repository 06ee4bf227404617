"""Stores over real HTTP, one server of each kind for all tests, a fresh bucket for each."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tests.store import servers
from tests.store.google_stub import GoogleStub
from tests.store.proxy import Proxy
from vidgen.store import retry
from vidgen.store.objects import Objects

SECRET = "planted+Secret/0123456789abcdefghijklmnop"
"""The secret key that every test of S3 gives, and that nothing may show."""


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with servers.moto() as url:
        yield url


@pytest.fixture(scope="session")
def azurite() -> Iterator[str]:
    with servers.azurite() as connection:
        yield connection


@pytest.fixture(scope="session")
def proxies(moto: str) -> Iterator[Proxy]:
    """One for all tests: opening a client of S3 for an address that is new takes a while."""
    with Proxy(moto) as between:
        yield between


@pytest.fixture
def proxy(proxies: Proxy) -> Iterator[Proxy]:
    """Between us and moto; as yet it spoils nothing and has seen nothing."""
    proxies.faults.clear()
    proxies.forget()
    yield proxies
    proxies.faults.clear()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses and patience of a test, not of a cluster."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(retry, "PATIENCE", 3.0)
    monkeypatch.setattr(retry, "FIRST_PATIENCE", 3.0)


@pytest.fixture
def s3_at(moto: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a bucket; S3 is then reached at the endpoint it is given. Returns the URL of a folder in the bucket."""

    def open_at(endpoint: str) -> str:
        options = {"endpoint_url": endpoint, "key": "AKIAPLANTEDKEYID", "secret": SECRET}
        monkeypatch.setitem(
            fsspec.config.conf,
            "s3",
            {**options, "client_kwargs": {"region_name": "us-east-1"}, "config_kwargs": {"read_timeout": 2}},
        )
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        servers.put_bucket(moto, bucket)
        return f"s3://{bucket}/runs/one"

    return open_at


@pytest.fixture
def s3(moto: str, s3_at: Callable[[str], str]) -> str:
    """A folder in a bucket of moto."""
    return s3_at(moto)


@pytest.fixture
def spoilt(proxy: Proxy, s3_at: Callable[[str], str], hasty: None) -> Objects:
    """A store behind the proxy."""
    return Objects(s3_at(proxy.url))


@pytest.fixture
def azure(azurite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a container of Azurite."""
    monkeypatch.setitem(fsspec.config.conf, "abfs", {"connection_string": azurite})
    container = f"container-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("abfs").mkdir(container)
    return f"abfs://{container}/runs/one"


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleStub]:
    with GoogleStub() as stub:
        monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": stub.url, "token": "anon", "project": "p"})
        yield stub


@pytest.fixture(params=["file", "memory", "s3", "azure", "google"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """An empty store of each kind."""
    if request.param == "file":
        return Objects(str(tmp_path / "out"))
    if request.param == "memory":
        return Objects(f"memory://{uuid.uuid4().hex}")
    if request.param == "google":
        return Objects(request.getfixturevalue("google").bucket("one"))
    return Objects(request.getfixturevalue(request.param))
