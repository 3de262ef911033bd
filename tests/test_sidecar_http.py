"""The sidecar's HTTP server: who may ask what, and how often, without harm to anybody."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifetimes import alone, place, sidecar_of
from written_rings import WrittenRing

from onecast.telemetry import Session, TelemetrySettings
from onecast.telemetry.documents import MAX_AGE_S, REST, STALE_S, Documents, Rendered
from onecast.telemetry.http_server import MAX_CLIENTS
from onecast.telemetry.node import Node
from onecast.telemetry.tracing import Tracing

pytestmark = pytest.mark.usefixtures("place")
__all__ = ["place"]  # a fixture


@pytest.fixture
def session(place: Path) -> Iterator[Session]:
    session = alone()
    yield session
    session.close()


def ask(
    session: Session, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    port = sidecar_of(session.run_dir).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_every_answer_says_what_a_browser_must_not_do_with_it(session: Session) -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "/metrics": "text/plain; version=0.0.4; charset=utf-8",
        "/report": "application/json",
        "/healthz": "text/plain; charset=utf-8",
        "/-/healthy": "text/plain; charset=utf-8",
        "/-/ready": "text/plain; charset=utf-8",
        "/sd": "application/json",
        "/live.json": "application/json",
        "/hangs.json": "application/json",
        "/else": "text/plain; charset=utf-8",
    }
    for path, content_type in types.items():
        status, headers, body = ask(session, path)
        assert status == (404 if path == "/else" else 200)
        assert headers["Content-Type"] == content_type
        assert int(headers["Content-Length"]) == len(body) > 0
        policy = headers["Content-Security-Policy"]
        assert policy.startswith(
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'"
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Server"].strip() == "onecast", "no versions"
        assert "Access-Control-Allow-Origin" not in headers
        same = {key: value for key, value in ask(session, path, "HEAD")[1].items() if key != "Date"}
        assert same.keys() == headers.keys() - {"Date"}
    assert ask(session, "/metrics?x=1")[0] == 200
    assert ask(session, "/metrics", "HEAD")[2] == b""
    assert json.loads(ask(session, "/hangs.json")[2]) == {"hangs": []}
    openmetrics = ask(session, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert openmetrics[1]["Content-Type"].startswith("application/openmetrics-text")


def test_nothing_can_be_changed(session: Session) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        status, headers, _ = ask(session, "/report", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_name_that_was_rebound_to_loopback_gets_nothing(session: Session) -> None:
    for host in ("127.0.0.1:80", "127.8.9.1", "localhost:1234", "LOCALHOST", "[::1]:80"):
        for path, status in (("/", 200), ("/report", 200), ("/metrics", 200), ("/else", 404)):
            assert ask(session, path, Host=host)[0] == status, host
    for host in (
        "evil.example",
        "127.0.0.1.evil.example:80",
        "localhost.evil.example",
        "192.0.2.1",
        "",
        "[::1",
    ):
        for path in ("/", "/report", "/metrics", "/else"):
            status, _, body = ask(session, path, Host=host)
            assert status == 403, host
            assert body == b"the Host header names another host than this one\n"


def test_bound_to_all_addresses_it_may_be_asked_by_any_name() -> None:
    session = alone(metrics_host="0.0.0.0")
    assert ask(session, "/healthz", Host="node7.cluster.example:9464")[0] == 200
    session.close()


def test_prometheus_is_told_where_the_nodes_of_the_run_are_scraped() -> None:
    session = alone(metrics_host="0.0.0.0", metrics_peers=("node8:9464", "[fe80::1]:9464"))
    port = sidecar_of(session.run_dir).port
    for host, own in (
        ("node7:8080", "node7:8080"),  # through a forwarded port
        ("node7", f"node7:{port}"),
        ("[::1]", f"[::1]:{port}"),
        ("node8:9464", "node8:9464"),
    ):
        status, headers, body = ask(session, "/sd", Host=host)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        (group,) = json.loads(body)
        expected = list(dict.fromkeys((own, "node8:9464", "[fe80::1]:9464")))
        assert group["targets"] == expected
        engine = json.loads(ask(session, "/report")[2])["engine_id"]
        assert group["labels"] == {"__meta_onecast_engine": engine}
    session.close()


def node_of(run_dir: Path) -> Node:
    tracing = Tracing(TelemetrySettings(), "written")
    return Node(str(run_dir), engine_id="written", local_world_size=2, tracing=tracing)


def test_a_node_is_ready_once_all_its_ranks_have_come_and_while_they_run(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    documents = Documents(node)

    def asked() -> tuple[int, bytes]:
        node.poll()
        document = documents.get("/-/ready", "", "host:1")
        return document.status, document.body

    assert asked() == (503, b"0 of 2 ranks run, 0 have come\n")
    first = WrittenRing(tmp_path, 0)
    assert asked() == (503, b"1 of 2 ranks run, 1 have come\n")
    second = WrittenRing(tmp_path, 1)
    assert asked() == (200, b"ok\n")
    second.die()
    assert asked() == (503, b"1 of 2 ranks run, 2 have come\n")
    first.ring.close()
    assert asked() == (503, b"0 of 2 ranks run, 2 have come\n")


def test_a_sidecar_that_stopped_reading_is_not_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_of(tmp_path)
    documents = Documents(node)
    assert documents.get("/-/healthy", "", "host:1") == (200, "text/plain; charset=utf-8", b"ok\n")
    with node.lock:  # whoever holds it for long keeps the rings from being read
        now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now_s + STALE_S + 1)
        status, _, body = documents.get("/-/healthy", "", "host:1")
    assert (status, body) == (503, b"the rings were last read 11 s ago\n")
    node.poll()
    assert documents.get("/-/healthy", "", "host:1").status == 200


def test_bytes_that_are_no_request_harm_nobody(session: Session) -> None:
    port = sidecar_of(session.run_dir).port
    for nonsense in (
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"A" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            try:
                client.sendall(nonsense)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass
            except ConnectionError:
                continue
    assert ask(session, "/healthz")[0] == 200


def test_clients_that_say_nothing_leave_room_and_are_told_when_there_is_none(
    session: Session,
) -> None:
    port = sidecar_of(session.run_dir).port
    idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(MAX_CLIENTS)]
    deadline = time.monotonic() + 10
    while True:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            try:
                answer = client.recv(100)
            except ConnectionError:
                answer = b""
        if answer.startswith(b"HTTP/1.1 503"):
            break
        assert time.monotonic() < deadline
    assert session.report()["steps"] == 0, "ranks ask elsewhere"
    for each in idle:
        each.close()
    while True:
        try:
            if ask(session, "/healthz")[0] == 200:
                break
        except (ConnectionError, http.client.HTTPException):
            pass  # still full
        assert time.monotonic() < deadline + 10
    assert ask(session, "/metrics")[0] == 200


def test_hundreds_of_scrapes_share_what_is_rendered() -> None:
    rendered: list[int] = []

    def render() -> bytes:
        rendered.append(len(rendered))
        time.sleep(0.02)
        return str(len(rendered)).encode()

    page = Rendered(render)
    began = threading.Barrier(16)

    def client() -> None:
        began.wait()
        for _ in range(100):
            assert page.get()

    threads = [threading.Thread(target=client) for _ in range(16)]
    begin = time.monotonic()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    seconds = time.monotonic() - begin
    assert len(rendered) <= 1 + seconds / min(MAX_AGE_S, REST * 0.02)
    before = len(rendered)
    time.sleep(min(MAX_AGE_S, REST * 0.05))
    assert int(page.get()) == before + 1, "and nobody gets an old one"


def test_scrapes_without_a_pause_do_not_keep_the_sidecar_from_reading(session: Session) -> None:
    stop, failures, served = threading.Event(), [], []

    def client() -> None:
        port = sidecar_of(session.run_dir).port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not stop.is_set():
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            answer.read()
            (served if answer.status == 200 else failures).append(answer.status)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(4)]
    for each in threads:
        each.start()
    step = 0
    while len(served) < 400 or step < 2000:
        with session.step(step, 1):
            pass
        step += 1
        time.sleep(0.0002)
    stop.set()
    for each in threads:
        each.join()
    report: Any = session.report()
    assert not failures
    assert (report["steps"], report["dropped"]) == (step, 0)


def test_the_page_and_the_live_view_are_served(session: Session) -> None:
    page = ask(session, "/")[2].decode()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "live.json" in page
    with session.step(0, 1):
        pass
    view = json.loads(ask(session, "/live.json")[2])
    assert view["engine_id"] == "alone"


def test_the_socket_of_a_deep_directory_can_be_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    session = alone(str(deep / "run"), metrics_port=None)
    assert session.report()["steps"] == 0
    assert session.close() is not None
    assert list(deep.iterdir()) == []
