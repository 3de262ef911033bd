"""What a connection of the HTTP server may take: a descriptor, and time for what it asks.

Owns these limits. Uvicorn has none for a client that connects and then says nothing, or says it
slowly; enough of them leave no descriptor for others, and an accept that finds none is logged some
ten thousand times a second by asyncio.
"""

import asyncio
import resource
from typing import NamedTuple

from uvicorn.protocols.http.h11_impl import H11Protocol

_BACKLOG = 2048
_MOST_FILES = 1 << 16
_OWN_FILES = 32  # of the process itself
_ROUNDS = 3  # of accepts, before the protocol of the first hears of its connection
_HEAD_S = 30.0
_LINGER_S = 1.0  # for what a client that is turned away has sent: a reset would lose its answer

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


class Room(NamedTuple):
    """For connections."""

    most: int  # at a time
    lingering: int  # beyond these, that are being told so
    backlog: int  # accepted at once; the rest waits in the kernel


def make_room() -> Room:
    """As many as this process may have descriptors for, once it has asked for more of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max(min(hard, _MOST_FILES), soft) if hard != resource.RLIM_INFINITY else _MOST_FILES
    if files > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    backlog = lingering = max(min(_BACKLOG, files // 12), 1)
    most = files - lingering - _ROUNDS * backlog - _OWN_FILES
    return Room(max(most, 1), lingering, backlog)


def limited(room: Room, head_s: float = _HEAD_S) -> type[H11Protocol]:
    """The protocol of at most so many connections; `head_s` for the head of each request.

    One too many gets 503 and is closed, one that is too slow is closed.
    """

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _turned_away = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > room.most + room.lingering:
                transport.abort()
            elif len(self.connections) > room.most:
                self._turned_away = True
                transport.write(_FULL)
                transport.write_eof()
                self._late = self.loop.call_later(_LINGER_S, transport.abort)
            else:
                self._late = self.loop.call_later(head_s, transport.close)

        def data_received(self, data: bytes) -> None:
            if self._turned_away:
                return
            super().data_received(data)
            asked = self.cycle is not None and not self.cycle.response_complete
            if asked:
                self._in_time()
            elif self._late is None:
                self._late = self.loop.call_later(head_s, self.transport.close)

        def on_response_complete(self) -> None:
            self._in_time()  # of a request that came and was answered with one piece of data
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        def _in_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Limited
