"""Turns a joined step into spans: one trace per step, the same ids on every rank and node.

Owns the shape of the trace. Knows no file format and no exporter.

    engine.step                       envelope of the local ranks' worker.step
      worker.step                     one per rank
        model.forward, ...            phases
          all_reduce, ...             collectives, inside their phase or right inside the step

Trace and step span ids are hashes of (engine id, step, rank), so all agree without a byte on
the wire. A child always lies inside its parent: an asynchronous operation that outlives its phase
or step is cut there and says so. Times are perf_counter_ns until `clock_offset_ns` is added.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .aggregate import group_label
from .probe import unpack_frame
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    END,
    ERROR,
    FRAME,
    META,
    NBYTES,
    PHASE,
    SEQUENCE,
    STEP_KIND,
    TICKET,
    UNWAITED,
    meta_dtype,
    meta_group,
    meta_kind,
    meta_name,
)
from .steps import JoinedStep

Words = npt.NDArray[np.int64]
UnsignedWords = npt.NDArray[np.uint64]

Attribute = str | int | bool
_MASK64 = (1 << 64) - 1
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


@dataclass(slots=True)
class _Draft:
    """A span whose end and attributes may still change."""

    span_id: int
    parent: "_Draft | None"
    name: str
    start: int
    end: int
    attributes: dict[str, Attribute] = field(default_factory=dict)
    error: str | None = None


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


class SpanBuilder:
    """Builds the spans of steps. `names` are each rank's name tables, which grow by themselves."""

    def __init__(
        self,
        engine_id: str,
        names: Mapping[int, Sequence[str]],
        clock_offset_ns: int,
        *,
        with_engine_span: bool = True,
    ) -> None:
        self._engine_id = engine_id
        self._names = names
        self._offset = clock_offset_ns
        self._with_engine_span = with_engine_span  # one node has it: that of rank 0

    def build(self, joined: JoinedStep) -> list[Span]:
        """All spans of a step, parents before children."""
        drafts = {
            rank: self._worker(joined, rank)
            for rank in sorted(joined.rows.keys() | joined.unfinished.keys())
        }
        trace = trace_id(self._engine_id, joined.step)
        engine = engine_span_id(self._engine_id, joined.step)
        spans: list[Span] = []
        if self._with_engine_span:
            workers = [rank_drafts[0] for rank_drafts in drafts.values()]
            spans.append(
                Span(
                    trace,
                    engine,
                    None,
                    "engine.step",
                    None,
                    min(worker.start for worker in workers) + self._offset,
                    max(worker.end for worker in workers) + self._offset,
                    {"onecast.step.id": joined.step, **_first_batch_size(workers)},
                    next((worker.error for worker in workers if worker.error), None),
                )
            )
        for rank, rank_drafts in drafts.items():
            for draft in rank_drafts:
                parent = draft.parent.span_id if draft.parent is not None else engine
                spans.append(
                    Span(
                        trace,
                        draft.span_id,
                        parent,
                        draft.name,
                        rank,
                        draft.start + self._offset,
                        draft.end + self._offset,
                        draft.attributes,
                        draft.error,
                    )
                )
        return spans

    def _worker(self, joined: JoinedStep, rank: int) -> list[_Draft]:
        """One rank's spans, its worker.step first."""
        names = self._names[rank]
        rows: list[list[int]] = joined.rows[rank].tolist() if rank in joined.rows else []
        unfinished: list[list[int]] = (
            joined.unfinished[rank].tolist() if rank in joined.unfinished else []
        )
        everything = rows + unfinished
        worker = _Draft(
            worker_span_id(self._engine_id, joined.step, rank),
            None,
            "worker.step",
            min(row[BEGIN] for row in everything),
            max(max(row[BEGIN], row[END]) for row in everything),
            {"onecast.step.id": joined.step},
            "never ended",
        )
        for row in everything:
            if meta_kind(row[META]) == STEP_KIND:
                worker.start = row[BEGIN]
                worker.attributes["onecast.batch.size"] = row[NBYTES]
                if row[END]:
                    worker.end = row[END]
                    worker.error = _error(row, names)
        drafts = [worker]
        stack = [worker]
        # Longer first where two begin together: the outer one is the parent.
        for row in sorted(everything, key=lambda row: (row[BEGIN], -row[END])):
            kind = meta_kind(row[META])
            while len(stack) > 1 and row[BEGIN] >= stack[-1].end:
                stack.pop()
            parent = stack[-1]
            if kind == FRAME:
                _add_frame(parent, row, names)
            elif kind in (PHASE, COLLECTIVE):
                draft = _child(row, names, parent)
                drafts.append(draft)
                if kind == PHASE:
                    stack.append(draft)
        return drafts


def _first_batch_size(workers: Sequence[_Draft]) -> dict[str, Attribute]:
    key = "onecast.batch.size"
    return next(
        ({key: worker.attributes[key]} for worker in workers if key in worker.attributes), {}
    )


def _child(row: list[int], names: Sequence[str], parent: _Draft) -> _Draft:
    meta = row[META]
    top = parent
    while top.parent is not None:
        top = top.parent
    draft = _Draft(
        (top.span_id + row[TICKET] * _ODD) & _MASK64 or 1,
        parent,
        names[meta_name(meta)],
        min(max(row[BEGIN], parent.start), parent.end),
        min(row[END] or parent.end, parent.end),
        error=_error(row, names) if row[END] else "never ended",
    )
    draft.end = max(draft.start, draft.end)
    if meta_kind(meta) == COLLECTIVE:
        draft.attributes = {
            "onecast.collective.op": draft.name,
            "onecast.collective.group": group_label(names[meta_group(meta)]),
            "onecast.collective.seq": row[SEQUENCE],
            "onecast.collective.bytes": row[NBYTES],
            "onecast.collective.dtype": names[meta_dtype(meta)],
        }
        if row[AUX] & 0xFF == UNWAITED:
            draft.attributes["onecast.collective.unwaited"] = True
    if row[END] > parent.end:
        draft.attributes["onecast.cut_off_ns"] = row[END] - parent.end
    return draft


def _add_frame(parent: _Draft, row: list[int], names: Sequence[str]) -> None:
    """A frame is no span of its own: the phase that sent or received it carries its numbers."""
    nbytes, metadata, broadcasts, last = unpack_frame(row[NBYTES], row[AUX])
    sent = names[meta_name(row[META])] == "published"
    parts = ("encode", "publish") if sent else ("wait", "decode")
    parent.attributes.update(
        {
            "onecast.frame.sequence": row[SEQUENCE],
            "onecast.frame.bytes": nbytes,
            "onecast.frame.metadata_bytes": metadata,
            "onecast.frame.broadcasts": broadcasts,
            f"onecast.frame.{parts[0]}_ns": row[END] - row[BEGIN] - last,
            f"onecast.frame.{parts[1]}_ns": last,
        }
    )


def _error(row: list[int], names: Sequence[str]) -> str | None:
    return names[row[AUX] >> 8] if row[AUX] & 0xFF == ERROR else None
