"""Encoding: what a parser finds in our bytes is what the SDK's encoder would have written."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from span_model import model_spans, sdk_span

from onecast.telemetry import otlp_encoder, ring
from onecast.telemetry.kept_step import MAX_VALUE, KeptStep
from onecast.telemetry.otlp_encoder import Encoded, OtlpEncoder
from onecast.telemetry.otlp_wire import Piece, Template, hole, padded_varints, varint
from onecast.telemetry.probe import pack_frame
from onecast.telemetry.ring import pack_meta
from onecast.telemetry.span_builder import SpanBuilder
from onecast.telemetry.spans import Attribute, Link, Span, trace_id
from onecast.telemetry.step_facts import step_facts
from onecast.telemetry.steps import JoinedStep

# Tables of two ranks that number the same names differently; 0 is no name.
WORDS = ["all_reduce", "schritt·über", "広報", "send", "model.forward", "Fehler 🦋", "published"]
GROUPS = ["tp\tu0", "größe\tu1", "\tu2"]
NAMES = [["", *WORDS, *GROUPS, "float32"], ["", "float32", *GROUPS, *WORDS]]
OFFSET = 1_700_000_000_000_000_000
RESOURCES: dict[int | None, dict[str, Attribute]] = {
    None: {"service.name": "tested"},
    0: {"service.name": "tested", "onecast.rank": 0},
    1: {"service.name": "tested", "onecast.rank": 1, "naïve": True},
}

# Few distinct times, so that records touch, contain and cross each other.
times = st.integers(0, 40)
big = st.one_of(st.integers(0, 300), st.integers(0, MAX_VALUE))


@st.composite
def records(draw: Any, rank: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What one rank wrote in a step, in any mixture; at least one record."""
    index = NAMES[rank].index
    word = st.sampled_from(WORDS).map(index)
    status = st.sampled_from([0, 0, 0, 7 << 8, ring.UNWAITED])
    failed = word.map(lambda name: ring.ERROR | name << 8)
    found = []
    for _ in range(draw(st.integers(0, 1))):
        found.append((pack_meta(ring.STEP_KIND), step, draw(big), draw(st.just(0) | failed)))
    for _ in range(draw(st.integers(0, 5))):
        found.append((pack_meta(ring.PHASE, draw(word)), 0, 0, draw(st.just(0) | failed)))
    for _ in range(draw(st.integers(0, 8))):
        group = index(draw(st.sampled_from(GROUPS)))
        meta = pack_meta(ring.COLLECTIVE, draw(word), group, index("float32"), 2)
        sequence = draw(st.integers(1, 6) | big)
        found.append((meta, sequence, draw(big), draw(status | failed)))
    for _ in range(draw(st.integers(0, 2))):
        frame = pack_frame(draw(big), draw(st.integers(0, 99)), draw(st.integers(0, 9)), 3)
        found.append((pack_meta(ring.FRAME, draw(word)), draw(big), *frame))
    if not found:
        found.append((pack_meta(ring.STEP_KIND), step, 0, 0))
    rows = []
    for meta, sequence, nbytes, aux in draw(st.permutations(found)):
        begin = draw(times)
        end = begin + draw(st.sampled_from([1, 2, 5, 30, -1]))
        is_open = end < begin and meta & 0xF != ring.FRAME
        end = 0 if is_open else max(begin, end)
        # A collective of the same number twice on a rank is never joined; the ring forbids it.
        rows.append([begin, end, step, meta, sequence, nbytes, 0 if is_open else aux, 0])
    rows.sort(key=lambda row: row[0])
    for ticket, row in enumerate(rows):
        row[ring.TICKET] = ticket + 1
    return np.array(rows, np.int64)


@st.composite
def kept_steps(draw: Any) -> list[KeptStep]:
    found = []
    for step in sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=3))):
        ended, unfinished = {}, {}
        for rank in draw(st.sampled_from([(0,), (1,), (0, 1)])):
            rows = draw(records(rank, step))
            is_open = rows[:, ring.END] == 0
            if not is_open.all():
                ended[rank] = rows[~is_open]
            if is_open.any():
                unfinished[rank] = rows[is_open]
        joined = JoinedStep(step, ended, unfinished)
        ids = st.integers(1, 2**64 - 1)
        pairs = draw(st.lists(st.tuples(st.integers(1, 2**128 - 1), ids), max_size=4))
        found.append(
            KeptStep(
                step,
                trace_id("e", step),
                "all",
                joined,
                step_facts([joined], dict(enumerate(NAMES)))[0].arrivals,
                tuple(Link(*pair) for pair in pairs),
            )
        )
    return found


def parse(requests: list[Encoded]) -> dict[bytes, list[Any]]:
    """Spans by their resource, in order of their ids; the counts must be right."""
    found: dict[bytes, list[Any]] = {}
    for encoded in requests:
        request = ExportTraceServiceRequest.FromString(encoded.body)
        number = 0
        for resource_spans in request.resource_spans:
            key = resource_spans.resource.SerializeToString(deterministic=True)
            (scope_spans,) = resource_spans.scope_spans
            assert scope_spans.scope.name == "onecast.telemetry"
            assert scope_spans.scope.version == "9"
            found.setdefault(key, []).extend(scope_spans.spans)
            number += len(scope_spans.spans)
        assert number == encoded.num_spans
    return {
        key: sorted(spans, key=lambda span: (span.trace_id, span.span_id))
        for key, spans in found.items()
    }


def parse_sdk(spans: list[Span]) -> dict[bytes, list[Any]]:
    request = encode_spans([sdk_span(span, RESOURCES[span.rank], "9") for span in spans])
    return parse([Encoded(request.SerializeToString(), len(spans))])


@settings(max_examples=150, deadline=None)
@given(kept_steps())
def test_steps_are_built_and_encoded_span_for_span_as_by_the_sdk(steps: list[KeptStep]) -> None:
    names = dict(enumerate(NAMES))
    model = [span for kept in steps for span in model_spans(kept, "e", names, OFFSET)]
    table = SpanBuilder("e", names, OFFSET).build(steps)
    by_id = {(span.trace_id, span.span_id): span for span in table.spans()}
    assert by_id == {(span.trace_id, span.span_id): span for span in model}
    assert len(table) == len(model)
    for span in model:
        assert span.start_ns <= span.end_ns
        if span.parent_id is not None:
            parent = by_id[span.trace_id, span.parent_id]
            assert parent.start_ns <= span.start_ns and span.end_ns <= parent.end_ns
    encoder = OtlpEncoder(RESOURCES, "9")
    assert parse(encoder.encode(table)) == parse_sdk(model)
    assert parse(encoder.encode(table)) == parse_sdk(model), "templates are used again"


def test_single_spans_are_encoded_as_by_the_sdk() -> None:
    link = Link(2**127 + 5, 2**63 + 1)
    spans = [
        Span(1, 2, None, "request", None, 5, 9, {"a": True, "b": False, "ü": "", "n": -3}, None),
        Span(1, 3, 2, "ünïcode", None, 0, 0, {}, "Kéy", (link, Link(7, 8), link)),
        Span(2**128 - 1, 2**64 - 1, 4, "request", None, 2**63, 2**63 + 1, {"x": 2**62}, None,
             serves=True, trace_state="k=v,other@sys=1"),
    ]  # fmt: skip
    table = SpanBuilder("e", {}, 0).build([])
    ours = parse(OtlpEncoder(RESOURCES, "9").encode(table, spans))
    assert ours == parse_sdk(spans)
    more = OtlpEncoder(RESOURCES, "9").encode(table, [spans[1]._replace(dropped_links=4)])
    ((span,),) = parse(more).values()
    assert (len(span.links), span.dropped_links_count) == (3, 4)


def test_large_steps_are_cut_into_requests_that_servers_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(otlp_encoder, "MAX_REQUEST_BYTES", 40_000)
    monkeypatch.setattr(otlp_encoder, "_BLOB_BYTES", 10_000)
    meta = pack_meta(ring.COLLECTIVE, 1, 8, 11, 1)
    rows = np.zeros((2000, 8), np.int64)
    rows[:, ring.BEGIN] = np.arange(2000)
    rows[:, ring.END] = rows[:, ring.BEGIN] + 1
    rows[:, ring.META] = meta
    rows[:, ring.SEQUENCE] = rows[:, ring.TICKET] = np.arange(1, 2001)
    rows[7, ring.END] = 0
    names = dict(enumerate(NAMES))
    joined = JoinedStep(3, {0: rows})
    kept = KeptStep(3, trace_id("e", 3), "all", joined, step_facts([joined], names)[0].arrivals)
    requests = OtlpEncoder(RESOURCES, "9").encode(SpanBuilder("e", names, OFFSET).build([kept]))
    assert len(requests) > 10
    assert max(len(request.body) for request in requests) < 41_000
    assert parse(requests) == parse_sdk(model_spans(kept, "e", names, OFFSET))


@given(
    st.lists(
        st.one_of(big, st.sampled_from([127, 128, 2**14 - 1, 2**14, 2**28, 2**49])), min_size=1
    )
)
def test_a_padded_varint_is_the_number_in_eight_bytes(numbers: list[int]) -> None:
    packed = padded_varints(np.array(numbers)).astype("<u8").tobytes()
    for place, number in enumerate(numbers):
        piece = packed[place * 8 : place * 8 + 8]
        assert [byte >> 7 for byte in piece] == [1] * 7 + [0]
        assert sum((byte & 0x7F) << 7 * at for at, byte in enumerate(piece)) == number


def test_a_template_fills_its_holes_at_any_offset() -> None:
    piece = Piece(b"abc") + hole("n", ">u8", 8) + Piece(b"d") + hole("b", "u1", 1)
    columns = {"n": np.array([1, 2**64 - 1], np.uint64), "b": np.array([0, 1])}
    assert Template(piece).fill(columns, 2) == (
        b"abc" + bytes(7) + b"\1d\0" + b"abc" + b"\xff" * 8 + b"d\1"
    )
    assert [varint(0), varint(300), varint(-1)] == [b"\0", b"\xac\2", b"\xff" * 9 + b"\1"]
