"""The reading side of a ring: hands out finished records once each and counts what was lost.

Knows the layout of `ring` and nothing of what the records mean. Never writes.
"""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import TelemetryError
from .ring import (
    COVERAGE_OFFSET,
    END,
    ENGINE_ID_OFFSET,
    H_CAPACITY,
    H_CLOCK_OFFSET,
    H_CLOSED,
    H_HEAD,
    H_LOCAL_RANK,
    H_LOCAL_WORLD_SIZE,
    H_MAGIC,
    H_NAME_COUNT,
    H_PID,
    H_RANK,
    H_START_TIME,
    H_STEP,
    H_VERSION,
    H_WORLD_SIZE,
    MAGIC,
    NAME_BYTES,
    NAMES_OFFSET,
    NUM_COVERED,
    NUM_VALUES,
    RECORD_BYTES,
    RECORD_WORDS,
    RECORDS_OFFSET,
    TICKET,
    VALUES_OFFSET,
    VERSION,
    WORD,
    process_start_time,
)

Rows = npt.NDArray[np.int64]  # shape [n, 8]: the words of n records


@dataclass(frozen=True, slots=True)
class Drained:
    rows: Rows  # finished records, each handed out once
    pending: Rows  # records that a later call will hand out: in flight, or ended a moment ago
    lost: int  # records overwritten before they were read


class RingReader:
    """Reads the ring of one rank.

    A reader that follows another one starts at that one's `cursor` and `cut_ns`: it hands out
    exactly what the other one did not. Without `since_ns`, what ended in between of the records
    that were then in flight is left out. What was overwritten in between counts as lost.

    Raises TelemetryError if the file is no ring or one of another version.
    """

    def __init__(self, path: Path, start: int = 0, since_ns: int | None = None) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDONLY)
        try:
            nbytes = os.fstat(descriptor).st_size
            if nbytes <= RECORDS_OFFSET:
                raise TelemetryError(f"{path} is not a telemetry ring: {nbytes} bytes long")
            self._mapping = mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        words: Any = np.frombuffer(self._mapping, dtype=np.int64)
        self._header: npt.NDArray[np.int64] = words[:32]
        if self._header[H_MAGIC] != MAGIC or self._header[H_VERSION] != VERSION:
            raise TelemetryError(f"{path} is not a telemetry ring of version {VERSION}")
        self.capacity = int(self._header[H_CAPACITY])
        if nbytes != RECORDS_OFFSET + self.capacity * RECORD_BYTES:
            raise TelemetryError(f"{path} has {nbytes} bytes, not those of {self.capacity} records")
        self._records: Rows = words[RECORDS_OFFSET // WORD :].reshape(-1, RECORD_WORDS)
        self._values: npt.NDArray[np.int64] = words[VALUES_OFFSET // WORD :][:NUM_VALUES]
        self._coverage: npt.NDArray[np.int64] = words[COVERAGE_OFFSET // WORD :][:NUM_COVERED]
        self.rank = int(self._header[H_RANK])
        self.local_rank = int(self._header[H_LOCAL_RANK])
        self.world_size = int(self._header[H_WORLD_SIZE])
        self.local_world_size = int(self._header[H_LOCAL_WORLD_SIZE])
        self.pid = int(self._header[H_PID])
        self.clock_offset_ns = int(self._header[H_CLOCK_OFFSET])
        self.engine_id = self._text(ENGINE_ID_OFFSET)
        self.lost = 0
        self._names: list[str] = []
        self._cursor = start  # tickets below it have been looked at
        self._cut_ns = since_ns or 0
        self._open: npt.NDArray[np.int64] = self._left_open(since_ns)  # not finished then

    def _left_open(self, since_ns: int | None) -> npt.NDArray[np.int64]:
        """Tickets below the cursor that the reader before had not handed out."""
        tickets = np.arange(max(0, self._cursor - self.capacity), self._cursor, dtype=np.int64)
        rows = self._records[tickets & (self.capacity - 1)]
        unread = rows[:, END] == 0
        if since_ns is not None:
            unread |= rows[:, END] > since_ns
        left: npt.NDArray[np.int64] = tickets[unread & (rows[:, TICKET] == tickets + 1)]
        return left

    def _text(self, offset: int) -> str:
        length = int.from_bytes(self._mapping[offset : offset + 2], "little")
        return self._mapping[offset + 2 : offset + 2 + length].decode(errors="replace")

    @property
    def closed(self) -> bool:
        return bool(self._header[H_CLOSED])

    @property
    def alive(self) -> bool:
        """Whether the very process that wrote the header still runs (not just its pid)."""
        return process_start_time(self.pid) == int(self._header[H_START_TIME])

    @property
    def step(self) -> int:
        return int(self._header[H_STEP])

    @property
    def head(self) -> int:
        return int(self._header[H_HEAD])

    @property
    def cursor(self) -> int:
        """The first ticket that no drain has looked at yet."""
        return self._cursor

    @property
    def cut_ns(self) -> int:
        """perf_counter_ns of the last drain: of the tickets below the cursor, it and those before
        it have handed out the records that ended by then."""
        return self._cut_ns

    @property
    def values(self) -> list[int]:
        return [int(value) for value in self._values]

    @property
    def coverage(self) -> list[int]:
        return [int(value) for value in self._coverage]

    @property
    def names(self) -> list[str]:
        """All names so far; grows in place, an index once valid stays valid."""
        for number in range(len(self._names), int(self._header[H_NAME_COUNT])):
            self._names.append(self._text(NAMES_OFFSET + number * NAME_BYTES))
        return self._names

    def _head(self) -> int:
        """The counter, and past it whatever threads published while another one stored less."""
        head = max(self.head, self._cursor)
        mask = self.capacity - 1
        while self._records[head & mask, TICKET] == head + 1:
            head += 1
        return head

    def drain(self) -> Drained:
        """Everything that ended before this call and after the last one, in the order it began.

        A consistent cut: if a record is in it, so is every record that had ended before that one
        did (unless it was lost). Hence whoever sees the end of a step has seen its contents.
        """
        self._cut_ns = cut_ns = time.perf_counter_ns()
        head = self._head()
        lost = 0
        oldest = head - self.capacity
        if oldest > self._cursor:
            lost += oldest - self._cursor
            self._cursor = oldest
        tickets = np.concatenate([self._open, np.arange(self._cursor, head, dtype=np.int64)])
        self._cursor = head
        slots = tickets & (self.capacity - 1)
        rows = self._records[slots]  # a copy
        # Again after the copy: what the writer has taken over meanwhile may be torn.
        before, after = rows[:, TICKET], self._records[slots, TICKET]
        overrun = (before > tickets + 1) | (after > tickets + 1)
        overrun |= tickets < self.head - self.capacity
        published = ~overrun & (before == tickets + 1) & (after == tickets + 1)
        ended = published & (rows[:, END] != 0) & (rows[:, END] <= cut_ns)
        lost += int(np.count_nonzero(overrun))
        self._open = tickets[~overrun & ~ended]
        self.lost += lost
        return Drained(rows[ended], rows[published & ~ended], lost)
