"""Requests as the sidecar knows them: their trace contexts, and the span of each that is over.

Owns ids and attributes of request spans. Knows nothing of steps or exporters. Numbers and times are
all there is: no prompt, no text.

    request      kind SERVER; in the caller's trace and under its span where it came with one, else
                 in a trace of its own. One that its caller does not sample is not exported.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from .requests import unpack_request, unpack_state_part
from .ring import (
    AUX,
    BEGIN,
    CONTEXT,
    END,
    META,
    NBYTES,
    REQUEST,
    SEQUENCE,
    STEP,
    meta_dtype,
    meta_group_size,
    meta_kind,
    meta_name,
)
from .ring_reader import Rows
from .span_shapes import name_at
from .spans import Attribute, Link, Span, request_span_id, request_trace_id
from .trace_context import TraceContext

_MAX_KNOWN = 1 << 16  # requests whose context is remembered; steps that ended late ask for it
_MASK64 = (1 << 64) - 1
T = TypeVar("T")


class RequestSpans:
    """Reads the records of an engine's requests."""

    def __init__(self, engine_id: str) -> None:
        self._engine_id = engine_id
        self._contexts: dict[int, TraceContext] = {}
        self._states: dict[int, dict[int, bytes]] = {}  # by request and part
        self._links: dict[int, Link] = {}
        self._asked: tuple[int, ...] | None = None
        self._answer: tuple[Link, ...] = ()

    def add(self, rows: Rows, names: Sequence[str], clock_offset_ns: int) -> list[Span]:
        """Spans of the requests that are over, among records of one rank."""
        kinds = rows[:, META] & 0xF
        rows = rows[(kinds == REQUEST) | (kinds == CONTEXT)]
        spans = []
        for place, row in enumerate(rows.tolist()):
            if meta_kind(row[META]) == CONTEXT:
                self._add_context(row)
                continue
            context = self._contexts.get(row[SEQUENCE])
            state = self._states.pop(row[SEQUENCE], {})
            if context is None or context.sampled:
                spans.append(
                    self._span(rows[place : place + 1], names, clock_offset_ns, context, state)
                )
        return spans

    def links(self, numbers: tuple[int, ...]) -> tuple[Link, ...]:
        """To the spans of these requests; the same tuple for the same numbers."""
        if numbers is not self._asked:
            self._asked = numbers
            self._answer = tuple(self._link(number) for number in numbers)
        return self._answer

    def _link(self, number: int) -> Link:
        link = self._links.get(number)
        if link is None:
            context = self._contexts.get(number)
            trace_id = (
                request_trace_id(self._engine_id, number) if context is None else context.trace_id
            )
            link = Link(trace_id, request_span_id(self._engine_id, number))
            _remember(self._links, number, link)
        return link

    def _add_context(self, row: list[int]) -> None:
        number, part = row[STEP], meta_name(row[META])
        if part:
            parts = self._states.get(number)
            if parts is None:
                parts = _remember(self._states, number, {})
            parts[part] = unpack_state_part(row, meta_dtype(row[META]))
            return
        trace_id = (row[SEQUENCE] & _MASK64) << 64 | row[NBYTES] & _MASK64
        context = TraceContext(trace_id, row[AUX] & _MASK64, meta_group_size(row[META]))
        if self._contexts.get(number) != context:
            _remember(self._contexts, number, context)
            self._links.pop(number, None)
            self._asked = None

    def _span(
        self,
        row: Rows,
        names: Sequence[str],
        clock_offset_ns: int,
        context: TraceContext | None,
        state: Mapping[int, bytes],
    ) -> Span:
        number = int(row[0, SEQUENCE])
        reason = name_at(names, meta_name(int(row[0, META])))
        found = [int(column[0]) for column in unpack_request(row)]
        prompt, generated, queue_us, first_token_us, failed = found
        attributes: dict[str, Attribute] = {
            "onecast.request.number": number,
            "onecast.request.finish_reason": reason,
            "onecast.request.queue_us": queue_us,
        }
        if first_token_us:
            attributes["onecast.request.first_token_us"] = first_token_us
        attributes["gen_ai.usage.input_tokens"] = prompt
        attributes["gen_ai.usage.output_tokens"] = generated
        if failed:
            attributes["error.type"] = reason
        return Span(
            self._link(number).trace_id,
            request_span_id(self._engine_id, number),
            None if context is None else context.span_id,
            "request",
            None,
            int(row[0, BEGIN]) + clock_offset_ns,
            int(row[0, END]) + clock_offset_ns,
            attributes,
            reason if failed else None,
            serves=True,
            trace_state=_whole(state),
        )


def _whole(parts: Mapping[int, bytes]) -> str:
    """The parts together; without one of them, nothing."""
    if set(parts) != set(range(1, len(parts) + 1)):
        return ""
    return b"".join(parts[part] for part in sorted(parts)).decode("ascii", "replace")


def _remember(known: dict[int, T], number: int, value: T) -> T:
    """Put it in; the oldest goes where there are too many."""
    known[number] = value
    if len(known) > _MAX_KNOWN:
        del known[next(iter(known))]
    return value
