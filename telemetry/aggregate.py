"""What the records add up to: histograms and totals of one node's ranks.

Owns the batching, and the series of steps and frames; those of collectives, requests and CUDA
graphs are in `collective_totals`, `request_totals` and `graph_totals`. `add` only keeps the
records: they are counted thousands at a time, because a few passes of numpy cost the same for ten
records as for a thousand, and in any case before something is read. Knows neither Prometheus nor
traces.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .collective_totals import CollectiveTotals, Part, SpanIds
from .exposed import ExposedTime
from .graph_totals import GraphTotals
from .histograms import LONG_DURATIONS, SIZES, Histogram, HistogramTable, merged_quantile
from .labels import SIZE_CLASSES, CollectiveKey, GroupKey, bus_factor, group_label, name_at
from .probe import unpack_frame
from .request_totals import RequestTotals
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    DEVICE,
    END,
    ERROR,
    FRAME,
    GRAPH,
    META,
    NBYTES,
    OK,
    PHASE,
    REQUEST,
    STEP_KIND,
    clock_offset_ns,
    meta_group,
    meta_kind,
    meta_name,
)
from .ring_reader import Rows
from .steps import JoinedStep

__all__ = [
    "SIZE_CLASSES",
    "Aggregate",
    "CollectiveKey",
    "GroupKey",
    "SpanIds",
    "bus_factor",
    "group_label",
    "oldest_in_flight",
]

_BATCH = 32768  # records; 2 MiB


class Aggregate:
    """Totals since the start. Failed operations count as errors, not as durations.

    `local_ranks`: how many ranks the node has (None: not known); `run_dir`: where the manifests
    of CUDA graphs lie. What is read has all in it that was added before. Not for several threads.
    """

    def __init__(self, local_ranks: int | None = None, run_dir: str | None = None) -> None:
        self._waiting: list[Part] = []
        self._num_waiting = 0
        self._clock_offset_ns = clock_offset_ns()
        self._collectives = CollectiveTotals(local_ranks)
        self._requests = RequestTotals()
        self._graphs = GraphTotals(run_dir)
        self._exposed_time: dict[int, ExposedTime] = defaultdict(ExposedTime)  # by rank
        self._phases: HistogramTable[tuple[str, int]] = HistogramTable(LONG_DURATIONS)
        self._steps: HistogramTable[int] = HistogramTable(LONG_DURATIONS)
        self._exposed: HistogramTable[int] = HistogramTable(LONG_DURATIONS)
        self._frame_bytes: HistogramTable[tuple[str, str, int]] = HistogramTable(SIZES)
        self._frame_metadata_bytes: HistogramTable[tuple[str, str, int]] = HistogramTable(SIZES)
        self._frame_parts: HistogramTable[tuple[str, str, int]] = HistogramTable(LONG_DURATIONS)
        self._frame_broadcasts: dict[tuple[str, str, int], int] = defaultdict(int)

    def add(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        """Take in finished records of one rank, of any kind; `names` may grow, never change."""
        if len(rows):
            self._waiting.append((rank, rows, names))
            self._num_waiting += len(rows)
            if self._num_waiting >= _BATCH:
                self._settle()

    def exemplify(
        self,
        joined: JoinedStep,
        names_by_rank: Mapping[int, Sequence[str]],
        trace_id: int,
        span_ids: SpanIds | None = None,
    ) -> None:
        """Let a kept step's records stand for the buckets that they were counted in.

        `span_ids(rank, rows)` gives the ids of the spans of these records, uint64 [n].
        """
        self._collectives.exemplify(
            joined, names_by_rank, trace_id, self._clock_offset_ns, span_ids
        )
        for rank, rows in joined.rows.items():
            steps = rows[(rows[:, META] & 0xF == STEP_KIND) & (rows[:, AUX] & 0xFF == OK)]
            if len(steps):
                spans = np.zeros(len(steps)) if span_ids is None else span_ids(rank, steps)
                self._steps.exemplify(
                    np.full(len(steps), self._steps.row(rank)),
                    steps[:, END] - steps[:, BEGIN],
                    steps[:, END] + self._clock_offset_ns,
                    trace_id,
                    spans.astype(np.uint64).view(np.int64),
                )

    # ---- what there is to read; mappings are views, good until the next `add`

    @property
    def totals(self) -> CollectiveTotals:
        """Of collectives: durations, device, waits, transfers, bytes, errors, ..."""
        self._settle()
        return self._collectives

    @property
    def collectives(self) -> Mapping[CollectiveKey, Histogram]:
        """Durations on the host's clock."""
        return self.totals.durations

    @property
    def device_durations(self) -> Mapping[CollectiveKey, Histogram]:
        return self.totals.device

    @property
    def arrival_waits(self) -> Mapping[CollectiveKey, Histogram]:
        return self.totals.waits

    @property
    def transfers(self) -> Mapping[CollectiveKey, Histogram]:
        return self.totals.transfers

    @property
    def payload_bytes(self) -> Mapping[CollectiveKey, int]:
        return self.totals.payload_bytes

    @property
    def bus_bytes(self) -> Mapping[CollectiveKey, float]:
        return self.totals.bus_bytes

    @property
    def last_arrivals(self) -> Mapping[GroupKey, int]:
        return self.totals.last_arrivals

    @property
    def sequence(self) -> Mapping[GroupKey, int]:
        return self.totals.sequence

    @property
    def errors(self) -> Mapping[tuple[GroupKey, str], int]:
        """With the type of the error."""
        return self.totals.errors

    @property
    def unjoined(self) -> Mapping[str, int]:
        """Records of collectives whose ranks could not be joined, by reason."""
        return self.totals.joiner.unjoined

    @property
    def phases(self) -> HistogramTable[tuple[str, int]]:
        """By (phase, rank)."""
        self._settle()
        return self._phases

    @property
    def steps(self) -> HistogramTable[int]:
        """By rank."""
        self._settle()
        return self._steps

    @property
    def exposed(self) -> HistogramTable[int]:
        """Exposed communication of steps, by rank."""
        self._settle()
        return self._exposed

    @property
    def frame_bytes(self) -> HistogramTable[tuple[str, str, int]]:
        """By (channel, direction, rank)."""
        self._settle()
        return self._frame_bytes

    @property
    def frame_metadata_bytes(self) -> HistogramTable[tuple[str, str, int]]:
        self._settle()
        return self._frame_metadata_bytes

    @property
    def frame_parts(self) -> HistogramTable[tuple[str, str, int]]:
        """By (channel, encode | publish | wait | decode, rank)."""
        self._settle()
        return self._frame_parts

    @property
    def frame_broadcasts(self) -> Mapping[tuple[str, str, int], int]:
        self._settle()
        return self._frame_broadcasts

    @property
    def requests(self) -> RequestTotals:
        self._settle()
        return self._requests

    @property
    def graphs(self) -> GraphTotals:
        self._settle()
        return self._graphs

    def report(self) -> dict[str, Any]:
        """Counts and quantiles by operation, group and rank, sizes together."""
        totals = self.totals
        payload_bytes, last = totals.payload_bytes, totals.last_arrivals
        merged: dict[GroupKey, list[CollectiveKey]] = defaultdict(list)
        for key in totals.durations:
            merged[GroupKey(key.op, key.group, key.rank)].append(key)
        collectives = []
        for by_group, keys in sorted(merged.items()):
            durations = [totals.durations[key] for key in keys]
            waits = [totals.waits[key] for key in keys if key in totals.waits]
            collectives.append(
                {
                    "op": by_group.op,
                    "group": by_group.group,
                    "rank": by_group.rank,
                    "count": sum(histogram.count for histogram in durations),
                    "p50_s": merged_quantile(durations, 0.5),
                    "p99_s": merged_quantile(durations, 0.99),
                    "bytes": sum(payload_bytes[key] for key in keys),
                    "arrival_wait_p50_s": merged_quantile(waits, 0.5) if waits else None,
                    "arrival_wait_p99_s": merged_quantile(waits, 0.99) if waits else None,
                    "last_arrivals": last.get(by_group, 0),
                }
            )
        phases = [
            {
                "phase": phase,
                "rank": rank,
                "count": histogram.count,
                "p50_s": histogram.quantile(0.5),
                "p99_s": histogram.quantile(0.99),
            }
            for (phase, rank), histogram in sorted(self.phases.items())
        ]
        return {
            "collectives": collectives,
            "phases": phases,
            "steps": max((histogram.count for histogram in self.steps.values()), default=0),
            "errors": sum(self.errors.values()),
            "unjoined": dict(self.unjoined),
        }

    # ---- counting

    def _settle(self) -> None:
        """Count everything that was added."""
        collectives, others = self._sorted_out()
        if collectives:
            self._collectives.add(collectives)
        for rank, rows, names in others:
            self._add_others(rank, rows, names)
        for rank, rows, _ in collectives:
            self._exposed_time[rank].add(rows)
        for rank, steps in self._ended_steps(others):
            exposed = self._exposed_time[rank].take(steps)
            self._exposed.add(np.full(len(exposed), self._exposed.row(rank)), exposed)
        if self._graphs.unknown:
            self._graphs.resolve()

    def _sorted_out(self) -> tuple[list[Part], list[Part]]:
        """What waits: collectives, and the rest; one entry a rank."""
        by_rank: dict[int, tuple[list[Rows], Sequence[str]]] = {}
        for rank, rows, names in self._waiting:
            by_rank.setdefault(rank, ([], names))[0].append(rows)
        self._waiting, self._num_waiting = [], 0
        collectives: list[Part] = []
        others: list[Part] = []
        for rank, (parts, names) in by_rank.items():
            everything = parts[0] if len(parts) == 1 else np.concatenate(parts)
            chosen = everything[:, META] & 0xF == COLLECTIVE
            for found, rows in ((collectives, everything[chosen]), (others, everything[~chosen])):
                if len(rows):
                    found.append((rank, rows, names))
        return collectives, others

    def _ended_steps(self, others: list[Part]) -> list[tuple[int, Rows]]:
        found = [(rank, rows[rows[:, META] & 0xF == STEP_KIND]) for rank, rows, _ in others]
        return [(rank, steps) for rank, steps in found if len(steps)]

    def _add_others(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        kinds, status = rows[:, META] & 0xF, rows[:, AUX] & 0xFF
        steps = rows[(kinds == STEP_KIND) & (status == OK)]
        self._steps.add(np.full(len(steps), self._steps.row(rank)), steps[:, END] - steps[:, BEGIN])
        self._add_phases(rank, rows[(kinds == PHASE) & (status != ERROR)], names)
        self._add_frames(rank, rows[kinds == FRAME], names)
        self._collectives.add_device(rank, rows[kinds == DEVICE], names)
        self._requests.add(rank, rows[kinds == REQUEST], names)
        self._graphs.add(rank, rows[kinds == GRAPH])

    def _add_phases(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        if not len(rows):
            return
        metas, which = np.unique(rows[:, META], return_inverse=True)
        series = [
            self._phases.row((name_at(names, meta_name(meta)), rank)) for meta in metas.tolist()
        ]
        self._phases.add(np.array(series, np.int64)[which], rows[:, END] - rows[:, BEGIN])

    def _add_frames(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        for meta in np.unique(rows[:, META]).tolist():
            chosen = rows[rows[:, META] == meta]
            channel, direction = name_at(names, meta_group(meta)), name_at(names, meta_name(meta))
            series = channel, direction, rank
            nbytes, metadata, broadcasts, last = unpack_frames(chosen)
            self._frame_broadcasts[series] += int(broadcasts.sum())
            first = chosen[:, END] - chosen[:, BEGIN] - last
            parts = ("encode", "publish") if direction == "published" else ("wait", "decode")
            for table, key, values in (
                (self._frame_bytes, series, nbytes),
                (self._frame_metadata_bytes, series, metadata),
                (self._frame_parts, (channel, parts[0], rank), first),
                (self._frame_parts, (channel, parts[1], rank), last),
            ):
                table.add(np.full(len(values), table.row(key)), values)


def unpack_frames(rows: Rows) -> tuple[Any, Any, Any, Any]:
    """`unpack_frame` on whole columns."""
    return unpack_frame(rows[:, NBYTES], rows[:, AUX])  # type: ignore[arg-type]


def oldest_in_flight(
    rank: int, rows: Rows, names: Sequence[str], now_ns: int
) -> dict[GroupKey, float]:
    """Age in seconds of the oldest unfinished collective of each operation and group."""
    ages: dict[GroupKey, float] = {}
    for row in rows.tolist():
        meta = row[META]
        if meta_kind(meta) == COLLECTIVE and not row[END]:
            key = GroupKey(
                name_at(names, meta_name(meta)), group_label(name_at(names, meta_group(meta))), rank
            )
            ages[key] = max(ages.get(key, 0.0), (now_ns - row[BEGIN]) * 1e-9)
    return ages
