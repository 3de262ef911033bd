"""Requests: what is recorded, their spans in the traces of their callers, links of their steps."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecast.telemetry import RingReader, RingWriter, ring
from onecast.telemetry.request_spans import RequestSpans
from onecast.telemetry.requests import RequestRecorder, unpack_request
from onecast.telemetry.ring import meta_kind, meta_name, pack_meta
from onecast.telemetry.spans import Link, Span, request_span_id, request_trace_id
from onecast.telemetry.steps import StepJoiner
from onecast.telemetry.trace_context import TraceContext, parse_traceparent, parse_tracestate

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE:032x}-{PARENT:016x}-01"


class Run:
    """A recorder, and what a sidecar makes of its ring."""

    def __init__(self, folder: Path) -> None:
        self.ring = RingWriter(folder / "rank-0.ring", capacity=4096, rank=0, engine_id="e")
        self.recorder = RequestRecorder(self.ring)
        self.reader = RingReader(folder / "rank-0.ring")
        self.joiner = StepJoiner(1)
        self.requests = RequestSpans("e")

    def step(self, number: int, batch: set[int]) -> None:
        self.ring.set_step(number)
        ticket = self.ring.begin(pack_meta(ring.STEP_KIND), number, len(batch))
        self.recorder.scheduled(number, batch)
        self.ring.end(ticket)
        self.ring.set_step(-1)

    def drain(self) -> tuple[list[Span], list[tuple[int, ...]]]:
        rows = self.reader.drain().rows
        spans = self.requests.add(rows, self.reader.names, 0)
        self.joiner.add(0, rows)
        return spans, [joined.requests for joined in self.joiner.release({})]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_request_becomes_a_span_under_its_caller(run: Run) -> None:
    state = "vendor=" + "x" * 90 + ",other@sys=a b/c"
    run.recorder.admitted(3, TRACEPARENT, state)
    arrival = time.perf_counter_ns() - 9_000_000
    run.recorder.finished(3, arrival, arrival + 2_500_000, arrival + 4_000_999, 17, 5, "stop")
    ((span,), _) = run.drain()
    assert (span.trace_id, span.parent_id) == (TRACE, PARENT)
    assert (span.name, span.serves, span.error, span.trace_state) == ("request", True, None, state)
    assert span.span_id == request_span_id("e", 3)
    assert span.start_ns == arrival and span.end_ns >= arrival + 9_000_000
    assert span.attributes == {
        "onecast.request.number": 3,
        "onecast.request.finish_reason": "stop",
        "onecast.request.queue_us": 2500,
        "onecast.request.first_token_us": 4000,
        "gen_ai.usage.input_tokens": 17,
        "gen_ai.usage.output_tokens": 5,
    }


def test_a_request_without_a_caller_has_a_trace_of_its_own(run: Run) -> None:
    run.recorder.admitted(0)
    run.recorder.admitted(1)
    run.recorder.finished(0, 10, 20, 30, 1, 1, "length")
    run.recorder.finished(1, 10, 0, 0, 1, 0, "ValueError", True)
    (first, second), _ = run.drain()
    assert first.trace_id == request_trace_id("e", 0) != second.trace_id
    assert first.parent_id is None and first.error is None
    assert second.error == second.attributes["error.type"] == "ValueError"
    assert "onecast.request.first_token_us" not in second.attributes


def test_a_caller_that_does_not_sample_gets_no_span_but_its_links(run: Run) -> None:
    run.recorder.admitted(5, TRACEPARENT[:-1] + "0")
    run.step(0, {5})
    run.recorder.finished(5, 1, 2, 3, 4, 5, "stop")
    spans, ((*batch,),) = run.drain()
    assert spans == []
    assert run.requests.links(tuple(batch)) == (Link(TRACE, request_span_id("e", 5)),)


def test_steps_know_the_requests_of_their_batch(run: Run) -> None:
    batches = [{0}, {0, 1}, {0, 1}, {1, 2}, {2}, {2, 0}]
    for number, batch in enumerate(batches):
        run.step(number, batch)
    before = run.ring.path.stat().st_size, run.reader.head
    _, seen = run.drain()
    assert seen == [tuple(sorted(batch)) for batch in batches]
    assert seen[1] is seen[2], "nothing is made anew while nothing changes"
    assert before[1] == len(batches) + 1 + 1 + 2 + 1 + 1, "only changes are written"


@given(st.lists(st.frozensets(st.integers(0, 6)), max_size=40))
def test_any_sequence_of_batches_is_known_step_by_step(
    tmp_path_factory: pytest.TempPathFactory, batches: list[frozenset[int]]
) -> None:
    run = Run(tmp_path_factory.mktemp("ring"))
    seen = []
    for number, batch in enumerate(batches):
        run.step(number, set(batch))
        if number % 3 == 0:
            seen += run.drain()[1]
    seen += run.drain()[1]
    assert seen == [tuple(sorted(batch)) for batch in batches]


def test_a_request_that_ended_leaves_the_batch_even_if_nobody_says_so(run: Run) -> None:
    run.step(0, {0, 1})
    run.ring.set_step(1)
    ticket = run.ring.begin(pack_meta(ring.STEP_KIND), 1, 2)
    run.recorder.finished(1, 1, 2, 3, 4, 5, "stop")
    run.ring.end(ticket)
    run.recorder.scheduled = lambda *ignored: None  # type: ignore[method-assign]
    run.step(2, {0})
    _, seen = run.drain()
    assert seen == [(0, 1), (0, 1), (0,)], "its last step still had it"


def test_a_reader_that_comes_late_learns_all_in_time(run: Run) -> None:
    run.recorder.admitted(1, TRACEPARENT)
    for number in range(200):
        run.step(number, {1, 2})
    run.drain()
    run.joiner, run.requests = StepJoiner(1), RequestSpans("e")  # a new sidecar
    for number in range(200, 300):
        run.step(number, {1, 2})
    _, seen = run.drain()
    assert seen[0] == () and seen[-1] == (1, 2)
    assert run.requests.links((1,))[0].trace_id == TRACE
    run.requests = RequestSpans("e")  # and another one
    run.recorder.finished(1, 1, 2, 3, 4, 5, "stop")
    ((span,), _) = run.drain()
    assert span.trace_id == TRACE


def test_nothing_is_written_of_requests_without_a_context_until_they_end(run: Run) -> None:
    run.recorder.admitted(0)
    assert run.reader.head == 0


def test_numbers_that_do_not_fit_are_capped(run: Run) -> None:
    run.recorder.finished(2**40, 0, 10**15, 10**15, 2**40, 2**33, "stop")
    rows = run.reader.drain().rows
    found = unpack_request(rows)
    assert found.prompt[0] == found.generated[0] == 2**31 - 1
    assert (found.queue_us[0], found.first_token_us[0]) == (2**28 - 1, 2**27 - 1)
    assert not found.failed[0] and meta_kind(int(rows[0, ring.META])) == ring.REQUEST
    assert run.reader.names[meta_name(int(rows[0, ring.META]))] == "stop"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00-abc",
        TRACEPARENT.upper(),
        "ff" + TRACEPARENT[2:],
        TRACEPARENT + "-more",
        f"00-{0:032x}-{PARENT:016x}-01",
        f"00-{TRACE:032x}-{0:016x}-01",
        TRACEPARENT[:-2],
        TRACEPARENT.replace("-", "_"),
    ],
)
def test_a_malformed_traceparent_is_passed_over_and_told_of_once(
    run: Run, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError):
        parse_traceparent(text)
    with caplog.at_level(logging.WARNING):
        run.recorder.admitted(0, text)
        run.recorder.admitted(1, text)
    assert caplog.text.count("traceparent is ignored") == 1
    assert repr(text) in caplog.text
    run.recorder.finished(0, 1, 2, 3, 4, 5, "stop")
    ((span,), _) = run.drain()
    assert span.parent_id is None


def test_later_versions_of_traceparent_are_read() -> None:
    assert parse_traceparent(f"cc{TRACEPARENT[2:]}-what-ever") == (TRACE, PARENT, 1)
    assert parse_traceparent(f" {TRACEPARENT[:-2]}03 ") == TraceContext(TRACE, PARENT, 3)
    assert not parse_traceparent(TRACEPARENT[:-2] + "02").sampled


@pytest.mark.parametrize(
    "text",
    ["a", "a=", "A=1", "a=1,a=2", "a=b=c", "a=ü", ",".join(f"k{n}=1" for n in range(33)),
     ",".join(f"k{n}=" + "v" * 200 for n in range(3))],
)  # fmt: skip
def test_a_malformed_tracestate_costs_only_itself(
    run: Run, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError):
        parse_tracestate(text)
    run.recorder.admitted(0, TRACEPARENT, text)
    assert "tracestate is ignored" in caplog.text
    run.recorder.finished(0, 1, 2, 3, 4, 5, "stop")
    ((span,), _) = run.drain()
    assert (span.trace_id, span.trace_state) == (TRACE, "")


def test_a_tracestate_is_handed_on_without_its_blanks() -> None:
    assert parse_tracestate(" a=1 ,, b@c=2 , 0x*/-_=!~ ") == "a=1,b@c=2,0x*/-_=!~"


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255))
def test_every_context_survives_the_ring(
    tmp_path_factory: pytest.TempPathFactory, trace_id: int, span_id: int, flags: int
) -> None:
    run = Run(tmp_path_factory.mktemp("ring"))
    run.recorder.admitted(0, f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
    run.recorder.finished(0, 1, 2, 3, 4, 5, "stop")
    spans, _ = run.drain()
    found: list[Any] = [(span.trace_id, span.parent_id) for span in spans]
    assert found == ([(trace_id, span_id)] if flags & 1 else [])
