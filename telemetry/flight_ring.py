"""One ring file as it lies there: whatever of it can be read, however its process ended.

Owns reading without trust: a ring may be cut short, half written, of an older version, or no ring
at all. Nothing is mapped (a file that shrinks under a mapping kills its reader) and nothing is
consumed: `ring_reader` hands records out once, this may look again and again, at live rings too.

A live record is torn if its slot was being written while it was copied. Hence two copies: a
record that the first one saw published was whole before the second began, and what the writer has
taken over meanwhile the counter tells.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TelemetryError
from .flight_words import printable
from .ring import (
    BEGIN,
    CONTEXT,
    END,
    ENGINE_ID_BYTES,
    ENGINE_ID_OFFSET,
    GRAPH,
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
    HEADER_BYTES,
    MAGIC,
    META,
    NAME_BYTES,
    NAMES_OFFSET,
    NOTHING,
    NUM_NAMES,
    RECORD_BYTES,
    RECORD_WORDS,
    RECORDS_OFFSET,
    SCHEDULED,
    TICKET,
    WORD,
)
from .ring_reader import Rows

READABLE_VERSIONS = (1, 2)
GROUP_NUMBERS_SINCE = 2  # before, each operation of a group was numbered on its own
_MAX_CAPACITY = 1 << 26
_MAX_MISSING = 64 << 20  # bytes; a file that claims so much more than it has is not read
_MAX_WORD = 1 << 62  # a time or a counter beyond it is damage


@dataclass(frozen=True, slots=True)
class RingImage:
    """What one ring held at one moment; records in the order they began to be written."""

    path: Path
    version: int
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    pid: int
    start_time: int
    clock_offset_ns: int
    closed: bool
    step: int
    head: int  # records ever written
    engine_id: str
    names: list[str]
    rows: Rows  # published records, finished or in flight
    problems: list[str] = field(default_factory=list)  # what could not be read, in words

    @property
    def finished(self) -> Rows:
        rows: Rows = self.rows[self.rows[:, END] != 0]
        return rows

    @property
    def in_flight(self) -> Rows:
        rows: Rows = self.rows[self.rows[:, END] == 0]
        return rows


def read_ring(path: Path, last: int | None = None) -> RingImage:
    """The ring at `path`; with `last` only so many of its latest records.

    TelemetryError: it is no ring, or of a version nobody here knows. OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _read(descriptor, path, last)
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path, last: int | None) -> RingImage:
    header = os.pread(descriptor, HEADER_BYTES, 0)
    if len(header) < 32 * WORD:
        raise TelemetryError(f"{path} is not a telemetry ring: {len(header)} bytes long")
    problems: list[str] = []
    if len(header) < HEADER_BYTES:
        header += bytes(HEADER_BYTES - len(header))
    words = np.frombuffer(header, np.int64)[:32].tolist()
    if words[H_MAGIC] != MAGIC:
        raise TelemetryError(f"{path} is not a telemetry ring")
    version = words[H_VERSION]
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise TelemetryError(f"{path} is a ring of version {version}; this onecast reads {known}")
    size = os.fstat(descriptor).st_size
    capacity = _capacity(words[H_CAPACITY], size, problems)
    needed = RECORDS_OFFSET + capacity * RECORD_BYTES
    if needed > max(_MAX_MISSING, 16 * size):
        raise TelemetryError(f"{path} has {size} bytes, but says {capacity} records: it is damaged")
    if size < needed:
        problems.append(f"cut short: {size} of {needed} bytes")
    head, rows = _records(descriptor, capacity, words[H_HEAD], last, problems)
    return RingImage(
        path=path,
        version=version,
        **_numbers(words, problems),
        closed=bool(words[H_CLOSED]),
        head=head,
        engine_id=_text(header, ENGINE_ID_OFFSET, ENGINE_ID_BYTES),
        names=_names(descriptor, words[H_NAME_COUNT], problems),
        rows=rows,
        problems=problems,
    )


def _numbers(words: list[int], problems: list[str]) -> dict[str, int]:
    found = {}
    for name, word, low in (
        ("rank", H_RANK, 0),
        ("local_rank", H_LOCAL_RANK, 0),
        ("world_size", H_WORLD_SIZE, 1),
        ("local_world_size", H_LOCAL_WORLD_SIZE, 1),
        ("pid", H_PID, 1),
        ("start_time", H_START_TIME, 0),
        ("step", H_STEP, -1),
        ("clock_offset_ns", H_CLOCK_OFFSET, -_MAX_WORD),
    ):
        value = words[word]
        high = 1 << 31 if name not in ("start_time", "step", "clock_offset_ns") else _MAX_WORD
        if not low <= value < high:
            problems.append(f"damaged header: {name} is {value}")
            value = max(low, 0)
        found[name] = value
    return found


def _capacity(told: int, size: int, problems: list[str]) -> int:
    if 1 <= told <= _MAX_CAPACITY and told & (told - 1) == 0:
        return told
    fits = max(1, (size - RECORDS_OFFSET) // RECORD_BYTES)
    capacity = min(1 << (fits.bit_length() - 1), _MAX_CAPACITY)
    problems.append(f"damaged header: capacity is {told}, taken as {capacity}")
    return capacity


def _text(data: bytes, offset: int, room: int) -> str:
    length = min(int.from_bytes(data[offset : offset + 2], "little"), room - 2)
    return printable(data[offset + 2 : offset + 2 + length].decode(errors="replace"))


def _names(descriptor: int, count: int, problems: list[str]) -> list[str]:
    if not 1 <= count <= NUM_NAMES:
        problems.append(f"damaged header: {count} names")
        count = NUM_NAMES
    data = os.pread(descriptor, count * NAME_BYTES, NAMES_OFFSET)
    data += bytes(count * NAME_BYTES - len(data))
    return [_text(data, number * NAME_BYTES, NAME_BYTES) for number in range(count)]


def _records(
    descriptor: int, capacity: int, told_head: int, last: int | None, problems: list[str]
) -> tuple[int, Rows]:
    head = told_head
    if not 0 <= head < _MAX_WORD:
        slots = _slots(descriptor, 0, capacity)
        tickets = slots[:, TICKET] - 1
        own = (tickets >= 0) & (tickets & (capacity - 1) == np.arange(len(slots)))
        head = int(tickets[own].max()) + 1 if own.any() else 0
        problems.append(f"damaged header: {told_head} records, taken as {head}")
    wanted = capacity if last is None else min(last, capacity)
    first = max(0, head - wanted)
    tickets = np.arange(first, head, dtype=np.int64)
    before = _range(descriptor, capacity, first, head)
    rows = _range(descriptor, capacity, first, head)
    now_head = int.from_bytes(os.pread(descriptor, WORD, H_HEAD * WORD), "little", signed=True)
    published = (before[:, TICKET] == tickets + 1) & (rows[:, TICKET] == tickets + 1)
    if now_head != told_head:  # a live ring: its writer may be in the oldest slots by now
        published &= tickets >= now_head - capacity
    else:
        # A record that was being written when its process died, or while this one looked.
        torn = int(np.count_nonzero(~published))
        if torn > 1:
            problems.append(f"{torn} records torn or missing")
    rows = rows[published]
    begins, ends, kinds = rows[:, BEGIN], rows[:, END], rows[:, META] & 0xF
    sound = (begins > 0) & (begins < _MAX_WORD)
    sound &= (ends == 0) | ((ends >= begins) & (ends < _MAX_WORD))
    sound |= (kinds == CONTEXT) | (kinds == SCHEDULED) | (kinds == NOTHING)  # they have no times
    sound &= kinds <= GRAPH
    damaged = int(np.count_nonzero(~sound))
    if damaged:
        problems.append(f"{damaged} records damaged")
    return head, rows[sound & (kinds != NOTHING)]


def _range(descriptor: int, capacity: int, first: int, end: int) -> Rows:
    """The slots of the tickets from `first` up to `end`, at most `capacity` of them, in order."""
    if first == end:
        return np.empty((0, RECORD_WORDS), np.int64)
    start, stop = first & (capacity - 1), (end - 1 & (capacity - 1)) + 1
    if start < stop:
        return _slots(descriptor, start, stop)
    parts = [_slots(descriptor, start, capacity), _slots(descriptor, 0, stop)]
    return np.concatenate(parts)


def _slots(descriptor: int, start: int, stop: int) -> Rows:
    """Slots as they are; zeros where the file has ended."""
    rows: Any = np.zeros((stop - start, RECORD_WORDS), np.int64)
    view = memoryview(rows).cast("B")
    position = RECORDS_OFFSET + start * RECORD_BYTES
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            break
        view, position = view[count:], position + count
    found: Rows = rows
    return found
