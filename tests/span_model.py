"""The spans of a step, one object at a time: what the columns of `span_builder` must equal.

A helper, not a test. Written for clarity; a step costs it what a thousand cost the columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as SdkLink
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.span import TraceState
from opentelemetry.trace.status import Status, StatusCode

from onecast.telemetry import ring
from onecast.telemetry.kept_step import KeptStep
from onecast.telemetry.probe import unpack_frame
from onecast.telemetry.ring import meta_dtype, meta_group, meta_kind, meta_name
from onecast.telemetry.spans import Attribute, Link, Span, engine_span_id, worker_span_id

MASK64 = (1 << 64) - 1
ODD = 0x9E3779B97F4A7C15


@dataclass
class Draft:
    """A span whose end and attributes may still change."""

    span_id: int
    parent: "Draft | None"
    name: str
    start: int
    end: int
    attributes: dict[str, Attribute] = field(default_factory=dict)
    frame: dict[str, Attribute] = field(default_factory=dict)
    error: str | None = None


def model_spans(
    kept: KeptStep, engine_id: str, names: Mapping[int, Sequence[str]], offset: int
) -> list[Span]:
    drafts = {rank: _worker(kept, rank, engine_id, names[rank]) for rank in kept.ranks}
    engine = engine_span_id(engine_id, kept.step)
    workers = [of_rank[0] for of_rank in drafts.values()]
    attributes: dict[str, Attribute] = {"onecast.step.id": kept.step}
    sizes = [w.attributes["onecast.batch.size"] for w in workers if len(w.attributes) > 1]
    if sizes:
        attributes["onecast.batch.size"] = sizes[0]
    attributes["onecast.trace.reason"] = kept.reason
    error = next((worker.error for worker in workers if worker.error), None)
    spans = [
        Span(
            kept.trace_id,
            engine,
            None,
            "engine.step",
            None,
            min(worker.start for worker in workers) + offset,
            max(worker.end for worker in workers) + offset,
            attributes | ({"error.type": error} if error else {}),
            error,
            kept.links,
            kept.dropped_links,
        )
    ]
    for rank, of_rank in drafts.items():
        for draft in of_rank:
            errors = {"error.type": draft.error} if draft.error else {}
            spans.append(
                Span(
                    kept.trace_id,
                    draft.span_id,
                    draft.parent.span_id if draft.parent else engine,
                    draft.name,
                    rank,
                    draft.start + offset,
                    draft.end + offset,
                    draft.attributes | draft.frame | errors,
                    draft.error,
                )
            )
    return spans


def _worker(kept: KeptStep, rank: int, engine_id: str, names: Sequence[str]) -> list[Draft]:
    rows: list[list[int]] = kept.rows_of(rank).tolist()
    worker = Draft(
        worker_span_id(engine_id, kept.step, rank),
        None,
        "worker.step",
        min(row[ring.BEGIN] for row in rows),
        max(max(row[ring.BEGIN], row[ring.END]) for row in rows),
        {"onecast.step.id": kept.step},
        error="never ended",
    )
    for row in rows:
        if meta_kind(row[ring.META]) == ring.STEP_KIND:
            worker.start = row[ring.BEGIN]
            worker.attributes["onecast.batch.size"] = row[ring.NBYTES]
            if row[ring.END]:
                worker.end = row[ring.END]
                worker.error = _error(row, names)
    drafts, stack = [worker], [worker]
    waits = kept.arrivals[rank]
    places = range(len(rows))
    for place in sorted(
        places, key=lambda p: (rows[p][ring.BEGIN], -(rows[p][ring.END] or 1 << 63), p)
    ):
        row = rows[place]
        kind = meta_kind(row[ring.META])
        if kind not in (ring.PHASE, ring.COLLECTIVE, ring.FRAME):
            continue
        while len(stack) > 1 and row[ring.BEGIN] >= stack[-1].end:
            stack.pop()
        parent = stack[-1]
        if kind == ring.FRAME:
            parent.frame = _frame(row, names)
            continue
        draft = _child(row, names, parent, worker)
        drafts.append(draft)
        if kind == ring.PHASE:
            stack.append(draft)
        else:
            if waits.wait_ns[place] >= 0:
                draft.attributes["onecast.collective.arrival_wait_ns"] = int(waits.wait_ns[place])
                draft.attributes["onecast.collective.is_last"] = bool(waits.is_last[place])
            if row[ring.END] and row[ring.AUX] & 0xFF == ring.UNWAITED:
                draft.attributes["onecast.collective.unwaited"] = True
        if row[ring.END] > parent.end:
            draft.attributes["onecast.cut_off_ns"] = row[ring.END] - parent.end
    return drafts


def _child(row: list[int], names: Sequence[str], parent: Draft, worker: Draft) -> Draft:
    meta = row[ring.META]
    start = min(max(row[ring.BEGIN], parent.start), parent.end)
    draft = Draft(
        (worker.span_id + row[ring.TICKET] * ODD) & MASK64 or 1,
        parent,
        names[meta_name(meta)],
        start,
        max(start, min(row[ring.END] or parent.end, parent.end)),
        error=_error(row, names) if row[ring.END] else "never ended",
    )
    if meta_kind(meta) == ring.COLLECTIVE:
        draft.attributes = {
            "onecast.collective.op": draft.name,
            "onecast.collective.group": names[meta_group(meta)].partition("\t")[0],
            "onecast.collective.seq": row[ring.SEQUENCE],
            "onecast.collective.bytes": row[ring.NBYTES],
            "onecast.collective.dtype": names[meta_dtype(meta)],
        }
    return draft


def _frame(row: list[int], names: Sequence[str]) -> dict[str, Attribute]:
    nbytes, metadata, broadcasts, last = unpack_frame(row[ring.NBYTES], row[ring.AUX])
    sent = names[meta_name(row[ring.META])] == "published"
    parts = ("encode", "publish") if sent else ("wait", "decode")
    return {
        "onecast.frame.sequence": row[ring.SEQUENCE],
        "onecast.frame.bytes": nbytes,
        "onecast.frame.metadata_bytes": metadata,
        "onecast.frame.broadcasts": broadcasts,
        f"onecast.frame.{parts[0]}_ns": max(0, row[ring.END] - row[ring.BEGIN] - last),
        f"onecast.frame.{parts[1]}_ns": last,
    }


def _error(row: list[int], names: Sequence[str]) -> str | None:
    return names[row[ring.AUX] >> 8] if row[ring.AUX] & 0xFF == ring.ERROR else None


def sdk_span(span: Span, attributes: Mapping[str, Attribute], scope_version: str) -> ReadableSpan:
    """The same span as the SDK has it; `attributes` are its resource's."""
    parent = None
    if span.parent_id is not None:
        parent = _context(span.trace_id, span.parent_id, remote=span.serves)
    state = TraceState.from_header([span.trace_state]) if span.trace_state else None
    made = ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id, state=state),
        parent=parent,
        resource=Resource(attributes),
        attributes=span.attributes,
        links=[SdkLink(_context(link.trace_id, link.span_id)) for link in span.links],
        kind=SpanKind.SERVER if span.serves else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=InstrumentationScope("onecast.telemetry", scope_version),
    )
    return made


def _context(
    trace_id: int, span_id: int, *, remote: bool = False, state: TraceState | None = None
) -> SpanContext:
    return SpanContext(trace_id, span_id, remote, TraceFlags(TraceFlags.SAMPLED), state)


def link_pairs(links: Sequence[Link]) -> list[tuple[int, int]]:
    return [(link.trace_id, link.span_id) for link in links]
