"""What the records add up to: histograms and totals of one node's ranks.

Owns what belongs together and when it is counted. The series are in `collective_totals`,
`step_totals`, `request_totals` and `graph_totals`. `add` only keeps the records (`batches`): they
are counted thousands at a time, because a few passes of numpy cost the same for ten records as for
a thousand, and in any case before something is read. Knows neither Prometheus nor traces.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .batches import Batch
from .collective_totals import CollectiveTotals, SpanIds
from .graph_totals import GraphTotals
from .histograms import (
    Histogram,
    merged_quantile,
)
from .labels import (
    SIZE_CLASSES,
    CollectiveKey,
    GroupKey,
    Part,
    bus_factor,
    group_label,
    name_at,
)
from .request_totals import RequestTotals
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    DEVICE,
    END,
    GRAPH,
    LAST_OF_STEP,
    META,
    OK,
    REQUEST,
    STEP_KIND,
    clock_offset_ns,
    meta_group,
    meta_kind,
    meta_name,
)
from .ring_reader import Rows
from .step_totals import StepTotals, unpack_frames
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
    "unpack_frames",
]


class Aggregate:
    """Totals since the start. Failed operations count as errors, not as durations.

    `local_ranks`: how many ranks the node has (None: not known); `run_dir`: where the manifests
    of CUDA graphs lie. What is read has all in it that was added before. Not for several threads.
    """

    def __init__(self, local_ranks: int | None = None, run_dir: str | None = None) -> None:
        self._batch = Batch()
        self._clock_offset_ns = clock_offset_ns()
        self._collectives = CollectiveTotals(local_ranks)
        self._requests = RequestTotals()
        self._graphs = GraphTotals(run_dir)
        self._steps = StepTotals()

    def add(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        """Take in finished records of one rank, of any kind; `names` may grow, never change."""
        if len(rows):
            if self._batch.full_before(rank):
                self._settle()
            self._batch.add(rank, rows, names)

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
                self._steps.durations.exemplify(
                    np.full(len(steps), self._steps.durations.row(rank)),
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
    def of_steps(self) -> StepTotals:
        """Of steps: durations, exposed communication, phases, frames."""
        self._settle()
        return self._steps

    @property
    def steps(self) -> Mapping[int, Histogram]:
        """By rank."""
        return self.of_steps.durations

    @property
    def exposed(self) -> Mapping[int, Histogram]:
        """Exposed communication of steps, by rank."""
        return self.of_steps.exposed

    @property
    def phases(self) -> Mapping[tuple[str, int], Histogram]:
        """By (phase, rank)."""
        return self.of_steps.phases

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
        if self._batch:
            collectives, others = self._batch.take()
            if collectives.parts:
                self._collectives.add(*collectives)
                self._steps.add_collectives(collectives.parts)
            if others.parts:
                self._steps.add(*others)
                self._add_rare(others.parts)
        if self._graphs.unknown:
            self._graphs.resolve()

    def _add_rare(self, parts: Sequence[Part]) -> None:
        for rank, rows, names in parts:
            kinds = rows[:, META] & 0xF
            if kinds.max() > LAST_OF_STEP:
                self._collectives.add_device(rank, rows[kinds == DEVICE], names)
                self._requests.add(rank, rows[kinds == REQUEST], names)
                self._graphs.add(rank, rows[kinds == GRAPH])


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
