"""OTLP receivers that keep what they are sent, over http and over grpc. A helper, not a test."""

import gzip
import http.server
import ssl
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

Requests = list[ExportTraceServiceRequest]
_INFLATE = {None: bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}


@dataclass
class Reply:
    """How an endpoint answers one request; the default is success."""

    status: Any = 200  # of grpc: a StatusCode other than OK
    headers: dict[str, str] = field(default_factory=dict)
    metadata: tuple[tuple[str, bytes], ...] = ()  # of grpc
    rejected: int = 0
    delay_s: float = 0.0


@dataclass
class Endpoint:
    """A receiver under a script: its first requests get `replies`, all others success."""

    url: str
    replies: deque[Reply]
    received: Requests = field(default_factory=list)  # those that were accepted
    headers: list[dict[str, str]] = field(default_factory=list)  # of every request; lower case
    sizes: list[int] = field(default_factory=list)  # bytes on the wire (http)

    def take(self) -> Reply:
        return self.replies.popleft() if self.replies else Reply()

    @property
    def num_spans(self) -> int:
        return sum(
            len(scope_spans.spans)
            for request in list(self.received)
            for resource_spans in request.resource_spans
            for scope_spans in resource_spans.scope_spans
        )


def _response(reply: Reply) -> ExportTraceServiceResponse:
    response = ExportTraceServiceResponse()
    if reply.rejected:
        response.partial_success.rejected_spans = reply.rejected
        response.partial_success.error_message = "too many of them"
    return response


@contextmanager
def http_endpoint(
    replies: Sequence[Reply] = (), *, tls: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[Endpoint]:
    stopped = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as those of real servers do

        def do_POST(self) -> None:
            wire = self.rfile.read(int(self.headers["Content-Length"]))
            endpoint.headers.append({key.lower(): value for key, value in self.headers.items()})
            endpoint.sizes.append(len(wire))
            reply = endpoint.take()
            stopped.wait(reply.delay_s)
            if reply.status == 200 and self.path == "/v1/traces":
                body = _INFLATE[self.headers["Content-Encoding"]](wire)
                endpoint.received.append(ExportTraceServiceRequest.FromString(body))
                answer = _response(reply).SerializeToString()
            else:
                answer = b"no"
            self.send_response(reply.status if self.path == "/v1/traces" else 404)
            for key, value in reply.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients may go, or come without TLS."""

    server = Server(("127.0.0.1", port), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "http" if tls is None else "https"
    endpoint = Endpoint(f"{scheme}://127.0.0.1:{server.server_address[1]}", deque(replies))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield endpoint
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def grpc_endpoint(
    replies: Sequence[Reply] = (), *, tls: grpc.ServerCredentials | None = None
) -> Iterator[Endpoint]:
    stopped = threading.Event()

    class Servicer(TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
            endpoint.headers.append(dict(context.invocation_metadata()))
            reply = endpoint.take()
            stopped.wait(reply.delay_s)
            if reply.status != 200:
                context.set_trailing_metadata(reply.metadata)
                context.abort(reply.status, "no")
            endpoint.received.append(request)
            return _response(reply)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Servicer(), server)
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", tls)
    scheme = "http" if tls is None else "https"
    endpoint = Endpoint(f"{scheme}://127.0.0.1:{port}", deque(replies))
    server.start()
    try:
        yield endpoint
    finally:
        stopped.set()
        server.stop(None).wait(5)


@contextmanager
def http_receiver() -> Iterator[tuple[str, Requests]]:
    with http_endpoint() as endpoint:
        yield endpoint.url, endpoint.received


@contextmanager
def grpc_receiver() -> Iterator[tuple[str, Requests]]:
    with grpc_endpoint() as endpoint:
        yield endpoint.url, endpoint.received
