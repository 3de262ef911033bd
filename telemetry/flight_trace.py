"""A run's last records as Chrome trace events, for Perfetto's page: every rank a process.

Owns the form; times are microseconds since the first record shown, by the one clock of the run.
Phases and steps nest on a rank's first thread. Collectives that overlap each other get threads of
their own, device times one beside them. What never ended is drawn up to the end and says so.
"""

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

_DRAWN = (COLLECTIVE, PHASE, STEP_KIND, FRAME, GRAPH, DEVICE, REQUEST)
_MAIN, _LANES, _DEVICE, _FRAMES, _REQUESTS = 0, 10, 500, 600, 1000
_CATEGORIES = {
    COLLECTIVE: "collective",
    PHASE: "phase",
    STEP_KIND: "step",
    FRAME: "frame",
    GRAPH: "graph",
    DEVICE: "device",
    REQUEST: "request",
}
_THREADS = {_MAIN: "steps and phases", _DEVICE: "device", _FRAMES: "frames"}


def write_trace(run: FlightRun, path: str | Path) -> None:
    """Write the file whole or not at all. Raises OSError."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(unfinished, "x", encoding="ascii") as file:
            json.dump(trace(run), file, separators=(",", ":"))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def trace(run: FlightRun) -> dict[str, Any]:
    """The JSON object: {"traceEvents": [...], "displayTimeUnit", "otherData"}."""
    begins = [
        row[BEGIN] for one in run.ranks.values() for row in one.image.rows.tolist() if _drawn(row)
    ]
    epoch_ns = min(begins, default=run.now_ns)
    events = [event for one in run.ranks.values() for event in _rank(one, epoch_ns)]
    other = {"engine_id": run.engine_id, "epoch_ns": str(epoch_ns), "run": run.path}
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}


def _drawn(row: list[int]) -> bool:
    return meta_kind(row[META]) in _DRAWN


def _rank(one: FlightRank, epoch_ns: int) -> Iterator[dict[str, Any]]:
    rank = one.image.rank
    rows = sorted(filter(_drawn, one.image.rows.tolist()), key=lambda row: (row[BEGIN], -row[END]))
    lanes: dict[int, int] = {}  # thread: until when it is taken
    yield _metadata("process_name", rank, 0, name=f"rank {rank} ({one.state})")
    yield _metadata("process_sort_index", rank, 0, sort_index=rank)
    named: set[int] = set()
    for row in rows:
        end_ns = row[END] or max(one.now_ns, row[BEGIN])
        thread = _thread(row, end_ns, lanes)
        if thread not in named:
            named.add(thread)
            yield _metadata("thread_name", rank, thread, name=_thread_name(thread))
        yield {
            "name": event_text(row, one),
            "ph": "X",
            "ts": (row[BEGIN] - epoch_ns) / 1000,
            "dur": (end_ns - row[BEGIN]) / 1000,
            "pid": rank + 1,  # Perfetto takes process 0 for the idle one
            "tid": thread,
            "cat": _CATEGORIES[meta_kind(row[META])],
            "args": _arguments(row, one),
        }


def _thread(row: list[int], end_ns: int, taken: dict[int, int]) -> int:
    """Events of one thread must nest: those that need not do so find one that is free."""
    kind = meta_kind(row[META])
    if kind in (PHASE, STEP_KIND):
        return _MAIN
    base = {DEVICE: _DEVICE, FRAME: _FRAMES, REQUEST: _REQUESTS}.get(kind, _LANES)
    thread = base
    while taken.get(thread, 0) > row[BEGIN]:
        thread += 1
    taken[thread] = end_ns
    return thread


def _thread_name(thread: int) -> str:
    if thread in _THREADS:
        return _THREADS[thread]
    return "requests" if thread >= _REQUESTS else "collectives"


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
