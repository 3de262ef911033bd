"""How many request bodies the HTTP server has answered, by status.

Owns what counts as an answer's status. Knows nothing of what is asked, nor of who is told.
"""

from collections.abc import Callable, Container

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .serve_messages import STATUSES

_CLIENT_GONE, _BROKEN = 499, 500


class Tally:
    """An ASGI application around another; `count` gets the status of each answer at `paths`.

    499: the client went away before the answer's end, whatever had been sent. What is none of
    STATUSES counts as 500, as an answer that nobody meant to give.
    """

    def __init__(self, app: ASGIApp, paths: Container[str], count: Callable[[int], object]) -> None:
        self._app = app
        self._paths = paths
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        status = _BROKEN
        ended = gone = False

        async def noted_receive() -> Message:
            nonlocal gone
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                gone = True
            return message

        async def noted_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                ended = True
            await send(message)

        try:
            await self._app(scope, noted_receive, noted_send)
        finally:
            if gone:
                status = _CLIENT_GONE
            self._count(status if status in STATUSES else _BROKEN)
