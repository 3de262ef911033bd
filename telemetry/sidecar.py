"""The sidecar: one process per node that reads the rings, so that no worker has to.

    python -P -m onecast.telemetry.sidecar --run-dir D --local-world-size N --engine-id ID
                                           --settings JSON

Owns its own life: it says when it is ready, serves `/metrics`, `/report` and `/healthz`, and ends
a moment after the last rank has closed its ring or died, once everything is written. Then
it removes the run directory. The pipes' language is drawn in `sidecar_process`.
"""

import argparse
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import MetricsHandler
from prometheus_client.registry import CollectorRegistry

from .metrics import TelemetryCollector
from .node import Node
from .otlp import OtlpExport, make_exporter
from .run_directory import remove_run_dir
from .settings import TelemetrySettings
from .trace_file import TraceFile

# A rank that has not appeared by then, while all others have ended, never will.
_STRAGGLER_S = 5.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # a port in TIME_WAIT is free; one that is listened on is not

    def __init__(self, address: tuple[str, int], node: Node) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(TelemetryCollector(node.snapshot))
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(
            address, type("Handler", (_Handler,), {"registry": registry, "node": node})
        )


class _Handler(MetricsHandler):
    """prometheus_client's handler chooses the format; this adds two paths beside it."""

    node: Node
    timeout = 10  # seconds without a byte from a client before its thread ends

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            super().do_GET()
        elif path == "/report":
            self._send(200, "application/json", json.dumps(self.node.report()))
        elif path == "/healthz":
            self._send(200, "text/plain; charset=utf-8", "ok\n")
        else:
            self._send(404, "text/plain; charset=utf-8", "/metrics, /report or /healthz\n")

    def _send(self, status: int, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _say(message: dict[str, Any]) -> None:
    """One line to the starter; that it may be gone is no reason to stop."""
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer_requests(node: Node) -> None:
    for line in sys.stdin:
        if line.strip() == "report":
            _say({"report": node.report()})


def _serve(settings: TelemetrySettings, node: Node) -> _Server | None:
    if settings.metrics_port is None:
        return None
    host, port = settings.metrics_host, settings.metrics_port
    try:
        return _Server((host, port), node)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"metrics port {port} on {host} is already in use") from error
        raise ValueError(f"cannot listen on {host}, metrics port {port}: {error}") from error


def run(
    run_dir: str, local_world_size: int, engine_id: str, settings: TelemetrySettings
) -> dict[str, Any]:
    """Live until the ranks have ended; returns the final report."""
    trace_file = None
    if settings.trace_file is not None:
        trace_file = TraceFile(
            settings.trace_file,
            engine_id=engine_id,
            service_name=settings.service_name,
            max_steps=settings.trace_steps,
            max_spans=settings.trace_spans,
        )
    otlp = None
    if settings.otlp_endpoint is not None:
        otlp = OtlpExport(make_exporter(settings), settings, engine_id)
    node = Node(
        run_dir,
        engine_id=engine_id,
        local_world_size=local_world_size,
        trace_file=trace_file,
        otlp=otlp,
    )
    server = _serve(settings, node)
    if server is not None:
        threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    threading.Thread(target=_answer_requests, args=(node,), name="pipe", daemon=True).start()
    _say({"ready": True, "port": server.server_address[1] if server is not None else None})

    ended_since: float | None = None
    while True:
        # Asked before the poll, so that the poll sees all that came before the end.
        ended, complete = node.ended, node.complete
        node.poll()
        if ended and complete:
            break
        if not ended:
            ended_since = None
        else:
            ended_since = ended_since or time.monotonic()
            if time.monotonic() - ended_since > _STRAGGLER_S:
                break
        time.sleep(settings.poll_interval_s)
    node.finish()
    if server is not None:
        server.shutdown()
        server.server_close()
    return node.report()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m onecast.telemetry.sidecar")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--local-world-size", type=int, required=True)
    parser.add_argument("--engine-id", required=True)
    parser.add_argument("--settings", required=True, help="TelemetrySettings as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="onecast telemetry sidecar: %(message)s", level=logging.WARNING)
    # The exporters log each retry; one line of ours says that spans are being dropped.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the ranks end on it, and then this does
    try:
        settings = TelemetrySettings.from_json(options.settings)
        report = run(options.run_dir, options.local_world_size, options.engine_id, settings)
    except ValueError as error:
        _say({"error": str(error), "kind": "ValueError"})
        return 2
    finally:
        remove_run_dir(options.run_dir)  # the ranks' mappings stay valid
    _say({"final": report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
