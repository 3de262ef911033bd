"""The sidecar's HTTP server: what Prometheus scrapes, and a page for people.

Owns the addresses, the headers and who may ask; what there is to be had is `documents`' business.
Only GET and HEAD. Everything here may be asked by anybody who can reach the port, so it
listens on loopback unless told otherwise, and then answers no page of another site that got a name
to point here (DNS rebinding): the Host header must name this machine's loopback.
"""

import ipaddress
import socket
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

from .documents import TEXT, Documents
from .node import Node

MAX_CLIENTS = 128  # at once; more are told to come again
_IDLE_S = 10  # without a byte from a client before its thread ends

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class TelemetryServer(ThreadingTCPServer):
    """Serves a node until `close`. Raises OSError if the address cannot be had."""

    daemon_threads = True
    allow_reuse_address = True  # a port in TIME_WAIT is free; one that is listened on is not
    request_queue_size = 128

    def __init__(self, host: str, port: int, node: Node, peers: Sequence[str] = ()) -> None:
        self.documents = Documents(node, peers)
        self.only_host: str | None = None  # the name that clients must ask for, beside loopback's
        self._clients = threading.Semaphore(MAX_CLIENTS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)
        if ipaddress.ip_address(self.server_address[0]).is_loopback:  # type: ignore[arg-type]
            self.only_host = host.lower()
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/metrics"
        threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._clients.acquire(blocking=False):
            request.settimeout(0)
            request.send(_BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._clients.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours; anything else is shown."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: TelemetryServer
    protocol_version = "HTTP/1.1"
    server_version = "onecast"
    sys_version = ""
    timeout = _IDLE_S
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads must not pass for a request
        if not self._names_this_host():
            self._send(403, TEXT, b"the Host header names another host than this one\n")
            return
        path = self.path.partition("?")[0]
        accept = self.headers.get("Accept", "")
        self._send(*self.server.documents.get(path, accept, self._address()))

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.close_connection = True  # what it sent along is not read
        self._send(405, TEXT, b"only GET and HEAD\n", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _address(self) -> str:
        """This server's, as the client has it; the port it listens on where none is named."""
        host, port = self.connection.getsockname()[:2]
        asked = self.headers.get("Host") or (f"[{host}]" if ":" in host else host)
        named = asked.rpartition("]")[2]  # what follows an IPv6 address
        return asked if ":" in named else f"{asked}:{port}"

    def _names_this_host(self) -> bool:
        header = self.headers.get("Host")
        if self.server.only_host is None or header is None:  # no browser leaves it out
            return True
        if set(header) & set("@/?#\\"):  # more than a name and a port
            return False
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.server.only_host):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _send(
        self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in {**_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent: the sidecar's stderr is the program's."""
