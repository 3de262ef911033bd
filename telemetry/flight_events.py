"""The last events of all ranks, put side by side: what is the same on several ranks is one event.

Owns what makes records of different ranks the same event: the collective of that number in that
group, the phase of that name in that step (the nth, if it has several), the step. Knows no output.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .desync import comparable, difference, joinable
from .flight import FlightRank, FlightRun
from .flight_words import (
    call_text,
    dtype_text,
    duration_text,
    name_at,
    size_text,
    unique_of,
)
from .probe import unpack_frame
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    DEVICE,
    DISCARDED,
    END,
    ERROR,
    FRAME,
    GRAPH,
    META,
    NBYTES,
    PHASE,
    REQUEST,
    SEQUENCE,
    STEP,
    STEP_KIND,
    UNWAITED,
    meta_group,
    meta_kind,
    meta_name,
)

_SHOWN = (COLLECTIVE, PHASE, STEP_KIND, FRAME, GRAPH)
_LATE_NS = 1000  # less is not shown
_BEFORE = 256  # records looked at before the first that is wanted: ranks are not in step
_KINDS = {
    COLLECTIVE: "collective",
    PHASE: "phase",
    STEP_KIND: "step",
    FRAME: "frame",
    GRAPH: "graph",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One rank's part in an event. Times in ns since 1970; `end_ns` 0: it has not ended."""

    begin_ns: int
    end_ns: int
    status: str  # "ok", "in flight", "unwaited", "discarded" or the type of an exception
    what: str  # as this rank says it, for calls and frames


@dataclass(slots=True)
class Event:
    """Something that one or several ranks did."""

    kind: str
    step: int  # -1: outside any
    what: str
    differs: str = ""  # "op", "size" or "dtype": ranks called different things by this number
    cells: dict[int, Cell] = field(default_factory=dict)  # by rank
    calls: list[tuple[str, int, str]] = field(default_factory=list)  # what is compared

    @property
    def begin_ns(self) -> int:
        return min(cell.begin_ns for cell in self.cells.values())

    def text(self, rank: int, now_ns: int) -> str:
        """A rank's cell: "1.2 ms", "in flight 12.0 s", "1.2 ms (+3 ms)" if it came so late."""
        cell = self.cells.get(rank)
        if cell is None:
            return "-"
        in_flight = cell.end_ns == 0
        text = duration_text((now_ns if in_flight else cell.end_ns) - cell.begin_ns)
        if cell.status != "ok":
            text = f"{cell.status} {text}" if in_flight else f"{text} {cell.status}"
        late_ns = cell.begin_ns - self.begin_ns
        if late_ns >= _LATE_NS:
            text += f" (+{duration_text(late_ns)})"
        if self.kind == "frame":
            text = f"{cell.what} {text}"
        return f"! {cell.what}: {text}" if self.differs else text

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "what": self.what,
            "step": self.step if self.step >= 0 else None,
            "differs": self.differs or None,
            "ranks": {
                str(rank): {
                    "begin_ns": cell.begin_ns,
                    "end_ns": cell.end_ns or None,
                    "status": cell.status,
                    "call": cell.what or None,
                }
                for rank, cell in sorted(self.cells.items())
            },
        }


def last_events(run: FlightRun, count: int) -> list[Event]:
    """Every rank's last `count` events, with what other ranks have of them; earliest first."""
    events: dict[object, Event] = {}
    wanted: set[object] = set()
    for rank, rows in _since(run, count).items():
        one = run.ranks[rank]
        keys = _keys(rows, one)
        wanted.update(keys[-count:])
        for key, row in zip(keys, rows, strict=True):
            event = events.get(key)
            if event is None:
                kind = _KINDS[meta_kind(row[META])]
                event = events[key] = Event(kind, row[STEP], event_text(row, one))
            event.cells[rank] = Cell(row[BEGIN], row[END], status_text(row, one), _call(row, one))
            if event.kind == "collective":
                event.calls.append(comparable(row, one.image.names))
    chosen = [event for key, event in events.items() if key in wanted]
    for event in chosen:
        event.differs = difference(event.calls) if event.calls else ""
    return sorted(chosen, key=lambda event: event.begin_ns)


def _since(run: FlightRun, count: int) -> dict[int, list[list[int]]]:
    """By rank, what can have to do with the last `count` events of any rank.

    One that died early may lie far back in what the others have.
    """
    shown = {}
    for rank, one in run.ranks.items():
        rows = one.image.rows
        rows = rows[np.isin(rows[:, META] & 0xF, _SHOWN)]
        shown[rank] = rows[np.argsort(rows[:, BEGIN], kind="stable")]
    begins = [int(rows[-count:, BEGIN].min()) for rows in shown.values() if len(rows)]
    if not begins:
        return {}
    return {
        rank: rows[max(0, int(np.searchsorted(rows[:, BEGIN], min(begins))) - _BEFORE) :].tolist()
        for rank, rows in shown.items()
    }


def _keys(rows: Sequence[list[int]], one: FlightRank) -> list[object]:
    """By what each record is one event with those of other ranks."""
    names = one.image.names
    seen: Counter[object] = Counter()
    keys: list[object] = []
    for row in rows:
        kind, name = meta_kind(row[META]), name_at(names, meta_name(row[META]))
        entry = name_at(names, meta_group(row[META]))
        key: tuple[object, ...]
        if kind == COLLECTIVE:
            alone = () if joinable(entry, name) else (one.image.rank, name)
            key = (kind, unique_of(entry), row[SEQUENCE], *alone)
        elif kind == FRAME:
            key = (kind, entry, row[SEQUENCE])
        elif row[STEP] < 0:
            key = (kind, name, row[BEGIN], one.image.rank)
        else:
            key = (kind, name, row[STEP])
        seen[key] += 1
        keys.append((*key, seen[key]))
    return keys


def event_text(row: list[int], one: FlightRank) -> str:
    """What a record is called: "all_reduce #360 (tp, 16 KiB)", "step 12", "kv.swap_in"."""
    kind, names = meta_kind(row[META]), one.image.names
    if kind == COLLECTIVE:
        return call_text(row, names)
    if kind == STEP_KIND:
        return f"step {row[SEQUENCE]}"
    if kind == FRAME:
        nbytes = unpack_frame(row[NBYTES], row[AUX])[0]
        return (
            f"frame #{row[SEQUENCE]} ({name_at(names, meta_group(row[META]))}, {size_text(nbytes)})"
        )
    if kind == DEVICE:
        return call_text(row, names)
    if kind == REQUEST:
        return f"request {row[SEQUENCE]}"
    if kind == GRAPH:
        known = 0 <= row[SEQUENCE] < len(one.graphs)
        return one.graphs[row[SEQUENCE]] if known else f"graph {row[SEQUENCE]}"
    return name_at(names, meta_name(row[META]))


def _call(row: list[int], one: FlightRank) -> str:
    kind, names = meta_kind(row[META]), one.image.names
    if kind == COLLECTIVE:
        dtype = dtype_text(row, names)
        return call_text(row, names, group=False) + (f" of {dtype}" if dtype else "")
    return name_at(names, meta_name(row[META])) if kind == FRAME else ""


def status_text(row: list[int], one: FlightRank) -> str:
    """ "ok", "in flight", "unwaited", "discarded", or the type of the exception."""
    if not row[END]:
        return "in flight"
    if meta_kind(row[META]) not in (COLLECTIVE, PHASE, STEP_KIND):
        return "ok"
    status = row[AUX] & 0xFF
    if status == ERROR:
        return name_at(one.image.names, row[AUX] >> 8)
    return {UNWAITED: "unwaited", DISCARDED: "discarded"}.get(status, "ok")
