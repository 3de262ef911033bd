"""One kept step as plain columns: what the live view draws as lanes and bars.

Owns the shape of a step in `/live.json` and its size. Knows neither HTTP nor the page. Times are
whole nanoseconds from the step's first record; a bar is one collective of one rank.

    step  {step, reason, trace_id, at_ms, duration_ns, batch, ranks, bars, worst_wait_ns, error,
           detail}
    detail {kinds, phase_names, lanes, left_out}
      kinds [[op, group, number of the group in this step, group size, dtype, bytes], ...]
      lanes [{rank, begin_ns, end_ns, error, phases, bars, share, caused}, ...]
        phases [[number of its name, begin, duration, flags], ...]
        bars   columns of one length, in the order of their begin:
               begin     nanoseconds since the bar before (the first: since the step's begin)
               took      nanoseconds
               wait      of it until the last rank arrived; -1: not known
               overlap   of it before Work.wait was called; absent if 0 for all
               kind      number in kinds
               sequence  since the bar before
               flags     LAST | FAILED | UNWAITED_FLAG | OPEN
        share  nanoseconds of the step, as `live_share` has them
        caused [times this rank was last, nanoseconds for which the first rank waited for it then]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrivals import Arrivals
from .kept_step import KeptStep
from .labels import group_label, name_at
from .live_share import share_of
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    END,
    ERROR,
    FRAME,
    META,
    NBYTES,
    OK,
    PHASE,
    SEQUENCE,
    STEP_KIND,
    UNWAITED,
    meta_dtype,
    meta_group,
    meta_group_size,
    meta_name,
)
from .ring_reader import Rows

LAST, FAILED, UNWAITED_FLAG, OPEN = 1, 2, 4, 8
_MAX_BARS = 5000  # of one step, the longest; about 30 bytes of JSON each
_NEVER_ENDED = "never ended"
_MAX_PHASES = 400  # of one rank and step, the longest

Integers = npt.NDArray[np.int64]
Names = Mapping[int, Sequence[str]]


def step_outline(kept: KeptStep, names: Names, clock_offset_ns: int) -> dict[str, Any]:
    """A kept step as above, without `detail`; `names` are each rank's name tables."""
    parts = {rank: kept.rows_of(rank) for rank in kept.ranks}
    rows = np.concatenate(list(parts.values()))
    start = int(rows[:, BEGIN].min())
    kinds = rows[:, META] & 0xF
    rank_of = np.repeat(list(parts), [len(part) for part in parts.values()])
    ended = (kinds == STEP_KIND) & (rows[:, END] != 0)
    failed = np.flatnonzero(ended & (rows[:, AUX] & 0xFF == ERROR))
    error = None if np.count_nonzero(ended) >= len(parts) else _NEVER_ENDED
    if len(failed):
        error = name_at(names[int(rank_of[failed[0]])], int(rows[failed[0], AUX]) >> 8)
    return {
        "step": kept.step,
        "reason": kept.reason,
        "trace_id": f"{kept.trace_id:032x}",
        "at_ms": (start + clock_offset_ns) // 1_000_000,
        "duration_ns": _last_ns(rows) - start,
        "batch": int(rows[kinds == STEP_KIND, NBYTES].max(initial=0)),
        "ranks": len(parts),
        "bars": int(np.count_nonzero(kinds == COLLECTIVE)),
        "worst_wait_ns": max(
            (int(found.wait_ns.max(initial=-1)) for found in kept.arrivals.values()), default=-1
        ),
        "error": error,
    }


def step_detail(kept: KeptStep, names: Names) -> dict[str, Any]:
    """The `detail` of a kept step."""
    every = {rank: kept.rows_of(rank) for rank in kept.ranks}
    start = min(int(rows[:, BEGIN].min()) for rows in every.values())
    kinds, phase_names, groups = _Numbers(), _Numbers(), _Numbers()
    lanes = [
        _lane(rank, rows, names[rank], kept.arrivals[rank], start, kinds, phase_names)
        for rank, rows in every.items()
    ]
    _blame(lanes, kinds)
    total = sum(len(lane["bars"]["kind"]) for lane in lanes)
    if total > _MAX_BARS:
        for lane in lanes:
            _thin_out(lane, max(1, _MAX_BARS // len(lanes)))
    return {
        "kinds": [
            [op, group_label(group), groups.number(group), size, dtype, nbytes]
            for op, group, size, dtype, nbytes in kinds.values
        ],
        "phase_names": phase_names.values,
        "lanes": [_encode(lane) for lane in lanes],
        "left_out": total - sum(len(lane["bars"]["kind"]) for lane in lanes),
    }


class _Numbers:
    """Gives each value that appears a number, in the order of appearance."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        known = self._known.setdefault(value, len(self._known))
        if known == len(self.values):
            self.values.append(value)
        return known


def _last_ns(rows: Rows) -> int:
    return int(np.maximum(rows[:, BEGIN], rows[:, END]).max())


def _lane(
    rank: int,
    rows: Rows,
    names: Sequence[str],
    arrivals: Arrivals,
    start: int,
    kinds: _Numbers,
    phase_names: _Numbers,
) -> dict[str, Any]:
    row_kinds = rows[:, META] & 0xF
    steps = rows[row_kinds == STEP_KIND]
    begin = int(steps[0, BEGIN]) if len(steps) else int(rows[:, BEGIN].min())
    closed = len(steps) and steps[0, END]
    end = int(steps[0, END]) if closed else max(begin, _last_ns(rows))
    error = None if closed else _NEVER_ENDED
    if closed and steps[0, AUX] & 0xFF == ERROR:
        error = name_at(names, int(steps[0, AUX]) >> 8)
    order = np.argsort(rows[:, BEGIN], kind="stable")
    order = order[row_kinds[order] == COLLECTIVE]
    bars = rows[order]
    waits: Integers = np.asarray(arrivals.wait_ns[order], np.int64)
    status = bars[:, AUX] & 0xFF
    is_open = bars[:, END] == 0
    took = np.where(is_open, end - bars[:, BEGIN], bars[:, END] - bars[:, BEGIN]).clip(0)
    overlap = np.where(status == OK, bars[:, AUX] >> 8, 0).clip(0, took)
    flags = (
        arrivals.is_last[order].astype(np.int64) * LAST
        | (status == ERROR) * FAILED
        | (status == UNWAITED) * UNWAITED_FLAG
        | is_open * OPEN
    )
    return {
        "rank": rank,
        "begin_ns": begin - start,
        "end_ns": end - start,
        "error": error,
        "phases": _phases(rows[row_kinds == PHASE], names, start, end, phase_names),
        "bars": {
            "begin": bars[:, BEGIN] - start,
            "took": took,
            "wait": np.minimum(waits, took),
            "overlap": overlap,
            "kind": _kinds(bars, names, kinds),
            "sequence": bars[:, SEQUENCE],
            "flags": flags,
        },
        "share": share_of(
            bars, (took, overlap, waits), rows[row_kinds == FRAME], names, (begin, end)
        ),
    }


def _phases(
    rows: Rows, names: Sequence[str], start: int, end: int, numbers: _Numbers
) -> list[list[int]]:
    took = np.where(rows[:, END] == 0, end, rows[:, END]) - rows[:, BEGIN]
    chosen = np.sort(np.argsort(-took, kind="stable")[:_MAX_PHASES])
    found = [
        [
            numbers.number(name_at(names, meta_name(row[META]))),
            row[BEGIN] - start,
            max(0, nanoseconds),
            (FAILED if row[AUX] & 0xFF == ERROR else 0) | (0 if row[END] else OPEN),
        ]
        for row, nanoseconds in zip(rows[chosen].tolist(), took[chosen].tolist(), strict=True)
    ]
    return sorted(found, key=lambda phase: (phase[1], -phase[2]))  # the outer one first


def _kinds(bars: Rows, names: Sequence[str], numbers: _Numbers) -> Integers:
    """The number of each bar's kind: what does not differ from call to call."""
    metas, by_meta = np.unique(bars[:, META], return_inverse=True)
    sizes, by_size = np.unique(bars[:, NBYTES], return_inverse=True)
    found, by_kind = np.unique(by_meta * max(1, len(sizes)) + by_size, return_inverse=True)
    known = []
    for value in found.tolist():
        meta = int(metas[value // len(sizes)])
        known.append(
            numbers.number(
                (
                    name_at(names, meta_name(meta)),
                    name_at(names, meta_group(meta)),
                    meta_group_size(meta),
                    name_at(names, meta_dtype(meta)),
                    int(sizes[value % len(sizes)]),
                )
            )
        )
    return np.array(known, np.int64)[by_kind]


def _blame(lanes: Sequence[dict[str, Any]], kinds: _Numbers) -> None:
    """Give each lane how often it was the last one, and how long the first one waited then."""
    groups = _Numbers()
    group_of_kind = np.array([groups.number(kind[1]) for kind in kinds.values] or [0], np.int64)
    counts = [len(lane["bars"]["kind"]) for lane in lanes]
    columns = {
        name: np.concatenate([lane["bars"][name] for lane in lanes] or [np.empty(0, np.int64)])
        for name in ("kind", "sequence", "wait", "flags")
    }
    place = np.repeat(np.arange(len(lanes)), counts)
    joined = columns["wait"] >= 0
    keys = np.stack([group_of_kind[columns["kind"]], columns["sequence"]])[:, joined]
    _, collective = np.unique(keys, axis=1, return_inverse=True)
    longest = np.zeros(int(collective.max(initial=-1)) + 1, np.int64)
    np.maximum.at(longest, collective, columns["wait"][joined])
    last = columns["flags"][joined] & LAST != 0
    times = np.bincount(place[joined][last], minlength=len(lanes))
    lost = np.zeros(len(lanes), np.int64)
    np.add.at(lost, place[joined][last], longest[collective[last]])
    for lane, *caused in zip(lanes, times.tolist(), lost.tolist(), strict=True):
        lane["caused"] = caused


def _thin_out(lane: dict[str, Any], limit: int) -> None:
    bars = lane["bars"]
    chosen = np.sort(np.argsort(-bars["took"], kind="stable")[:limit])
    lane["bars"] = {column: values[chosen] for column, values in bars.items()}


def _encode(lane: dict[str, Any]) -> dict[str, Any]:
    bars = lane["bars"]
    for column in ("begin", "sequence"):
        bars[column] = np.diff(bars[column], prepend=0)
    if not bars["overlap"].any():
        del bars["overlap"]
    return {**lane, "bars": {column: values.tolist() for column, values in bars.items()}}
