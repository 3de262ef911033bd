"""What rank 0 and the HTTP server's process tell each other, and how it travels.

Owns the messages and their framing on a stream socket. Knows nothing of who acts on them.

    +--------------------------+--------------------------------------+
    | bytes that follow, u32 LE | one message: msgpack, type tag first |
    +--------------------------+--------------------------------------+

    HTTP server                        rank 0
         <------------- Setup -------------      first of all
         ------------- Bound ------------->      or Failed
         <----------- Serving -------------      the model is loaded
         --- Ask, Abort, Answered ... ---->
         <----------- Progress ------------      of each step that concerns a request
         <------------ Drain --------------      take no more requests
         ----------- Drained ------------->      no Ask comes after it
         <---------- (closes) -------------      answer what is left, and end

A `call` is a request body's number, counted by the HTTP server; a `choice` is the place of a
sequence in its answer.
"""

import struct
from typing import Any, Final

import msgspec

from .admission import SchedulerConfig
from .request import SamplingParams

_LENGTH = struct.Struct("<I")
_MOST_BYTES: Final = 1 << 30  # a length beyond is no length

# Of answers that are told apart; 499: the client went away before the end.
STATUSES: Final = (200, 400, 404, 405, 408, 413, 429, 499, 500, 503)


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Setup(_Message, frozen=True):
    model: str  # directory
    model_name: str
    host: str
    port: int
    max_unfinished: int  # sequences


class Serving(_Message, frozen=True):
    limits: SchedulerConfig


class Bound(_Message, frozen=True):
    port: int


class Failed(_Message, frozen=True):
    reason: str


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    """One request of a call."""

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    traceparent: str | None = None
    tracestate: str | None = None


class Ask(_Message, frozen=True):
    call: int
    prompts: list[Prompt]
    stream: bool  # whether tokens are told of as they come


class Abort(_Message, frozen=True):
    call: int


class Ended(msgspec.Struct, frozen=True, array_like=True):
    text: str
    reason: str  # "stop" or "length"
    num_cached_tokens: int


class News(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice."""

    call: int
    choice: int
    token_ids: list[int]
    # (logprob, the most likely: (token id, logprob) ...) of each, where the request wants them
    logprobs: list[tuple[float | None, tuple[tuple[int, float], ...]]] | None
    ended: Ended | None


class Progress(_Message, frozen=True):
    news: list[News]


class Drain(_Message, frozen=True):
    pass


class Drained(_Message, frozen=True):
    pass


class Answered(_Message, frozen=True):
    """Request bodies so far, also those no engine ever saw, by each of STATUSES."""

    by_status: dict[int, int]


ToEngine = Bound | Failed | Ask | Abort | Drained | Answered
ToServer = Setup | Serving | Progress | Drain


def frame(message: ToEngine | ToServer) -> bytes:
    """The message as it travels."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Bytes as they come in, whole messages out; ValueError for what is no message of `kind`."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > _MOST_BYTES:
                raise ValueError(f"a message of {length} bytes; the limit is {_MOST_BYTES}")
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            with memoryview(buffer) as view:
                messages.append(self._decode(view[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return messages
