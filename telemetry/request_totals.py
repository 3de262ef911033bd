"""What the requests of one node's ranks add up to; no request is ever named.

Owns the reading of REQUEST records. Only a rank that schedules (rank 0) writes any.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .histograms import REQUEST_DURATIONS, HistogramTable
from .labels import name_at
from .ring import AUX, BEGIN, END, META, meta_name
from .ring_reader import Rows

_QUEUE_BITS, _FIRST_BITS = 28, 27  # of aux, microseconds each
_QUEUE_SHIFT, _FIRST_SHIFT = 8, 36


class RequestTotals:
    """Totals since the start, by rank."""

    def __init__(self) -> None:
        self.finished: dict[tuple[str, int], int] = defaultdict(int)  # (finish reason, rank)
        self.durations: HistogramTable[int] = HistogramTable(REQUEST_DURATIONS)
        self.queued: HistogramTable[int] = HistogramTable(REQUEST_DURATIONS)
        self.first_token: HistogramTable[int] = HistogramTable(REQUEST_DURATIONS)

    def add(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        """Count REQUEST records."""
        if not len(rows):
            return
        for meta in rows[:, META].tolist():
            self.finished[name_at(names, meta_name(meta)), rank] += 1
        for table, values in (
            (self.durations, rows[:, END] - rows[:, BEGIN]),
            (self.queued, (rows[:, AUX] >> _QUEUE_SHIFT & (1 << _QUEUE_BITS) - 1) * 1000),
        ):
            table.add(np.full(len(rows), table.row(rank)), values)
        first = (rows[:, AUX] >> _FIRST_SHIFT & (1 << _FIRST_BITS) - 1) * 1000
        first = first[first > 0]  # 0: there never was one
        self.first_token.add(np.full(len(first), self.first_token.row(rank)), first)
