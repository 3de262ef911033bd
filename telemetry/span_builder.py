"""Turns kept steps into spans: one trace per step, the same ids on every rank and node.

Owns the shape of the trace, and where each span begins and ends. Knows no format and no exporter.

    engine.step                       envelope of the local ranks' worker.step
      worker.step                     one per rank
        model.forward, ...            phases
          all_reduce, ...             collectives, inside their phase or right inside the step

A child always lies inside its parent: an asynchronous operation that outlives its phase or step is
cut there and says so. A frame is no span: the phase that carried it has its numbers. Times are
perf_counter_ns until `clock_offset_ns` is added.

All operations of a rank are placed at once, in many steps together; only phases, few beside the
collectives, are walked one by one (`span_nodes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .aggregate import unpack_frames
from .kept_step import MAX_VALUE, KeptStep
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
    meta_name,
    pack_meta,
)
from .ring_reader import Rows
from .span_nodes import Nodes, workers_of
from .span_shapes import CUT, META_MASK, RECEIVED, SENT, SIZED, WAITED, name_at
from .span_shapes import UNWAITED as NOT_WAITED_FOR
from .span_table import NEVER_ENDED, NO_ERROR, RankSpans, SpanTable
from .spans import Attribute, Span, Words, child_span_ids, engine_span_id, worker_span_id

_FOREVER = (1 << 63) - 1


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

    def build(self, steps: Sequence[KeptStep]) -> SpanTable:
        """All spans of these steps."""
        places: dict[int, list[int]] = {}  # by rank: of the steps that it has
        for place, kept in enumerate(steps):
            for rank in kept.ranks:
                places.setdefault(rank, []).append(place)
        ids = [engine_span_id(self._engine_id, kept.step) for kept in steps]
        engines = [_Envelope() for _ in steps]
        ranks = []
        for rank in sorted(places):
            of_rank = places[rank]
            part = self._rank(
                rank, [steps[place] for place in of_rank], [ids[place] for place in of_rank]
            )
            ranks.append(part)
            workers = slice(0, len(of_rank))  # they stand first
            for place, start, end, size, shape, error in zip(
                of_rank,
                part.start_ns[workers].tolist(),
                part.end_ns[workers].tolist(),
                part.nbytes[workers].tolist(),
                part.shape[workers].tolist(),
                part.error[workers].tolist(),
                strict=True,
            ):
                engines[place].take(
                    start, end, size if shape & SIZED else None, part.error_text(error)
                )
        if not self._with_engine_span:
            return SpanTable([], ranks)
        return SpanTable([*map(_engine_span, steps, ids, engines)], ranks)

    def _rank(self, rank: int, steps: list[KeptStep], engine_ids: list[int]) -> RankSpans:
        """The spans of one rank, the worker.step of each step first."""
        names = self._names[rank]
        parts = [kept.rows_of(rank) for kept in steps]
        lengths = [len(part) for part in parts]
        rows = np.concatenate(parts)
        lane = np.repeat(np.arange(len(steps)), lengths)
        kinds = rows[:, META] & 0xF
        workers = workers_of(rows, kinds, lane, np.cumsum([0, *lengths[:-1]]))
        worker_ids = np.array(
            [worker_span_id(self._engine_id, kept.step, rank) for kept in steps], np.uint64
        )

        # What lies inside the steps, in the order it began; of two that began together, the longer
        # one first, because it holds the other.
        chosen = np.flatnonzero((kinds == COLLECTIVE) | (kinds == PHASE) | (kinds == FRAME))
        ends = rows[chosen, END]
        ends[ends == 0] = _FOREVER
        order = np.lexsort((-ends, rows[chosen, BEGIN], lane[chosen]))
        chosen = chosen[order]
        inner, inner_lane, inner_kind = rows[chosen], lane[chosen], kinds[chosen]
        nodes = Nodes(workers, inner[inner_kind == PHASE], inner_lane[inner_kind == PHASE])
        parent = nodes.hold(inner[:, BEGIN], inner_lane, inner_kind == PHASE)

        is_frame = inner_kind == FRAME
        frames, frame_of_node, frame_flag = _frames(inner[is_frame], parent[is_frame], nodes, names)
        keep = np.flatnonzero(~is_frame)
        inner, inner_lane, parent, chosen = (
            inner[keep],
            inner_lane[keep],
            parent[keep],
            chosen[keep],
        )
        starts, stops, cut = nodes.clip(inner[:, BEGIN], inner[:, END], parent)
        child_ids = child_span_ids(worker_ids[inner_lane], inner[:, TICKET])
        is_phase = inner_kind[keep] == PHASE
        node_ids = np.concatenate([worker_ids, child_ids[is_phase]])

        waits = np.concatenate([kept.arrivals[rank].wait_ns for kept in steps])[chosen]
        last = np.concatenate([kept.arrivals[rank].is_last for kept in steps])[chosen]
        status = inner[:, AUX] & 0xFF
        open_ended = inner[:, END] == 0
        shape = inner[:, META] & META_MASK
        shape |= np.where(~is_phase & (waits >= 0), WAITED, 0)
        shape |= np.where(~is_phase & (status == UNWAITED) & ~open_ended, NOT_WAITED_FOR, 0)
        shape |= np.where(cut > 0, CUT, 0)
        shape[is_phase] |= frame_flag[len(steps) :]
        frame = np.full(len(inner), -1, np.int64)
        frame[is_phase] = frame_of_node[len(steps) :]
        error = np.where(status == ERROR, inner[:, AUX] >> 8, NO_ERROR)
        error[open_ended] = NEVER_ENDED

        nothing = np.zeros(len(steps), np.int64)
        worker_shape = np.where(workers.size >= 0, SIZED, 0) | pack_meta(STEP_KIND)
        all_lanes = np.concatenate([np.arange(len(steps)), inner_lane])
        traces = [(kept.trace_id >> 64, kept.trace_id & (1 << 64) - 1) for kept in steps]
        numbers = np.array([kept.step for kept in steps], np.int64)
        return RankSpans(
            rank=rank,
            names=names,
            shape=np.concatenate([worker_shape | frame_flag[: len(steps)], shape]),
            error=np.concatenate([workers.error, error]),
            trace=np.array(traces, np.uint64)[all_lanes],
            span_id=np.concatenate([worker_ids, child_ids]),
            parent_id=np.concatenate([np.array(engine_ids, np.uint64), node_ids[parent]]),
            start_ns=np.concatenate([workers.start, starts]) + self._offset,
            end_ns=np.concatenate([workers.end, stops]) + self._offset,
            step=_bounded(numbers)[all_lanes],
            nbytes=_bounded(np.concatenate([workers.size, inner[:, NBYTES]])),
            number=_bounded(np.concatenate([nothing, inner[:, SEQUENCE]])),
            wait_ns=_bounded(np.concatenate([nothing, waits])),
            is_last=np.concatenate([nothing, last.astype(np.int64)]),
            cut_ns=_bounded(np.concatenate([nothing, cut])),
            frame=np.concatenate([frame_of_node[: len(steps)], frame]),
            frames=frames,
        )


def _frames(
    rows: Rows, parent: Words, nodes: Nodes, names: Sequence[str]
) -> tuple[Words, Words, Words]:
    """The numbers of the frames; of each node the row of its last one or -1, and a shape's flag."""
    nbytes, metadata, broadcasts, last = unpack_frames(rows)
    first = rows[:, END] - rows[:, BEGIN] - last
    columns: list[Words] = [rows[:, SEQUENCE], nbytes, metadata, broadcasts, first, last]
    metas, meta_of = np.unique(rows[:, META], return_inverse=True)
    sent = [name_at(names, meta_name(meta)) == "published" for meta in metas.tolist()]
    flags = np.where(np.array(sent, np.bool_), SENT, RECEIVED)[meta_of]
    of_node = np.full(len(nodes), -1, np.int64)
    of_node[parent] = np.arange(len(rows))
    flag_of_node = np.zeros(len(nodes), np.int64)
    flag_of_node[parent] = flags
    return _bounded(np.stack(columns, axis=1)), of_node, flag_of_node


def _bounded(values: Words) -> Words:
    """What an attribute can hold; beyond are only torn records."""
    return np.clip(values, 0, MAX_VALUE)


@dataclass(slots=True)
class _Envelope:
    """What the workers of one step say of it together."""

    start: int = _FOREVER
    end: int = 0
    size: int | None = None
    error: str | None = None

    def take(self, start: int, end: int, size: int | None, error: str | None) -> None:
        self.start, self.end = min(self.start, start), max(self.end, end)
        self.size = size if self.size is None else self.size
        self.error = self.error or error


def _engine_span(kept: KeptStep, span_id: int, found: _Envelope) -> Span:
    attributes: dict[str, Attribute] = {"onecast.step.id": min(kept.step, MAX_VALUE)}
    if found.size is not None:
        attributes["onecast.batch.size"] = found.size
    attributes["onecast.trace.reason"] = kept.reason
    if found.error is not None:
        attributes["error.type"] = found.error
    return Span(
        kept.trace_id,
        span_id,
        None,
        "engine.step",
        None,
        found.start,
        found.end,
        attributes,
        found.error,
        kept.links,
        kept.dropped_links,
    )
