"""The HTTP server's process: `python -m onecast.runtime.serve_http FD`, started by rank 0.

Owns the listening socket and the life of the process, which is rank 0's: it ends when the socket at
FD, of `serve_messages`, is closed at the other end. Imports no torch.

Starlette and uvicorn carry the HTTP: small, typed, and what most Python servers of models stand on,
so their edge cases (slow and vanishing clients, pipelining, chunked bodies) have been met before.
"""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from .model_config import ModelConfig
from .serve_app import make_app
from .serve_client import EngineClient
from .serve_connections import Room, limited, make_room
from .serve_messages import Bound, Failed, Setup, ToServer, Unframer, frame
from .tokenizer import Tokenizer

_BIND_S = 5.0  # a server that has just ended may need a moment to let go of the port
_SETUP_S = 60.0
_END_S = 5  # for answers on their way, once the engine is gone


def main(fd: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 says when it is over
    end = socket.socket(fileno=fd)
    setup = _first_message(end)
    if setup is None:
        return 1
    try:
        room = make_room()
        listener = _listen(setup.host, setup.port, room.backlog)
    except OSError as error:
        reason = f"--host, --port: cannot listen on {setup.host}, port {setup.port}: "
        end.sendall(frame(Failed(reason + (error.strerror or str(error)))))
        return 2
    client = EngineClient(setup, Tokenizer(setup.model), ModelConfig.from_dir(setup.model))
    asyncio.run(_serve(client, end, listener, room))
    return 0


async def _serve(
    client: EngineClient, end: socket.socket, listener: socket.socket, room: Room
) -> None:
    server = _Server(
        uvicorn.Config(
            make_app(client),
            http=limited(room),
            backlog=room.backlog,
            ws="none",
            loop="asyncio",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_END_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    end.setblocking(False)
    await client.run(end, Bound(listener.getsockname()[1]))
    server.should_exit = True
    await serving


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None are: see `main`."""
        yield


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    """OSError: it cannot be listened on."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    deadline = time.monotonic() + _BIND_S
    while True:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(backlog)
            return listener
        except OSError:
            listener.close()
            if port == 0 or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _first_message(end: socket.socket) -> Setup | None:
    """What to serve and where; None if rank 0 has gone before it said so."""
    end.settimeout(_SETUP_S)
    unframer = Unframer(ToServer)
    while data := end.recv(1 << 16):
        for message in unframer.feed(data):
            assert isinstance(message, Setup), message
            return message
    return None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
