"""A step that becomes a trace: what sampling has kept, and all that its spans are made of.

Owns how the pieces belong together. Knows neither why a step is kept nor where it goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .arrivals import Arrivals
from .ring import META, STEP_KIND, TICKET
from .ring_reader import Rows
from .spans import Link, UnsignedWords, child_span_ids, worker_span_id
from .step_facts import ranks_of, rows_of
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
        return ranks_of(self.joined)

    def rows_of(self, rank: int) -> Rows:
        """All records of a rank: those that ended, then those that never did."""
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
