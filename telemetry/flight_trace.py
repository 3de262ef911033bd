"""A run's last records as Chrome trace events, for Perfetto's page: every rank a process.

Owns the form; times are microseconds since the first record shown, by the one clock of the run.
Phases and steps nest on a rank's first thread. Collectives that overlap each other get threads of
their own, device times one beside them. What never ended is drawn up to the end and says so.
"""

import heapq
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .flight import FlightRank, FlightRun
from .flight_events import event_text, status_text
from .flight_words import dtype_text, label_of, name_at
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    DEVICE,
    END,
    FRAME,
    GRAPH,
    META,
    NBYTES,
    PHASE,
    REQUEST,
    SEQUENCE,
    STEP,
    STEP_KIND,
    meta_group,
    meta_kind,
)
from .ring_reader import Rows

_DRAWN = (COLLECTIVE, PHASE, STEP_KIND, FRAME, GRAPH, DEVICE, REQUEST)
_MAIN, _COLLECTIVES, _DEVICE, _FRAMES, _REQUESTS = (number * 1_000_000 for number in range(5))
_CATEGORIES = {
    COLLECTIVE: "collective",
    PHASE: "phase",
    STEP_KIND: "step",
    FRAME: "frame",
    GRAPH: "graph",
    DEVICE: "device",
    REQUEST: "request",
}
_BASES = {DEVICE: _DEVICE, FRAME: _FRAMES, REQUEST: _REQUESTS}
_THREADS = {
    _MAIN: "steps and phases",
    _COLLECTIVES: "collectives",
    _DEVICE: "device",
    _FRAMES: "frames",
    _REQUESTS: "requests",
}


def write_trace(run: FlightRun, path: str | Path) -> None:
    """Write the file whole or not at all. Raises OSError."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(unfinished, "x", encoding="ascii") as file:
            file.write(json.dumps(trace(run), separators=(",", ":")))  # `dump` is six times slower
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def trace(run: FlightRun) -> dict[str, Any]:
    """The JSON object: {"traceEvents": [...], "displayTimeUnit", "otherData"}."""
    begins = [int(rows[:, BEGIN].min()) for one in run.ranks.values() if len(rows := _drawn(one))]
    epoch_ns = min(begins, default=run.now_ns)
    events = [event for one in run.ranks.values() for event in _rank(one, epoch_ns)]
    other = {"engine_id": run.engine_id, "epoch_ns": str(epoch_ns), "run": run.path}
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}


def _drawn(one: FlightRank) -> Rows:
    rows = one.image.rows
    chosen: Rows = rows[np.isin(rows[:, META] & 0xF, _DRAWN)]
    return chosen


def _rank(one: FlightRank, epoch_ns: int) -> Iterator[dict[str, Any]]:
    rank = one.image.rank
    rows = sorted(_drawn(one).tolist(), key=lambda row: (row[BEGIN], -(row[END] or one.now_ns)))
    lanes = {base: _Lanes(base) for base in _THREADS}
    yield _metadata("process_name", rank, 0, name=f"rank {rank} ({one.state})")
    yield _metadata("process_sort_index", rank, 0, sort_index=rank)
    named: set[int] = set()
    for row in rows:
        end_ns = row[END] or max(one.now_ns, row[BEGIN])
        kind = meta_kind(row[META])
        thread = _MAIN
        if kind not in (PHASE, STEP_KIND):
            thread = lanes[_BASES.get(kind, _COLLECTIVES)].take(row[BEGIN], end_ns)
        if thread not in named:
            named.add(thread)
            yield _metadata("thread_name", rank, thread, name=_THREADS[thread - thread % 1_000_000])
        yield {
            "name": event_text(row, one),
            "ph": "X",
            "ts": (row[BEGIN] - epoch_ns) / 1000,
            "dur": (end_ns - row[BEGIN]) / 1000,
            "pid": rank + 1,  # Perfetto takes process 0 for the idle one
            "tid": thread,
            "cat": _CATEGORIES[kind],
            "args": _arguments(row, one),
        }


class _Lanes:
    """Events of one thread must nest: those that need not do so each get one that is free."""

    def __init__(self, base: int) -> None:
        self._free = [base]
        self._newest = base
        self._taken: list[tuple[int, int]] = []  # until when, which

    def take(self, begin_ns: int, end_ns: int) -> int:
        while self._taken and self._taken[0][0] <= begin_ns:
            heapq.heappush(self._free, heapq.heappop(self._taken)[1])
        if not self._free:
            self._newest += 1
            self._free.append(self._newest)
        thread = heapq.heappop(self._free)
        heapq.heappush(self._taken, (end_ns, thread))
        return thread


def _arguments(row: list[int], one: FlightRank) -> dict[str, Any]:
    names, kind = one.image.names, meta_kind(row[META])
    found: dict[str, Any] = {"status": status_text(row, one)}
    if row[STEP] >= 0:
        found["step"] = row[STEP]
    if kind in (COLLECTIVE, DEVICE):
        found["group"] = label_of(name_at(names, meta_group(row[META])))
        found["sequence"] = row[SEQUENCE]
        found["bytes"] = row[NBYTES]
        found["dtype"] = dtype_text(row, names)
        if kind == COLLECTIVE and row[END] and row[AUX] & 0xFF == 0 and row[AUX] >> 8:
            found["waited_after_ns"] = row[AUX] >> 8
    return found


def _metadata(name: str, rank: int, thread: int, /, **args: object) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank + 1, "tid": thread, "args": args}
