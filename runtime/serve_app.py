"""The routes of `onecast serve`: OpenAI's completions, chat completions and models, and two probes.

Owns paths, status codes, headers and error bodies, and that a client who goes away takes its
sequences with it. Knows nothing of ranks; `serve_client` speaks with the engine.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .body_fields import BodyFields, RequestError, error_body, show
from .openai_body import CHAT_URL, COMPLETIONS_URL, BodyContext, Call, parse_request
from .openai_response import response_body
from .request import TraceHeaders
from .serve_client import LOST, READY, Busy, EngineClient, LiveCall
from .serve_stream import CallStream, event
from .serve_tally import Tally

_MOST_BODY_BYTES = 32 << 20
_BODY_S = 120.0  # until all of a body is there
_INLINE_BYTES = 1 << 14  # a body that is parsed right here; a larger one in a thread
_RETRY_S = 5  # while the engine starts, or has been asked to stop
_LOST_TEXT = "the engine was stopped before it had finished this request"


def make_app(client: EngineClient) -> ASGIApp:
    app = Starlette(
        routes=[
            Route(COMPLETIONS_URL, _answers(client, COMPLETIONS_URL), methods=["POST"]),
            Route(CHAT_URL, _answers(client, CHAT_URL), methods=["POST"]),
            Route("/v1/models", _models(client)),
            Route("/v1/models/{name:path}", _models(client)),
            Route("/health", _probe(client, lambda: client.state != LOST, "ok")),
            Route("/ready", _probe(client, lambda: client.state == READY, READY)),
        ],
        exception_handlers={HTTPException: _refused, Exception: _broken},
    )
    return Tally(app, (COMPLETIONS_URL, CHAT_URL), client.count_answer)


Endpoint = Callable[[Request], Awaitable[Response]]


def _probe(client: EngineClient, good: Callable[[], bool], word: str) -> Endpoint:
    async def probe(request: Request) -> Response:
        if good():
            return _json({"status": word})
        return _json({"status": client.state}, 503)

    return probe


def _models(client: EngineClient) -> Endpoint:
    card = {
        "id": client.setup.model_name,
        "object": "model",
        "created": client.created_s,
        "owned_by": "onecast",
    }

    async def models(request: Request) -> Response:
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": [card]})
        return _json(card) if name == card["id"] else _unknown_model(client, name)

    return models


def _answers(client: EngineClient, url: str) -> Endpoint:
    """The endpoint that carries out calls."""

    async def answer(request: Request) -> Response:
        if client.state != READY:
            return _unready(client)
        request_id = uuid.uuid4().hex
        try:
            raw = await _read(request)
            if len(raw) <= _INLINE_BYTES:
                parsed = _parse(client, url, raw, request.headers, request_id)
            else:
                parsed = await asyncio.to_thread(
                    _parse, client, url, raw, request.headers, request_id
                )
            call, stream, with_usage = parsed
            if client.state != READY:  # the body took its time: nobody may be left to answer it
                return _unready(client)
            if call.model != client.setup.model_name:
                return _unknown_model(client, call.model)
            live = client.ask(call, stream=stream)
        except RequestError as error:
            return _json(error.body(), error.status_code)
        except ValueError as error:  # what only the engine's limits refuse
            return _json(RequestError(str(error), param="n").body(), 400)
        except Busy as error:
            body = error_body(str(error), "rate_limit_error", code="rate_limit_exceeded")
            return _json(body, 429, {"Retry-After": str(error.retry_s)})
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        answer = _Events if stream else _Whole
        return answer(client, live, with_usage)

    return answer


async def _read(request: Request) -> bytes:
    raw = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > _MOST_BODY_BYTES:
                    raise HTTPException(413, f"the body is above {_MOST_BODY_BYTES} bytes")
    except TimeoutError:
        text = f"{len(raw)} bytes of the body came in {_BODY_S:g} s, and not the rest"
        raise HTTPException(408, text, {"Connection": "close"}) from None
    return bytes(raw)


def _parse(
    client: EngineClient, url: str, raw: bytes, headers: Mapping[str, str], request_id: str
) -> tuple[Call, bool, bool]:
    """The call, whether to stream it, and whether that ends with the tokens' numbers."""
    context: BodyContext | None = client.context
    assert context is not None
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body {show(body)} is not an object", code="invalid_type")
    fields = BodyFields(body)
    stream = fields.boolean("stream", False)
    options = fields.take("stream_options")
    with_usage = False
    if options is not None:
        if not stream:
            raise RequestError("stream_options: needs stream: true", param="stream_options")
        if not isinstance(options, dict):
            raise RequestError(
                f"stream_options: {show(options)} is not an object",
                param="stream_options",
                code="invalid_type",
            )
        wanted = BodyFields(options, "stream_options")
        with_usage = wanted.boolean("include_usage", False)
        wanted.boolean("include_obfuscation", False)  # padding, which hides what tokens are
        wanted.refuse_rest()
    rest = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
    call = parse_request(url, rest, request_id=request_id, seed_key=request_id, context=context)
    if "traceparent" in headers:
        trace = TraceHeaders(headers["traceparent"], headers.get("tracestate"))
        for request in call.requests:
            request.trace = trace
    return call, stream, with_usage


class _Answer(Response):
    """A response that is made while it is sent, and given up when the client goes away."""

    media_type = "application/json"

    def __init__(self, client: EngineClient, live: LiveCall, with_usage: bool) -> None:
        self._client = client
        self._live = live
        self._with_usage = with_usage
        self._created_s = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._send(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for task in (answering, gone):
                task.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)
            self._client.leave(self._live)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def _prefix_caching(self) -> bool:
        assert self._client.limits is not None
        return self._client.limits.prefix_caching


class _Whole(_Answer):
    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        live, client = self._live, self._client
        while not live.finished and not live.lost:
            live.changed.clear()
            await live.changed.wait()
        if not live.finished:
            body = error_body(_LOST_TEXT, "server_error", code="engine_stopped")
            await _json(body, 503)(scope, receive, send)
            return
        texts = [live.texts[index] for index in range(len(live.texts))]
        body = response_body(
            live.call,
            texts,
            client.tokenizer,
            self._created_s,
            prefix_caching=self._prefix_caching(),
        )
        await _json(body, 200, {"x-request-id": live.call.request_id})(scope, receive, send)


class _Events(_Answer):
    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-request-id", self._live.call.request_id.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._events():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """What has come while the client was slow goes into one chunk of each choice."""
        live, client = self._live, self._client
        stream = CallStream(
            live.call,
            client.tokenizer,
            self._created_s,
            with_usage=self._with_usage,
            prefix_caching=self._prefix_caching(),
        )
        for data in stream.first():
            yield data
        ended: set[int] = set()
        while len(ended) < len(live.call.choices):
            if not live.fresh:
                if live.lost:
                    yield event(error_body(_LOST_TEXT, "server_error", code="engine_stopped"))
                    return
                live.changed.clear()
                await live.changed.wait()
            fresh, live.fresh = dict.fromkeys(live.fresh), []
            data = b""
            for index in fresh:
                text = live.texts.get(index)
                data += b"".join(stream.more(index, text))
                if text is not None:
                    ended.add(index)
            if data:
                yield data
        yield b"".join(stream.last())


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _unready(client: EngineClient) -> Response:
    message = f"the server is {client.state}: try again later"
    body = error_body(message, "server_error", code="service_unavailable")
    return _json(body, 503, {"Retry-After": str(_RETRY_S)})


def _unknown_model(client: EngineClient, name: str) -> Response:
    message = f"model: {show(name)} is not served here, only {show(client.setup.model_name)}"
    body = error_body(message, "invalid_request_error", param="model", code="model_not_found")
    return _json(body, 404)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = error.detail
    if error.status_code in (404, 405):
        text = f"{request.method} {request.url.path}: {error.detail}"
    return _json(error_body(text, "invalid_request_error"), error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    """The server logs it, with its traceback."""
    return _json(error_body("the server failed", "server_error"), 500)


def _json(
    body: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(body), status, headers=headers, media_type="application/json"
    )
