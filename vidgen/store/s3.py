"""S3 and what speaks its protocol (MinIO, R2, Ceph, ...), by the requests below s3fs.

s3fs alone would look before it reads, try again by its own rule and hold half a gigabyte for a large file; its client
and its credentials are used, its verbs are not. Create-only is `If-None-Match: *`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from vidgen import faults
from vidgen.errors import InfrastructureError
from vidgen.redaction import Secrets
from vidgen.store import retry
from vidgen.store.kind import CONNECTIONS, PART_BYTES, PARTS_AT_ONCE, Entry, Trouble

MOST_PARTS = 10_000
T = TypeVar("T")


class S3:
    """One bucket's objects. Needs the extra `s3`."""

    def __init__(self, url: str) -> None:
        if "?versionId=" in url:  # s3fs would cut every name here, so that all objects were one
            raise ValueError("a folder's name cannot hold ?versionId=")
        given = {**fsspec.config.conf.get("s3a", {}), **fsspec.config.conf.get("s3", {})}.get("config_kwargs", {})
        once = {"retries": {"total_max_attempts": 1, "mode": "standard"}, "max_pool_connections": CONNECTIONS}
        self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False, config_kwargs={**given, **once})
        self.fs.retries = 1
        self.secrets = Secrets(self.fs.storage_options)

    def create(self, name: str, data: bytes) -> None:
        try:
            self._call("put_object", name, Body=data, IfNoneMatch="*")
        except OSError as error:
            status = _answer(error)[0]
            if status == 412:
                raise FileExistsError(name) from error
            if status == 501:
                raise NotImplementedError("If-None-Match") from error
            raise

    def put(self, name: str, data: bytes) -> None:
        self._call("put_object", name, Body=data)

    def put_file(self, name: str, source: str) -> None:
        size = os.path.getsize(source)
        if size > 2 * PART_BYTES:
            self._put_parts(name, source, size)
            return
        with open(source, "rb") as file:
            self.put(name, file.read())

    def _put_parts(self, name: str, source: str, size: int) -> None:
        """Each part has tries of its own, since a file of a thousand parts would else never get through."""
        length = max(PART_BYTES, -(-size // MOST_PARTS))
        with faults.around("upload begun"):
            upload = self._call("create_multipart_upload", name)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            data = os.pread(descriptor, length, number * length)
            known = {"UploadId": upload, "PartNumber": number + 1}
            with faults.around("upload part"):
                tag = self._tried(name, lambda: self._call("upload_part", name, Body=data, **known))["ETag"]
            return {"PartNumber": number + 1, "ETag": tag}

        def complete() -> None:
            try:
                self._call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": parts})
            except FileNotFoundError as error:
                # An earlier try of ours, of which we did not hear, ended this upload; or somebody aborted it.
                head = self.head(name)
                if head is None or head.size != size:
                    raise InfrastructureError(f"{name}: its upload in parts was ended by somebody else") from error

        descriptor = os.open(source, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(-(-size // length))))
            with faults.around("upload ended"):
                self._tried(name, complete)
        except BaseException:
            self._abort(name, upload)
            raise
        finally:
            os.close(descriptor)

    def _tried(self, name: str, act: Callable[[], T]) -> T:
        return retry.tried(act, self.diagnose, name, patience=retry.PATIENCE, clean=self.secrets.clean)

    def _abort(self, name: str, upload: str) -> None:
        """What was sent of an upload that failed costs money until it is aborted; the bucket's own rule for unfinished
        uploads is the second chance."""
        try:
            self._call("abort_multipart_upload", name, UploadId=upload)
        except Exception as error:  # the failure that led here is the one to tell
            if self.diagnose(error) is None and not isinstance(error, FileNotFoundError):
                raise

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(name, max_concurrency=1)  # more than one would ask for the size first
        return data

    def head(self, name: str) -> Entry | None:
        try:
            found = self._call("head_object", name)
        except FileNotFoundError as error:
            if self.diagnose(error) is not None:
                raise
            return None
        return Entry(name, int(found["ContentLength"]), found["LastModified"].timestamp())

    def page(self, folder: str, cursor: str | None) -> tuple[list[Entry], str | None]:
        bucket, key, _ = self.fs.split_path(folder)
        more = {"ContinuationToken": cursor} if cursor else {}
        prefix = f"{key.rstrip('/')}/" if key else ""
        found = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        entries = [
            Entry(f"{bucket}/{one['Key']}", int(one["Size"]), one["LastModified"].timestamp())
            for one in found.get("Contents", ())
        ]
        return entries, found["NextContinuationToken"] if found.get("IsTruncated") else None

    def delete(self, name: str) -> None:
        self._call("delete_object", name)

    def _call(self, method: str, name: str, **arguments: Any) -> Any:
        bucket, key, _ = self.fs.split_path(name)
        return self.fs.call_s3(method, Bucket=bucket, Key=key, **arguments)

    def diagnose(self, error: Exception) -> Trouble | None:
        import aiohttp
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        status, code, message = _answer(error)
        if status:
            return retry.answered(status, code, message)
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
            return Trouble(f"no credentials for this store were found ({error})", again=False)
        if isinstance(error, boto.ProfileNotFound | boto.TokenRetrievalError | boto.NoAuthTokenError):
            return Trouble(f"the credentials of this store cannot be used ({error})", again=False)
        lost = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.ResponseStreamingError)
        if isinstance(error, (*lost, ResponseParserError, aiohttp.ClientError, ConnectionError, TimeoutError)):
            return retry.unreachable(error)
        if isinstance(error, boto.BotoCoreError | ValueError):
            return Trouble(f"the store's address or options are wrong ({error})", again=False)
        return None


def _answer(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of the store's answer; (0, "", "") if it gave none."""
    for one in retry.causes(error):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            told = answer["Error"]
            code, message = str(told.get("Code", "")), str(told.get("Message", ""))
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or (int(code) if code.isdigit() else 500)
            return int(status), "" if code.isdigit() else code, message
    return 0, "", ""
