"""As much of Google Cloud Storage's JSON API as a writer of objects meets: multipart and resumable uploads with
ifGenerationMatch=0, reads, listings in pages, deletes. After the API's reference; there is no emulator on PyPI that
heeds the condition."""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class GoogleStub:
    """`careless` ignores the condition, as emulators do. `fail` are (method, status) of the next answers, `ahead` how
    many seconds its clock is ahead of ours."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, tuple[str, str, bool, bytearray]] = {}
        self.fail: list[tuple[str, int]] = []
        self.careless = False
        self.words = "made up by the stub"
        self.ahead = 0.0
        self.times: dict[tuple[str, str], float] = {}
        self.seen: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def bucket(self, name: str) -> str:
        """Makes a bucket; returns the URL of a folder in it."""
        self.buckets[name] = {}
        return f"gs://{name}/runs/one"

    def __enter__(self) -> GoogleStub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, target: str, body: bytes, headers: Any) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with self.lock:
            self.seen.append((method, target))
            for at, (wanted, status) in enumerate(self.fail):
                if wanted == method:
                    del self.fail[at]
                    return _error(status, self.words)
            found = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
            if found is None:
                return _error(404, "no such page")
            bucket, key = unquote(found[2]), unquote(found[3] or "")
            if bucket not in self.buckets:
                return _error(404, "The specified bucket does not exist.")
            if found[1] == "upload/":
                return self._upload(bucket, query, body, headers)
            return self._object(method, bucket, key, query)

    def _object(self, method: str, bucket: str, key: str, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        held = self.buckets[bucket]
        if not key:
            names = sorted(name for name in held if name.startswith(query.get("prefix", "")))
            names = [name for name in names if name > query.get("pageToken", "")]
            page = names[: int(query.get("maxResults", 1000))]
            more = {"nextPageToken": page[-1]} if len(page) < len(names) else {}
            return _json({"items": [self._about(bucket, name) for name in page], **more})
        if key not in held:
            return _error(404, f"No such object: {bucket}/{key}")
        if method == "DELETE":
            del held[key]
            return 204, b"", {}
        if query.get("alt") == "media":
            return 200, held[key], {}
        return _json(self._about(bucket, key))

    def _upload(
        self, bucket: str, query: dict[str, str], body: bytes, headers: Any
    ) -> tuple[int, bytes, dict[str, str]]:
        create = query.get("ifGenerationMatch") == "0" and not self.careless
        if "upload_id" in query:
            _, key, create, data = self.uploads[query["upload_id"]]
            data += body
            last, total = re.fullmatch(r"bytes \d+-(\d+)/(\d+)", headers["Content-Range"]).groups()  # type: ignore[union-attr]
            if int(last) + 1 < int(total):
                return 308, b"", {"Range": f"bytes=0-{last}"}
            return self._store(bucket, key, bytes(data), create)
        if query.get("uploadType") == "resumable":
            number = str(len(self.uploads))
            self.uploads[number] = (bucket, query["name"], create, bytearray())
            return 200, b"", {"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"}
        boundary = re.search(r'boundary="([^"]+)"', headers["Content-Type"])[1].encode()  # type: ignore[index]
        _, about, content, _ = body.split(b"--" + boundary)
        key = json.loads(about.split(b"\n\n", 1)[1])["name"]
        return self._store(bucket, key, content.split(b"\n\n", 1)[1].removesuffix(b"\n"), create)

    def _store(self, bucket: str, key: str, data: bytes, create: bool) -> tuple[int, bytes, dict[str, str]]:
        if create and key in self.buckets[bucket]:
            return _error(412, "At least one of the pre-conditions you specified did not hold.")
        self.buckets[bucket][key] = data
        self.times[bucket, key] = time.time() + self.ahead
        return _json(self._about(bucket, key))

    def _about(self, bucket: str, key: str) -> dict[str, str]:
        size = str(len(self.buckets[bucket][key]))
        updated = datetime.fromtimestamp(self.times[bucket, key], timezone.utc).isoformat().replace("+00:00", "Z")
        return {"bucket": bucket, "name": key, "size": size, "updated": updated, "generation": "1"}

    def _handler(stub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, data, headers = stub.answer(self.command, self.path, body, self.headers)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_PUT = do

        return Handler


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _error(status: int, message: str) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps({"error": {"code": status, "message": message}}).encode(), {}
