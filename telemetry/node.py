"""The state of one node: its rings, what they add up to, and where their steps go.

Owns the order of things: find rings, drain them, count, join, hand on. One lock, because scrapes
come from HTTP threads. Knows neither HTTP nor processes' ends; `sidecar` does.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .aggregate import Aggregate, group_label, oldest_in_flight
from .errors import TelemetryError
from .metrics import RankState, Snapshot
from .otlp import OtlpExport
from .ring import UNSET
from .ring_reader import RingReader, Rows
from .spans import SpanBuilder
from .steps import JoinedStep, StepJoiner
from .trace_file import TraceFile
from .values import VALUES

_logger = logging.getLogger(__name__)


class Node:
    """All rings of one run directory."""

    def __init__(
        self,
        run_dir: str,
        *,
        engine_id: str,
        local_world_size: int,
        trace_file: TraceFile | None,
        otlp: OtlpExport | None,
    ) -> None:
        self.readers: dict[int, RingReader] = {}  # by rank
        self._run_dir = Path(run_dir)
        self._engine_id = engine_id
        self._pending: dict[int, Rows] = {}  # by rank, as of the last drain
        self._expected = local_world_size
        self._trace_file = trace_file
        self._otlp = otlp
        self._joiner = StepJoiner(local_world_size)
        self._totals = Aggregate()
        self._steps = 0
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._unreadable: set[Path] = set()
        self._lock = threading.Lock()
        self._builder: SpanBuilder | None = None

    def poll(self) -> None:
        """Attach rings that have appeared, and take in what has finished."""
        with self._lock:
            self._drain()

    def finish(self) -> None:
        """The last poll: steps that never ended leave as they are, and the outputs close."""
        with self._lock:
            self._drain(last=True)
        if self._otlp is not None:
            self._otlp.close()
        if self._trace_file is not None and self._builder is not None:
            try:
                self._trace_file.write(self._builder.build)
            except OSError as error:
                self._dropped["steps", "trace_file"] += self._steps
                _logger.error("cannot write the trace file %s: %s", self._trace_file.path, error)

    @property
    def ended(self) -> bool:
        """Whether each ring has been closed or its process has died."""
        return all(reader.closed or not reader.alive for reader in self.readers.values())

    @property
    def complete(self) -> bool:
        """Whether every local rank has shown up."""
        return len(self.readers) >= self._expected

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Everything as of now, held still."""
        with self._lock:
            self._drain()
            now_ns = time.perf_counter_ns()
            ranks = [self._rank_state(reader, now_ns) for reader in self.readers.values()]
            yield Snapshot(self._engine_id, self._totals, ranks, self._all_dropped())

    def report(self) -> dict[str, Any]:
        with self._lock:
            self._drain()
            dropped = self._all_dropped()
            return {
                **self._totals.report(),
                "engine_id": self._engine_id,
                "ranks": sorted(self.readers),
                "trace_file": str(self._trace_file.path) if self._trace_file is not None else None,
                "spans_exported": self._otlp.exported if self._otlp is not None else 0,
                "dropped": sum(dropped.values()),
                "dropped_by_reason": {
                    f"{signal}/{reason}": count for (signal, reason), count in dropped.items()
                },
            }

    def _drain(self, *, last: bool = False) -> None:
        self._attach()
        for rank, reader in self.readers.items():
            drained = reader.drain()
            if drained.lost:
                self._dropped["records", "overrun"] += drained.lost
            self._totals.add(rank, drained.rows, reader.names)
            self._joiner.add(rank, drained.rows)
            self._pending[rank] = drained.pending
        if self._builder is None:
            return
        for joined in self._joiner.release(self._pending, everything=last):
            self._hand_on(joined, self._builder)

    def _hand_on(self, joined: JoinedStep, builder: SpanBuilder) -> None:
        self._steps += 1
        if self._trace_file is not None:
            self._trace_file.add(joined)
        if self._otlp is not None:
            self._otlp.submit(builder.build(joined))

    def _attach(self) -> None:
        if self.complete:
            return
        for path in sorted(self._run_dir.glob("rank-*.ring")):
            if path in self._unreadable or any(r.path == path for r in self.readers.values()):
                continue
            try:
                reader = RingReader(path)
            except (TelemetryError, OSError) as error:
                self._unreadable.add(path)
                _logger.error("%s", error)
                continue
            self.readers[reader.rank] = reader
        if self.complete:
            # One clock for all ranks of the node, or children might leave their parents.
            first = self.readers[min(self.readers)]
            self._builder = SpanBuilder(
                self._engine_id,
                {rank: reader.names for rank, reader in self.readers.items()},
                first.clock_offset_ns,
                with_engine_span=first.rank == 0,
            )

    def _all_dropped(self) -> dict[tuple[str, str], int]:
        dropped = dict(self._dropped)
        if self._joiner.late:
            dropped["records", "late"] = self._joiner.late
        if self._otlp is not None:
            for reason, count in self._otlp.dropped.items():
                dropped["spans", reason] = count
        if self._trace_file is not None and self._trace_file.left_out:
            dropped["steps", "trace_file_full"] = self._trace_file.left_out
        return dropped

    def _rank_state(self, reader: RingReader, now_ns: int) -> RankState:
        names = reader.names
        values = {
            index: value
            for index, value in enumerate(reader.values[: len(VALUES)])
            if value != UNSET
        }
        unrecorded: Counter[str] = Counter()
        for entry, count in enumerate(reader.coverage):
            if entry < len(names) and "\t" in names[entry]:
                unrecorded[group_label(names[entry])] += count
        in_flight = oldest_in_flight(reader.rank, self._pending[reader.rank], names, now_ns)
        up = reader.alive and not reader.closed
        return RankState(reader.rank, up, values, dict(unrecorded), in_flight)
