"""The HTTP server's process, seen from rank 0: its beginning, its end, and messages both ways.

Owns the process and rank 0's end of the socket. It is a process of its own so that parsing,
tokenizing and writing to clients never hold the interpreter lock of the loop that drives all ranks.
Knows nothing of HTTP, nor of what the messages mean.

Nothing here waits but `wait` and the beginning and end: what the socket does not take at once is
kept, and goes out with the next call.
"""

import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Self

from .serve_config import ServeConfig
from .serve_messages import Bound, Failed, Setup, ToEngine, ToServer, Unframer, frame

_SERVER = "onecast.runtime.serve_http"
_START_S = 60.0
_END_S = 10.0  # for answers that clients have not taken yet
_CHUNK_BYTES = 1 << 18


class FrontEndLost(Exception):
    """The HTTP server's process has ended, or does not answer."""


class FrontEnd:
    """Start it by `start`. After `close`, or when rank 0 dies in whatever way, its process ends."""

    def __init__(self, process: subprocess.Popen[bytes], end: socket.socket) -> None:
        self._process = process
        self._socket = end
        self._unframer = Unframer(ToEngine)
        self._received: list[ToEngine] = []
        self._unsent = bytearray()
        self.url = ""

    @classmethod
    def start(cls, config: ServeConfig) -> Self:
        """Start the process; returns when it listens. ValueError: it cannot, and why."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", _SERVER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        front_end = cls(process, ours)
        front_end.send(
            Setup(
                str(config.model), config.model_name, config.host, config.port,
                config.max_unfinished,
            )
        )  # fmt: skip
        answer = front_end._first_answer()
        if isinstance(answer, Failed):
            front_end.close()
            raise ValueError(answer.reason)
        assert isinstance(answer, Bound), answer
        host = f"[{config.host}]" if ":" in config.host else config.host
        front_end.url = f"http://{host}:{answer.port}"
        return front_end

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: ToServer) -> None:
        self._unsent += frame(message)
        self._flush()

    def receive(self) -> list[ToEngine]:
        """What has come; FrontEndLost when nothing can come any more."""
        if self._unsent:
            self._flush()
        messages, self._received = self._received, []
        while True:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError:
                data = b""
            if not data:
                raise FrontEndLost(f"the HTTP server's process (pid {self._process.pid}) has ended")
            messages += self._unframer.feed(data)
            if len(data) < _CHUNK_BYTES:
                return messages

    def wait(self, timeout_s: float, *others: int) -> None:
        """Sleep until there may be something to receive, another descriptor is readable, or for
        `timeout_s`."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        for other in others:
            poll.register(other, select.POLLIN)
        poll.poll(timeout_s * 1e3)
        if self._unsent:
            self._flush()

    def close(self) -> None:
        """Let it answer what has been told of, end it, and wait for that."""
        if self._unsent and self._process.poll() is None:
            self._socket.settimeout(_END_S)
            with suppress(OSError):  # it has ended, or does not read
                self._socket.sendall(self._unsent)
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _first_answer(self) -> ToEngine:
        deadline = time.monotonic() + _START_S
        while (left_s := deadline - time.monotonic()) > 0:
            self.wait(left_s)
            if messages := self.receive():
                self._received = messages[1:]
                return messages[0]
        self._process.kill()
        raise FrontEndLost(f"the HTTP server's process did not listen within {_START_S:g} s")

    def _flush(self) -> None:
        with suppress(BlockingIOError, ConnectionError):  # full: later; gone: `receive` tells it
            del self._unsent[: self._socket.send(self._unsent)]
