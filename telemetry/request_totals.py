"""What the requests of one node's ranks add up to; no request is ever named.

Owns the reading of REQUEST records. Only a rank that schedules (rank 0) writes any.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .histograms import REQUEST_DURATIONS, TOKEN_DURATIONS, HistogramTable
from .labels import name_at
from .requests import unpack_request
from .ring import BEGIN, END, META, meta_name
from .ring_reader import Rows


class RequestTotals:
    """Totals since the start, by rank."""

    def __init__(self) -> None:
        self.finished: dict[tuple[str, int], int] = defaultdict(int)  # (finish reason, rank)
        self.durations: HistogramTable[int] = HistogramTable(REQUEST_DURATIONS)
        self.queued: HistogramTable[int] = HistogramTable(REQUEST_DURATIONS)
        self.first_token: HistogramTable[int] = HistogramTable(REQUEST_DURATIONS)
        self.per_token: HistogramTable[int] = HistogramTable(TOKEN_DURATIONS)

    def add(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        """Count REQUEST records."""
        if not len(rows):
            return
        columns = unpack_request(rows)
        for meta in rows[:, META].tolist():
            self.finished[name_at(names, meta_name(meta)), rank] += 1
        for table, values in (
            (self.durations, rows[:, END] - rows[:, BEGIN]),
            (self.queued, columns.queue_us * 1000),
        ):
            table.add(np.full(len(rows), table.row(rank)), values)
        first = columns.first_token_us * 1000  # 0: none came
        came = first > 0
        self.first_token.add(np.full(came.sum(), self.first_token.row(rank)), first[came])
        several = came & (columns.generated > 1)
        decoding = (rows[:, END] - rows[:, BEGIN] - first)[several]
        self.per_token.add(
            np.full(several.sum(), self.per_token.row(rank)),
            np.maximum(decoding, 0) // (columns.generated[several] - 1),
        )
