"""A step that becomes a trace: what sampling has kept, and all that its spans are made of.

Owns how the pieces belong together. Knows neither why a step is kept nor where it goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .arrivals import Arrivals, arrivals_of
from .ring import META, STEP_KIND, TICKET
from .ring_reader import Rows
from .spans import Link, UnsignedWords, child_span_ids, worker_span_id
from .steps import JoinedStep

MAX_VALUE = (1 << 56) - 1  # of an attribute of a span


@dataclass(slots=True)
class KeptStep:
    step: int
    trace_id: int
    reason: str  # why it was kept
    joined: JoinedStep
    arrivals: Mapping[int, Arrivals]  # by rank, aligned with `rows_of` it
    links: tuple[Link, ...] = ()  # to the spans of its requests
    dropped_links: int = 0
    engine_id: str = field(default="", repr=False)

    @property
    def ranks(self) -> list[int]:
        return sorted(self.joined.rows.keys() | self.joined.unfinished.keys())

    def rows_of(self, rank: int) -> Rows:
        return rows_of(self.joined, rank)

    @property
    def num_records(self) -> int:
        """What it weighs in a bounded memory; four links as much as a record."""
        return self.joined.num_records + len(self.links) // 4

    def span_ids(self, rank: int, rows: Rows) -> UnsignedWords:
        """The id of each record's span; `rows` are some of this rank's in this step."""
        worker = worker_span_id(self.engine_id, self.step, rank)
        ids = child_span_ids(worker, rows[:, TICKET])
        ids[(rows[:, META] & 0xF) == STEP_KIND] = worker
        return ids


def rows_of(joined: JoinedStep, rank: int) -> Rows:
    """All records of a rank: those that ended, then those that never did."""
    parts = [part[rank] for part in (joined.rows, joined.unfinished) if rank in part]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def arrivals_in(
    steps: Sequence[JoinedStep], names_by_rank: Mapping[int, Sequence[str]]
) -> list[dict[int, Arrivals]]:
    """Who waited for whom, by step and rank. Many steps at once cost half of one by one."""
    parts: dict[int, list[Rows]] = {}
    for joined in steps:
        for rank in joined.rows.keys() | joined.unfinished.keys():
            parts.setdefault(rank, []).append(rows_of(joined, rank))
    found = arrivals_of(
        {rank: np.concatenate(of_rank) for rank, of_rank in sorted(parts.items())}, names_by_rank
    )
    offsets = dict.fromkeys(parts, 0)
    split = []
    for joined in steps:
        by_rank = {}
        for rank in sorted(joined.rows.keys() | joined.unfinished.keys()):
            first = offsets[rank]
            last = first + sum(
                len(part[rank]) for part in (joined.rows, joined.unfinished) if rank in part
            )
            waits, are_last, transfers = found[rank]
            by_rank[rank] = Arrivals(waits[first:last], are_last[first:last], transfers[first:last])
            offsets[rank] = last
        split.append(by_rank)
    return split
