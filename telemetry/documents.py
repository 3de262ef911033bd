"""What the sidecar's HTTP server has to give: path -> status, content type and bytes.

    /metrics      Prometheus text or OpenMetrics, as the client asks
    /sd           where the run's nodes are scraped, as Prometheus's http_sd wants it
    /report       the node's counts as JSON
    /-/healthy    whether the sidecar keeps up with its ranks' rings
    /-/ready      whether every rank of the node is there and runs
    /healthz      "ok"
    /             the live view, which reads /live.json and /hangs.json

Rendering takes the node's lock and a core. However many ask at once, one thread renders, and the
others get what it made; and nothing is rendered again before REST times the time it took (at most
MAX_AGE_S): no number of clients takes more than 1 / (1 + REST) of a core.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .live import live_view
from .metrics import MetricsPage
from .node import Node
from .page import PAGE

MAX_AGE_S = 0.25
REST = 9
STALE_S = 10.0  # without a look at the rings: not healthy

_JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
PATHS = b"/, /metrics, /sd, /report, /-/healthy, /-/ready, /healthz, /live.json, /hangs.json\n"


class Document(NamedTuple):
    status: int
    content_type: str
    body: bytes


class Rendered:
    """Bytes that are made anew when somebody asks and the last ones are too old."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._lock = threading.Lock()
        self._bytes = b""
        self._expires = 0.0

    def get(self) -> bytes:
        if time.monotonic() < self._expires:
            return self._bytes
        with self._lock:
            begin = time.monotonic()
            if begin >= self._expires:  # else another thread has just done it
                self._bytes = self._render()
                end = time.monotonic()
                self._expires = end + min(MAX_AGE_S, REST * (end - begin))
            return self._bytes


class Documents:
    """Of one node; `peers` are the other nodes' addresses, `host:port`."""

    def __init__(self, node: Node, peers: Sequence[str] = ()) -> None:
        self._node = node
        self._peers = peers
        self._page = MetricsPage(node.snapshot)
        self._metrics: dict[str, Rendered] = {}  # by content type
        self._lock = threading.Lock()
        self._rendered = {
            "/report": Rendered(lambda: json.dumps(node.report()).encode()),
            "/live.json": Rendered(lambda: json.dumps(live_view(node)).encode()),
            "/hangs.json": Rendered(lambda: json.dumps(_hangs(node)).encode()),
        }

    def get(self, path: str, accept: str, address: str) -> Document:
        """`address`: `host:port` as the client knows this node."""
        if path == "/metrics":
            content_type = self._page.content_type(accept)
            with self._lock:
                rendered = self._metrics.get(content_type)
                if rendered is None:
                    rendered = Rendered(lambda: self._page.render(content_type))
                    self._metrics[content_type] = rendered
            return Document(200, content_type, rendered.get())
        if path in self._rendered:
            return Document(200, _JSON, self._rendered[path].get())
        if path == "/sd":
            return Document(200, _JSON, self._discovery(address))
        if path == "/-/healthy":
            return self._healthy()
        if path == "/-/ready":
            return self._ready()
        if path == "/healthz":
            return Document(200, TEXT, b"ok\n")
        if path == "/":
            return Document(200, "text/html; charset=utf-8", PAGE)
        return Document(404, TEXT, PATHS)

    def _discovery(self, address: str) -> bytes:
        targets = list(dict.fromkeys((address, *self._peers)))
        labels = {"__meta_onecast_engine": self._node.engine_id}
        return json.dumps([{"targets": targets, "labels": labels}]).encode()

    def _healthy(self) -> Document:
        age_s = self._node.seconds_since_poll()
        if age_s < STALE_S:
            return Document(200, TEXT, b"ok\n")
        return Document(503, TEXT, f"the rings were last read {age_s:.0f} s ago\n".encode())

    def _ready(self) -> Document:
        there, running = self._node.presence()
        expected = self._node.local_world_size
        if running == expected:
            return Document(200, TEXT, b"ok\n")
        text = f"{running} of {expected} ranks run, {there} have come\n"
        return Document(503, TEXT, text.encode())


def _hangs(node: Node) -> dict[str, Any]:
    with node.lock:
        return {"hangs": [hang.to_dict() for hang in node.hangs]}
