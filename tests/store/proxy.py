"""A proxy that spoils chosen requests on their way to an object store, and remembers all of them.

Faults happen to the first requests that match them, and are used up; what matches none goes through untouched.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NO_BODY = (204, 304)


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose path and query match `path`.

    kind: "answer" (the store never sees it: `status` and `code` come back), "reset-before" (nor this one: the
    connection is reset), "reset-after" (the store does it, and the connection is reset before its answer),
    "lost-answer" (the same with `status` and `code` instead of a reset), "truncate" (half of the answer's body), "slow"
    (`seconds` between the halves of the body).
    """

    kind: str
    method: str = "PUT"
    path: str = ""
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    message: str = "made up by the proxy"
    seconds: float = 0.0


@dataclass
class Seen:
    method: str
    path: str
    status: int
    headers: dict[str, str] = field(repr=False, default_factory=dict)


class Proxy:
    """`url` forwards to `upstream`. Use as a context manager."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream = (host, int(port))
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spoil(self, *faults: Fault) -> None:
        with self._lock:
            self.faults += faults

    def count(self, method: str, path: str = "") -> int:
        """Requests seen so far."""
        return sum(one.method == method and re.search(path, one.path) is not None for one in self.seen)

    def forget(self) -> None:
        self.seen.clear()

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do(self) -> None:
                body = self.body()
                fault = proxy.take(self.command, self.path)
                seen = Seen(self.command, self.path, 0, dict(self.headers.items()))
                proxy.seen.append(seen)
                if fault is not None and fault.kind == "reset-before":
                    return self.reset()
                if fault is not None and fault.kind == "answer":
                    return self.error(fault, seen)
                connection = http.client.HTTPConnection(*proxy.upstream, timeout=30)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("expect", "transfer-encoding", "content-length", "connection"):
                        connection.putheader(name, value)
                connection.putheader("Content-Length", str(len(body)))
                connection.endheaders(body)
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                seen.status = answer.status
                if fault is not None and fault.kind == "reset-after":
                    return self.reset()
                if fault is not None and fault.kind == "lost-answer":
                    return self.error(fault, seen)
                self.relay(answer, data, fault)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                data = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

            def reset(self) -> None:
                """RST instead of FIN, as a dying machine or a firewall does it."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                self.wfile = open("/dev/null", "wb")  # noqa: SIM115 - what the base class flushes and closes

            def error(self, fault: Fault, seen: Seen) -> None:
                seen.status = fault.status
                data = (
                    f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>"
                ).encode()
                self.send_response(fault.status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("x-ms-error-code", fault.code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def relay(self, answer: http.client.HTTPResponse, data: bytes, fault: Fault | None) -> None:
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                if answer.status not in NO_BODY:
                    length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                    self.send_header("Content-Length", length or "0")
                self.end_headers()
                if self.command == "HEAD":
                    return
                half = len(data) // 2
                self.wfile.write(data[:half])
                self.wfile.flush()
                if fault is not None and fault.kind == "truncate":
                    self.close_connection = True
                    return
                if fault is not None and fault.kind == "slow":
                    time.sleep(fault.seconds)
                self.wfile.write(data[half:])

        return Handler
