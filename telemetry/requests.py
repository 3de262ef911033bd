"""Writes down what becomes of requests: their contexts, their steps, and their end.

Owns the records REQUEST, CONTEXT and SCHEDULED as `ring` draws them, and how they are unpacked.
Numbers and times only: no prompt, no text, no name that a user gave passes through here.

A tracestate follows its CONTEXT record in parts of 24 bytes:

    sequence | nbytes | aux     the part's bytes, padded with zeros
    step                        request number
    meta                        name: number of the part, from 1; dtype: its bytes

What a reader needs to know of a request is said again when the request ends, and every so often
while it runs: a reader that started late, or lost records, knows it then.
"""

import logging
import struct
import time
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .ring import AUX, CONTEXT, NBYTES, REQUEST, SCHEDULED, RingWriter, pack_meta
from .ring_reader import Rows
from .trace_context import TraceContext, parse_traceparent, parse_tracestate

_logger = logging.getLogger(__name__)

PART_BYTES = 24
_PART = struct.Struct("3q")
_REPEAT_STEPS = 256
_QUEUE_BITS, _FIRST_TOKEN_BITS, _TOKEN_BITS = 28, 27, 31
_QUEUE_SHIFT, _FIRST_TOKEN_SHIFT, _GENERATED_SHIFT = 8, 36, 32
_SHOWN_CHARACTERS = 80


class _Known(NamedTuple):
    """The context of a request that is under way."""

    parent: TraceContext
    state: str


class RequestRecorder:
    """Records the requests of one engine. Use it from one thread.

    A trace context that is malformed is passed over, as W3C has it; the first one is told of.
    """

    def __init__(self, ring: RingWriter) -> None:
        self._record: Callable[..., None] = ring.record
        self._record_in_step: Callable[..., None] = ring.record_in_step
        self._intern = ring.intern
        self._scheduled = pack_meta(SCHEDULED)
        self._in_batch: Set[int] = frozenset()
        self._contexts: dict[int, _Known] = {}
        self._calls = 0
        self._warned = False

    def admitted(
        self, number: int, traceparent: str | None = None, tracestate: str | None = None
    ) -> None:
        """A request was queued; `number` is its own in this engine, from 0."""
        if traceparent is None:
            return
        try:
            parent = parse_traceparent(traceparent)
        except ValueError as error:
            self._warn("traceparent", traceparent, error)
            return
        state = ""
        if tracestate is not None:
            try:
                state = parse_tracestate(tracestate)
            except ValueError as error:
                self._warn("tracestate", tracestate, error)
        self._contexts[number] = _Known(parent, state)
        self._write_context(number, parent)

    def scheduled(self, step: int, numbers: Set[int]) -> None:
        """The requests in the batch of a step; of these only changes are written."""
        before = self._in_batch
        self._calls += 1
        repeat = self._calls % _REPEAT_STEPS == 0
        if numbers == before and not repeat:
            return
        now_ns = time.perf_counter_ns()
        write, meta = self._record_in_step, self._scheduled
        for number in before - numbers:
            write(step, now_ns, now_ns, meta, number, 0, 0)
        for number in numbers if repeat else numbers - before:
            if repeat and (known := self._contexts.get(number)) is not None:
                self._write_context(number, known.parent)
            write(step, now_ns, now_ns, meta, number, 1, 0)
        self._in_batch = numbers

    def finished(
        self,
        number: int,
        arrival_ns: int,
        first_scheduled_ns: int,
        first_token_ns: int,
        prompt: int,
        generated: int,
        reason: str,
        error: bool = False,
    ) -> None:
        """A request is over. Times are perf_counter_ns, 0 for what never came; counts are tokens.

        `reason`: why it ended ("stop", "length", "abort"), with `error` the exception's type.
        """
        end_ns = time.perf_counter_ns()
        known = self._contexts.pop(number, None)
        if known is not None:
            self._write_context(number, known.parent)
            self._write_state(number, known.state)
        queue_us = ((first_scheduled_ns or end_ns) - arrival_ns) // 1000
        first_token_us = (first_token_ns - arrival_ns) // 1000 if first_token_ns else 0
        self._record(
            arrival_ns,
            end_ns,
            pack_meta(REQUEST, self._intern(reason)),
            number,
            _cap(prompt, _TOKEN_BITS) | _cap(generated, _TOKEN_BITS) << _GENERATED_SHIFT,
            int(error)
            | _cap(queue_us, _QUEUE_BITS) << _QUEUE_SHIFT
            | _cap(first_token_us, _FIRST_TOKEN_BITS) << _FIRST_TOKEN_SHIFT,
        )

    def _write_context(self, number: int, parent: TraceContext) -> None:
        now_ns = time.perf_counter_ns()
        self._record_in_step(
            number,
            now_ns,
            now_ns,
            pack_meta(CONTEXT, group_size=parent.flags),
            _signed(parent.trace_id >> 64),
            _signed(parent.trace_id & (1 << 64) - 1),
            _signed(parent.span_id),
        )

    def _write_state(self, number: int, state: str) -> None:
        now_ns = time.perf_counter_ns()
        encoded = state.encode()
        for part, start in enumerate(range(0, len(encoded), PART_BYTES), 1):
            piece = encoded[start : start + PART_BYTES]
            meta = pack_meta(CONTEXT, name=part, dtype=len(piece))
            words = _PART.unpack(piece.ljust(PART_BYTES, b"\0"))
            self._record_in_step(number, now_ns, now_ns, meta, *words)

    def _warn(self, what: str, text: str, error: ValueError) -> None:
        shown = repr(text[:_SHOWN_CHARACTERS])
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _logger.log(level, "a request's %s is ignored: %s: %s (said once)", what, shown, error)


def unpack_state_part(row: list[int], length: int) -> bytes:
    """The bytes of a part of a tracestate; `row` is the record's words."""
    return _PART.pack(*row[NBYTES - 1 : AUX + 1])[:length]


class RequestColumns(NamedTuple):
    """Of REQUEST records; int64 [n] but `failed`, bool [n]."""

    prompt: npt.NDArray[np.int64]  # tokens
    generated: npt.NDArray[np.int64]  # tokens
    queue_us: npt.NDArray[np.int64]
    first_token_us: npt.NDArray[np.int64]  # 0: none came
    failed: npt.NDArray[np.bool_]


def unpack_request(rows: Rows) -> RequestColumns:
    nbytes, aux = rows[:, NBYTES], rows[:, AUX]
    return RequestColumns(
        nbytes & _mask(_TOKEN_BITS),
        nbytes >> _GENERATED_SHIFT & _mask(_TOKEN_BITS),
        aux >> _QUEUE_SHIFT & _mask(_QUEUE_BITS),
        aux >> _FIRST_TOKEN_SHIFT & _mask(_FIRST_TOKEN_BITS),
        (aux & 0xFF) != 0,
    )


def _mask(bits: int) -> Any:
    return (1 << bits) - 1


def _cap(value: int, bits: int) -> int:
    return min(max(value, 0), (1 << bits) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
