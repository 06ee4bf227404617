"""Google Cloud Storage, by gcsfs.

Create-only is `ifGenerationMatch=0` (gcsfs's mode="create"). The plain filesystem is used, not the one that `gs://`
opens: that asks another service for the kind of bucket before every request, for which a writer of objects needs
neither the answer nor the permission. Its request is used without its own tries.
"""

from __future__ import annotations

import inspect
from datetime import datetime
from functools import cache
from typing import Any

from vidgen.redaction import Secrets
from vidgen.store import retry
from vidgen.store.kind import PART_BYTES, Entry, Trouble

PAGE = 1000


class Google:
    """One bucket's objects. Needs the extra `gcs`."""

    def __init__(self, url: str) -> None:
        kind = _filesystem()
        self.fs, self.root = kind(use_listings_cache=False), str(kind._strip_protocol(url))
        self.secrets = Secrets(self.fs.storage_options)

    def create(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(name, data, mode="create")

    def put(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(name, data)

    def put_file(self, name: str, source: str) -> None:
        self.fs.put_file(source, name, chunksize=PART_BYTES)

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(name)
        return data

    def head(self, name: str) -> Entry | None:
        bucket, key, _ = self.fs.split_path(name)
        try:
            return _entry(bucket, self.fs.call("GET", "b/{}/o/{}", bucket, key, json_out=True))
        except FileNotFoundError:
            return None

    def page(self, folder: str, cursor: str | None) -> tuple[list[Entry], str | None]:
        bucket, key, _ = self.fs.split_path(folder)
        wanted = {"prefix": f"{key.rstrip('/')}/" if key else None, "pageToken": cursor, "maxResults": PAGE}
        found = self.fs.call("GET", "b/{}/o", bucket, json_out=True, **wanted)
        return [_entry(bucket, one) for one in found.get("items", ())], found.get("nextPageToken")

    def delete(self, name: str) -> None:
        self.fs.rm_file(name)

    def diagnose(self, error: Exception) -> Trouble | None:
        import aiohttp
        import requests
        from gcsfs.retry import ChecksumError, HttpError
        from google.auth import exceptions as auth

        if isinstance(error, HttpError):
            status = int(error.code or 500)
            if status == 401 and "Invalid Credentials" in str(error.message):  # a token that ran out on the way
                return Trouble(f"the store does not take our token ({status}: {error.message})", again=True)
            return retry.answered(status, "", str(error.message))
        if isinstance(error, auth.TransportError):
            return retry.unreachable(error)
        if isinstance(error, auth.GoogleAuthError):
            return Trouble(f"no credentials for this store were found, or they are not accepted ({error})", again=False)
        lost = (aiohttp.ClientError, requests.RequestException, ChecksumError, ConnectionError, TimeoutError)
        if isinstance(error, lost):
            return retry.unreachable(error)
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and text.startswith("Forbidden"):  # all that gcsfs leaves of a 403
            return retry.answered(403, "", text)
        if isinstance(error, ValueError):
            return Trouble(f"the store does not accept the request ({text})", again=False)
        return None


@cache
def _filesystem() -> Any:
    """gcsfs's plain class, whose requests are made once."""
    from gcsfs.core import GCSFileSystem

    class Plain(GCSFileSystem):
        _request = inspect.unwrap(GCSFileSystem._request)

    return Plain


def _entry(bucket: str, one: dict[str, Any]) -> Entry:
    updated = datetime.fromisoformat(one["updated"].replace("Z", "+00:00"))
    return Entry(f"{bucket}/{one['name']}", int(one["size"]), updated.timestamp())
