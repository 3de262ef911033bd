"""What clients may hold of the HTTP server: connections and time, over real sockets."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest
import uvicorn
from cli_runs import DEMO, wait_for
from serve_runs import ask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from onecast.runtime import serve_app
from onecast.runtime.serve_connections import Room, limited

REQUEST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nok"
OK = b"HTTP/1.1 200 OK"
HEAD_S = 0.4

# Rank 0's part, with few descriptors; the server has no more of them.
FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from pathlib import Path
from onecast.runtime.front_end import FrontEnd
from onecast.runtime.serve_config import ServeConfig
front_end = FrontEnd.start(ServeConfig(model=Path(sys.argv[1]), port=0))
print(front_end.url, flush=True)
sys.stdin.read()
front_end.close()
"""


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    message = await receive()
    body = message["body"]
    while message["more_body"]:
        message = await receive()
        body += message["body"]
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def echoing(most: int) -> Iterator[int]:
    """A server of so many connections; its port."""
    config = uvicorn.Config(
        _echo,
        http=limited(Room(most, 8, 8), HEAD_S),
        lifespan="off",
        ws="none",
        timeout_keep_alive=60,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def _exchange(connection: socket.socket, request: bytes = REQUEST) -> bytes:
    """The status line of the answer, which is read to the end of its body."""
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"ok"):
        data = connection.recv(1000)
        if not data:
            break
        answer += data
    return answer.partition(b"\r\n")[0]


def _read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1000), b""))


def test_one_connection_too_many_is_told_and_closed() -> None:
    with echoing(most=2) as port, ExitStack() as stack:
        first, second = (stack.enter_context(closing(_connect(port))) for _ in range(2))
        for connection in (first, second):
            assert _exchange(connection) == OK
        with closing(_connect(port)) as third:
            assert _exchange(third) == b"HTTP/1.1 503 Service Unavailable"
        assert _exchange(first) == OK, "those that were there stay"
        second.close()

        def taken() -> bool:
            with closing(_connect(port)) as again:
                return _exchange(again) == OK

        wait_for(taken, "the place that has become free", 20)


@pytest.mark.parametrize("before", [0, 1, 2], ids="requests before: {}".format)
def test_a_head_that_does_not_come_ends_the_connection(before: int) -> None:
    with echoing(most=9) as port, closing(_connect(port)) as connection:
        for _ in range(before):
            assert _exchange(connection) == OK
        begin = time.monotonic()
        connection.sendall(REQUEST[:20])
        assert _read_all(connection) == b""
        assert HEAD_S / 2 < time.monotonic() - begin


def test_a_body_has_more_time_than_a_head() -> None:
    with echoing(most=9) as port, closing(_connect(port)) as connection:
        for _ in range(2):
            connection.sendall(REQUEST[:-1])
            time.sleep(2 * HEAD_S)
            assert _exchange(connection, REQUEST[-1:]) == OK
        time.sleep(2 * HEAD_S)  # nor does it end between requests: that is uvicorn's to say
        assert _exchange(connection) == OK


def test_more_connections_than_descriptors_break_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES, str(DEMO)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        port = int(url.rpartition(":")[2])
        with ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(closing(_connect(port))).sendall(REQUEST[:20])
            time.sleep(1)
        wait_for(lambda: ask(url, "/health").status == 200, "a place", 20)
    finally:
        _, err = process.communicate("", timeout=30)
    assert (process.returncode, err) == (0, "")


def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "_BODY_S", 0.05)
    pieces = iter([b"ab", b"c"])

    async def receive() -> Message:
        if (piece := next(pieces, None)) is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": piece, "more_body": True}

    with pytest.raises(HTTPException, match=r"3 bytes of the body came in 0\.05 s") as caught:
        asyncio.run(serve_app._read(Request({"type": "http", "method": "POST"}, receive)))
    assert caught.value.status_code == 408
