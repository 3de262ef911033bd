"""A span as one object, and the ids of all spans.

Owns how ids are made: hashes of the engine's id and a number, so that all ranks and nodes agree
without a byte on the wire. Hence no two runs may have one engine id. Knows neither how spans come
about nor any format.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int64]
UnsignedWords = npt.NDArray[np.uint64]

Attribute = str | int | bool
_ODD = 0x9E3779B97F4A7C15  # spreads ticket numbers over the 64 bits of a span id


class Link(NamedTuple):
    trace_id: int
    span_id: int


class Span(NamedTuple):
    trace_id: int
    span_id: int
    parent_id: int | None
    name: str
    rank: int | None  # None: the engine, not one of its ranks
    start_ns: int  # time_ns
    end_ns: int
    attributes: dict[str, Attribute]
    error: str | None  # an exception's type, or why it never ended
    links: tuple[Link, ...] = ()
    dropped_links: int = 0
    serves: bool = False  # it answers a caller: kind SERVER, and its parent is another program's
    trace_state: str = ""


def trace_id(engine_id: str, step: int) -> int:
    return _hash(16, engine_id, step, "trace")


def engine_span_id(engine_id: str, step: int) -> int:
    return _hash(8, engine_id, step, "engine")


def worker_span_id(engine_id: str, step: int, rank: int) -> int:
    return _hash(8, engine_id, step, rank)


def request_trace_id(engine_id: str, number: int) -> int:
    """Of a request that came without a trace."""
    return _hash(16, engine_id, number, "request trace")


def request_span_id(engine_id: str, number: int) -> int:
    return _hash(8, engine_id, number, "request")


def child_span_ids(worker_id: int | UnsignedWords, tickets: Words) -> UnsignedWords:
    """Ids of what a rank recorded inside a step; `tickets` are the records' ticket words."""
    ids = np.asarray(worker_id, np.uint64) + tickets.astype(np.uint64) * np.uint64(_ODD)
    return np.maximum(ids, np.uint64(1))  # zero is no id


def _hash(nbytes: int, *parts: object) -> int:
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=nbytes).digest()) or 1
