"""Azure Blob Storage, by adlfs and, for what it lacks, its service client.

Create-only is `If-None-Match: *` (adlfs's mode="create"). adlfs lists a whole folder at once and looks twice where one
request would do, so listing and size are asked of the client.
"""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.asyn import sync

from vidgen.redaction import Secrets
from vidgen.store import retry
from vidgen.store.kind import PARTS_AT_ONCE, Entry, Trouble

PART_TRIES = 5
PAGE = 5000


class Azure:
    """One container's blobs. Needs the extra `azure`."""

    def __init__(self, url: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.secrets = Secrets(self.fs.storage_options)
        policy = getattr(getattr(self.fs.service_client, "_config", None), "retry_policy", None)
        if policy is not None:
            policy.total_retries = 0

    def create(self, name: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(name, data, mode="create")
        except FileExistsError as error:
            if _answer(error)[1] not in ("", "BlobAlreadyExists"):
                raise retry.Unsettled(f"another writer was at the same object ({_answer(error)[1]})") from error
            raise

    def put(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(name, data)

    def put_file(self, name: str, source: str) -> None:
        # Blocks of a large file have tries of their own, by the client: one of hundreds would else fail them all.
        self.fs.put_file(source, name, max_concurrency=PARTS_AT_ONCE, retry_total=PART_TRIES)

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(name)
        return data

    def head(self, name: str) -> Entry | None:
        from azure.core.exceptions import ResourceNotFoundError

        async def ask() -> Any:
            container, blob, _ = self.fs.split_path(name)
            async with self.fs.service_client.get_blob_client(container=container, blob=blob) as client:
                return await client.get_blob_properties()

        try:
            found = sync(self.fs.loop, ask)
        except ResourceNotFoundError as error:
            if self.diagnose(error) is not None:
                raise
            return None
        return Entry(name, int(found.size), found.last_modified.timestamp())

    def page(self, folder: str, cursor: str | None) -> tuple[list[Entry], str | None]:
        container, path, _ = self.fs.split_path(f"{folder.rstrip('/')}/")

        async def ask() -> tuple[list[Entry], str | None]:
            async with self.fs.service_client.get_container_client(container=container) as client:
                listed = client.list_blobs(name_starts_with=path, include=["metadata"], results_per_page=PAGE)
                pages = listed.by_page(continuation_token=cursor)
                async for page in pages:
                    entries = [
                        Entry(f"{container}/{blob.name}", int(blob.size), blob.last_modified.timestamp())
                        async for blob in page
                        if not _is_folder(blob)
                    ]
                    return entries, pages.continuation_token or None
            return [], None

        return sync(self.fs.loop, ask)

    def delete(self, name: str) -> None:
        self.fs.rm_file(name)

    def diagnose(self, error: Exception) -> Trouble | None:
        import aiohttp
        from azure.core import exceptions as azure

        status, code, message = _answer(error)
        if status:
            return retry.answered(status, code, message)
        if isinstance(error, azure.ClientAuthenticationError):
            return Trouble(f"no credentials for this store were found ({_line(error)})", again=False)
        lost = (azure.ServiceRequestError, azure.ServiceResponseError, azure.HttpResponseError)
        if isinstance(error, (*lost, aiohttp.ClientError, ConnectionError, TimeoutError)):
            return retry.unreachable(error)
        if isinstance(error, azure.AzureError | ValueError):
            return Trouble(f"the store does not accept the request ({_line(error)})", again=False)
        return None


def _is_folder(blob: Any) -> bool:
    """Accounts with a hierarchical namespace list their folders as empty blobs."""
    metadata = {str(name).lower(): value for name, value in (blob.metadata or {}).items()}
    return "true" in (metadata.get("hdi_isfolder"), metadata.get("is_directory"))


def _answer(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of the store's answer; (0, "", "") if it gave none."""
    for one in retry.causes(error):
        status = getattr(one, "status_code", None)
        if isinstance(status, int):
            code = getattr(one, "error_code", None)
            return status, str(getattr(code, "value", code) or ""), _line(one)
    return 0, "", ""


def _line(error: BaseException) -> str:
    """The first line of what Azure says: others name request and time."""
    return (str(error).splitlines() or [""])[0].strip()
