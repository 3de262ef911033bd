"""What the steps of one node's ranks add up to: their times, phases and frames.

Owns these series and how a batch of records is spread over them. Knows neither Prometheus nor
traces.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .exposed import ExposedTime
from .histograms import LONG_DURATIONS, SIZES, HistogramTable
from .labels import Part, name_at
from .probe import unpack_frame
from .ring import (
    AUX,
    BEGIN,
    END,
    ERROR,
    FRAME,
    META,
    NBYTES,
    OK,
    PHASE,
    STEP_KIND,
    meta_group,
    meta_name,
)
from .ring_reader import Rows

FrameKey = tuple[str, str, int]  # channel, direction or part, rank


class StepTotals:
    """Totals since the start. Failed steps and phases are not among them."""

    def __init__(self) -> None:
        self.durations: HistogramTable[int] = HistogramTable(LONG_DURATIONS)  # by rank
        self.exposed: HistogramTable[int] = HistogramTable(LONG_DURATIONS)  # by rank
        self.phases: HistogramTable[tuple[str, int]] = HistogramTable(LONG_DURATIONS)
        self.frame_bytes: HistogramTable[FrameKey] = HistogramTable(SIZES)
        self.frame_metadata_bytes: HistogramTable[FrameKey] = HistogramTable(SIZES)
        self.frame_parts: HistogramTable[FrameKey] = HistogramTable(LONG_DURATIONS)
        self.frame_broadcasts: dict[FrameKey, int] = defaultdict(int)
        self._exposed_time: dict[int, ExposedTime] = defaultdict(ExposedTime)  # by rank

    def add_collectives(self, parts: Sequence[Part]) -> None:
        """Take in COLLECTIVE records: some of them lie in steps that have not ended."""
        for rank, rows, _ in parts:
            self._exposed_time[rank].add(rows)

    def add(self, rows: Rows, parts: Sequence[Part]) -> None:
        """Count the other records of several ranks; `parts` are those of each, in this order.

        Of what ended before a step did, nothing may come later than the step itself.
        """
        kinds, good = rows[:, META] & 0xF, rows[:, AUX] & 0xFF != ERROR
        self._add_phases(_Named(rows, parts, good & (kinds == PHASE)))
        self._add_frames(_Named(rows, parts, kinds == FRAME))
        for rank, found, _ in parts:
            steps = found[found[:, META] & 0xF == STEP_KIND]
            if len(steps):
                self._add_steps(rank, steps)

    def _add_steps(self, rank: int, rows: Rows) -> None:
        exposed = self._exposed_time[rank].take(rows)
        good = rows[rows[:, AUX] & 0xFF == OK]
        self.exposed.add(np.full(len(exposed), self.exposed.row(rank)), exposed)
        self.durations.add(
            np.full(len(good), self.durations.row(rank)), good[:, END] - good[:, BEGIN]
        )

    def _add_phases(self, phases: "_Named") -> None:
        series = [self.phases.row((name, rank)) for name, _, rank in phases.names]
        rows = phases.rows
        self.phases.add(np.array(series, np.int64)[phases.which], rows[:, END] - rows[:, BEGIN])

    def _add_frames(self, frames: "_Named") -> None:
        rows = frames.rows
        if not len(rows):
            return
        nbytes, metadata, broadcasts, last = unpack_frames(rows)
        first = rows[:, END] - rows[:, BEGIN] - last
        sizes, overheads, firsts, lasts = [], [], [], []
        counts = np.bincount(frames.which, weights=broadcasts).tolist()
        for (direction, channel, rank), count in zip(frames.names, counts, strict=True):
            series = channel, direction, rank
            self.frame_broadcasts[series] += int(count)
            sizes.append(self.frame_bytes.row(series))
            overheads.append(self.frame_metadata_bytes.row(series))
            parts = ("encode", "publish") if direction == "published" else ("wait", "decode")
            firsts.append(self.frame_parts.row((channel, parts[0], rank)))
            lasts.append(self.frame_parts.row((channel, parts[1], rank)))
        for table, series_rows, values in (
            (self.frame_bytes, sizes, nbytes),
            (self.frame_metadata_bytes, overheads, metadata),
            (self.frame_parts, firsts, first),
            (self.frame_parts, lasts, last),
        ):
            table.add(np.array(series_rows, np.int64)[frames.which], values)


class _Named:
    """Some records of several ranks, and by which of a few names each goes."""

    def __init__(self, rows: Rows, parts: Sequence[Part], where: Any) -> None:
        place = np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])[where]
        self.rows: Rows = rows[where]
        # The place of the rank takes that of the dtype.
        words = self.rows[:, META] & ~(0xFFF << 28) | place << 28
        kinds, self.which = np.unique(words, return_inverse=True)
        self.names: list[tuple[str, str, int]] = []  # name, group, rank
        for kind in kinds.tolist():
            rank, _, names = parts[kind >> 28 & 0xFFF]
            name = name_at(names, meta_name(kind))
            self.names.append((name, name_at(names, meta_group(kind)), rank))


def unpack_frames(rows: Rows) -> tuple[Any, Any, Any, Any]:
    """`unpack_frame` on whole columns."""
    return unpack_frame(rows[:, NBYTES], rows[:, AUX])  # type: ignore[arg-type]
