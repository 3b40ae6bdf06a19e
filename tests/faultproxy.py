"""An HTTP proxy before an S3 server that does what networks and servers do on bad days.

The Host header passes untouched, so that signatures stay valid.
"""

import http.client
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_UNAVAILABLE = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Slower.</Message></Error>'


class Fault(Enum):
    """What happens to one request."""

    UNAVAILABLE = auto()
    """503, and the server never sees it."""
    RESET = auto()
    """The connection is closed before the server sees it."""
    LOST_ANSWER = auto()
    """The server does it; the connection is closed before its answer arrives."""
    TRUNCATED = auto()
    """The server does it; half of its answer's body arrives, then the connection is closed."""


@dataclass(frozen=True)
class Request:
    """What a plan may decide by."""

    number: int
    """Counted from 0."""
    method: str
    path: str
    """With the query."""


Plan = Callable[[Request], Fault | None]


class FaultProxy:
    """Forwards to one server; `plan` says what goes wrong."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.plan: Plan = lambda _: None
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def decide(self, method: str, path: str) -> Fault | None:
        """Note a request, and what its fate is."""
        with self._lock:
            request = Request(len(self.requests), method, path)
            self.requests.append(request)
            fault = self.plan(request)
            if fault is not None:
                self.faults.append(fault)
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Clients keep connections open; the end of a test must not wait for them.
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    # Head and body of an answer are sent one after the other: the second would wait for the first's echo.
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    timeout = 30

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.decide(self.command, self.path)
        if fault is Fault.RESET:
            self._close()
        elif fault is Fault.UNAVAILABLE:
            self.send_response(503)
            self._send([("Content-Type", "application/xml")], _UNAVAILABLE)
        else:
            status, headers, answer = self._ask(body)
            if fault is Fault.LOST_ANSWER:
                self._close()
                return
            self.send_response_only(status)
            self._send(headers, answer, truncated=fault is Fault.TRUNCATED)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream.netloc, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            dropped = ("transfer-encoding", "connection", "keep-alive")
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
            return response.status, kept, response.read()
        finally:
            upstream.close()

    def _send(self, headers: list[tuple[str, str]], body: bytes, *, truncated: bool = False) -> None:
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if truncated else body)
        if truncated:
            self._close()

    def _close(self) -> None:
        self.wfile.flush()
        # A reset, not a goodbye.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the test asks the proxy."""
