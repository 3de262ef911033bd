"""Where any rank of the node asks the sidecar: a stream socket in the run directory.

Owns both ends of its language, and who has asked for the final report. Knows nothing of what a
report holds.

    rank -> sidecar, one word a line:           report | final
    sidecar -> rank, one JSON object a line:    {"report": {...}}    at once
                                                {"final": {...}}     when everything is written,
                                                                     and the run directory gone

Who sends `final` before it closes its ring has its answer for certain: the sidecar looks for
questions once more after it has seen that all rings are closed.
"""

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAME = "sidecar.sock"
_SEND_TIMEOUT_S = 2.0
_MAX_LINE = 64
_BACKLOG = 128


def _address(run_dir: str) -> tuple[str, int]:
    """A path that fits into the 108 bytes of a socket's address, and what to close afterwards."""
    descriptor = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{descriptor}/{_NAME}", descriptor


class Question:
    """One word to the sidecar, and its answer. Raises OSError if nobody listens."""

    def __init__(self, run_dir: str, word: str, timeout_s: float = _SEND_TIMEOUT_S) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            address, descriptor = _address(run_dir)
            try:
                self._socket.settimeout(timeout_s)
                self._socket.connect(address)
            finally:
                os.close(descriptor)
            self._socket.sendall(f"{word}\n".encode())
        except BaseException:
            self._socket.close()
            raise

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """The answer, None if the sidecar has gone without one.

        TimeoutError: not before `deadline` (time.monotonic()).
        """
        line = b""
        with self._socket:
            while not line.endswith(b"\n"):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                self._socket.settimeout(remaining)
                try:
                    chunk = self._socket.recv(1 << 16)
                except ConnectionError:
                    return None
                if not chunk:
                    return None
                line += chunk
        ((_, report),) = json.loads(line).items()
        assert isinstance(report, dict)
        return report

    def close(self) -> None:
        self._socket.close()


class ReportSocket:
    """The sidecar's end: one thread that answers `report`, and keeps `final` for the end."""

    def __init__(self, run_dir: str, report: Callable[[], dict[str, Any]]) -> None:
        self._report = report
        self._words: dict[socket.socket, bytes] = {}  # by client, what it has said so far
        self._waiting: list[socket.socket] = []  # for the final report
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        Path(run_dir, _NAME).unlink(missing_ok=True)  # of a sidecar that was killed
        address, descriptor = _address(run_dir)
        self._listener.bind(address)
        os.close(descriptor)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def finish(self, report: dict[str, Any]) -> None:
        """Answer all who have asked for the final report, and stop."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._take(0)  # who connected before its ring was closed is in the backlog, its word sent
        self._take(0)
        for client in self._waiting:
            self._send(client, {"final": report})
        for each in (self._listener, *self._words):
            each.close()
        os.close(self._stop)

    def _run(self) -> None:
        while self._take(None):
            pass

    def _take(self, timeout_ms: int | None) -> bool:
        """Wait for somebody to say something, and deal with it; False: it is time to stop."""
        poll = select.poll()
        clients = {each.fileno(): each for each in (self._listener, *self._words)}
        for descriptor in (self._stop, *clients):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(timeout_ms)}
        for descriptor in ready & clients.keys():
            if descriptor == self._listener.fileno():
                self._accept()
            else:
                self._read(clients[descriptor])
        return self._stop not in ready

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            client.settimeout(_SEND_TIMEOUT_S)
            self._words[client] = b""

    def _read(self, client: socket.socket) -> None:
        try:
            chunk = client.recv(_MAX_LINE)
        except (ConnectionError, TimeoutError):
            chunk = b""
        said = self._words[client] + chunk
        if not chunk or len(said) > _MAX_LINE:
            self._forget(client)
            return
        *words, self._words[client] = said.split(b"\n")
        for word in words:
            if word == b"final":
                self._waiting.append(client)
            elif word != b"report" or not self._send(client, {"report": self._report()}):
                self._forget(client)
                return

    def _send(self, client: socket.socket, message: dict[str, Any]) -> bool:
        """False: the client no longer wants to know."""
        try:
            client.sendall(json.dumps(message).encode() + b"\n")
        except (ConnectionError, TimeoutError):
            return False
        return True

    def _forget(self, client: socket.socket) -> None:
        if self._words.pop(client, None) is not None:
            client.close()
        if client in self._waiting:
            self._waiting.remove(client)
