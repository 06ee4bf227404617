"""Object stores that tests start: moto for S3, Azurite for Azure, a stub of the JSON API for Google.

Each is a process or thread of its own that speaks the store's real protocol over HTTP.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The published key of Azurite's one account."""


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The URL of an S3 in memory."""
    for name in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install -e ".[test]"')
    port = free_port()
    with _process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def azurite() -> Iterator[str]:
    """The connection string of an Azure in memory."""
    if importlib.util.find_spec("adlfs") is None:
        pytest.skip('adlfs is not installed: pip install -e ".[test]"')
    program = azurite_program()
    if program is None:
        pytest.skip("azurite-blob was not found: npm install azurite, in the repository or anywhere on PATH")
    port = free_port()
    command = [program, "--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    with _process([*command, "--blobHost", "127.0.0.1", "--blobPort", str(port)], port):
        yield (
            f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
        )


def azurite_program() -> str | None:
    """Where Azurite's blob service is: $AZURITE, on PATH, or installed by npm below the repository."""
    beside = ROOT / "node_modules" / ".bin" / "azurite-blob"
    given = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    return given or (str(beside) if beside.exists() else None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], port: int) -> Iterator[None]:
    """Runs a server until it answers on `port`, and ends it afterwards."""
    with tempfile.TemporaryFile("w+") as log:  # not a pipe: a server that logs each request would block on it
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(600):
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} ended at once: {log.read()[-500:]}")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def put_bucket(url: str, name: str) -> None:
    """Makes a bucket of moto; its credentials are not checked."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=30).close()
