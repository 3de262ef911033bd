"""The state of one node: its rings, what they add up to, where their steps go, and what hangs.

Owns the order of things: find rings, drain them, count, join, hand on, watch. One lock, because
scrapes come from HTTP threads. Knows neither HTTP nor processes' ends; `sidecar` does.
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
from .cursors import Cursors
from .errors import TelemetryError
from .hang import Hang, HangWatch
from .metrics import RankState, Snapshot
from .ring import UNSET
from .ring_reader import Drained, RingReader, Rows
from .steps import StepJoiner
from .tracing import Tracing
from .values import VALUES

_logger = logging.getLogger(__name__)


class Node:
    """All rings of one run directory. What is public is read under `lock`."""

    def __init__(
        self,
        run_dir: str,
        *,
        engine_id: str,
        local_world_size: int,
        tracing: Tracing,
        hang_s: float = 0.0,
        cursors: Cursors | None = None,
        restarts: int = 0,
        worker_restarts: int = 0,
    ) -> None:
        """`hang_s` 0: hangs are not told. `cursors`: where the sidecar before, if any, had come to;
        `restarts`: how many there were; `worker_restarts`: how often the ranks began anew."""
        self.lock = threading.Lock()
        self.engine_id = engine_id
        self.local_world_size = local_world_size
        self.restarts = restarts
        self.worker_restarts = worker_restarts
        self.readers: dict[int, RingReader] = {}  # by rank
        self.pending: dict[int, Rows] = {}  # by rank: in flight at the last drain
        self.totals = Aggregate(local_ranks=local_world_size, run_dir=run_dir)
        self.tracing = tracing
        self._run_dir = Path(run_dir)
        self._joiner = StepJoiner(local_world_size)
        self._watch = HangWatch(hang_s, local_world_size)
        self._cursors = cursors
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._unreadable: set[Path] = set()
        self._polled_s = time.monotonic()

    @property
    def hangs(self) -> list[Hang]:
        """Those that go on."""
        return self._watch.hangs

    @property
    def has_told_of_hangs(self) -> bool:
        return self._watch.told

    @property
    def ended(self) -> bool:
        """Whether each ring has been closed or its process has died."""
        return all(reader.closed or not reader.alive for reader in self.readers.values())

    @property
    def complete(self) -> bool:
        """Whether every local rank has shown up."""
        return len(self.readers) >= self.local_world_size

    def poll(self) -> None:
        """Attach rings that have appeared, and take in what has finished."""
        with self.lock:
            self._drain()
        self._polled_s = time.monotonic()

    def seconds_since_poll(self) -> float:
        """Takes no lock: it is asked whether somebody holds it for too long."""
        return time.monotonic() - self._polled_s

    def presence(self) -> tuple[int, int]:
        """How many of the local ranks have come, and how many of those run."""
        readers = list(self.readers.values())
        return len(readers), sum(reader.alive and not reader.closed for reader in readers)

    def finish(self) -> None:
        """The last poll: steps that never ended leave as they are, and the outputs close."""
        with self.lock:
            self._drain(last=True)
        self.tracing.finish()  # without the lock: a slow endpoint must not stop a scrape

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Everything as of now, held still."""
        with self.lock:
            self._drain()
            now_ns = time.perf_counter_ns()
            ranks = [self._rank_state(reader, now_ns) for reader in self.readers.values()]
            yield Snapshot(
                self.engine_id,
                self.totals,
                ranks,
                self.dropped,
                found=self._watch.totals,
                sidecar_restarts=self.restarts,
                worker_restarts=self.worker_restarts,
            )

    def report(self) -> dict[str, Any]:
        with self.lock:
            self._drain()
            dropped, tracing = self.dropped, self.tracing
            trace_file = tracing.trace_file
            return {
                **self.totals.report(),
                "engine_id": self.engine_id,
                "ranks": sorted(self.readers),
                "trace_file": str(trace_file) if trace_file is not None else None,
                "spans_exported": tracing.exported,
                "sidecar_restarts": self.restarts,
                "hangs": [hang.text for hang in self.hangs],
                "dropped": sum(dropped.values()),
                "dropped_by_reason": {
                    f"{signal}/{reason}": count for (signal, reason), count in dropped.items()
                },
            }

    @property
    def dropped(self) -> dict[tuple[str, str], int]:
        """What was lost or left out so far, by signal and reason."""
        dropped = dict(self._dropped)
        if self._joiner.late:
            dropped["records", "late"] = self._joiner.late
        dropped.update(self.tracing.dropped)
        return dropped

    def _drain(self, *, last: bool = False) -> None:
        self._attach()
        drained = {rank: reader.drain() for rank, reader in self.readers.items()}
        for rank, found in drained.items():
            self._take(rank, found)
        self.pending = {rank: found.pending for rank, found in drained.items()}
        if self.complete and self.tracing.enabled:
            self._release(everything=last)
        for hang in self._watch.poll(self.readers, drained, time.perf_counter_ns(), last=last):
            _logger.warning("%s", hang.text)
        if self._cursors is not None:  # counted: what a sidecar after this one need not read again
            for reader in self.readers.values():
                self._cursors.store(reader.local_rank, reader.cursor, reader.cut_ns)

    def _take(self, rank: int, drained: Drained) -> None:
        if drained.lost:
            self._dropped["records", "overrun"] += drained.lost
        self.totals.add(rank, drained.rows, self.readers[rank].names)
        if self.tracing.enabled:
            self.tracing.requests(rank, drained.rows)
            self._joiner.add(rank, drained.rows)

    def _release(self, everything: bool) -> None:
        names = {rank: reader.names for rank, reader in self.readers.items()}
        released = self._joiner.release(self.pending, everything=everything)
        for kept in self.tracing.steps(released):
            self.totals.exemplify(kept.joined, names, kept.trace_id, kept.span_ids)

    def _attach(self) -> None:
        if self.complete:
            return
        for path in sorted(self._run_dir.glob("rank-*.ring")):
            if path in self._unreadable or any(r.path == path for r in self.readers.values()):
                continue
            try:
                reader = RingReader(path)
                if self._cursors is not None:
                    reader = RingReader(path, *self._cursors.load(reader.local_rank))
            except (TelemetryError, OSError) as error:
                self._unreadable.add(path)
                _logger.error("%s", error)
                continue
            self.readers[reader.rank] = reader
        if self.complete:
            self.tracing.attach(self.readers)

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
        in_flight = oldest_in_flight(reader.rank, self.pending[reader.rank], names, now_ns)
        up = reader.alive and not reader.closed
        return RankState(reader.rank, up, values, dict(unrecorded), in_flight)
