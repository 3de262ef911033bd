"""The ring of one rank: where it writes what it does, in shared memory, and nothing else.

Owns the layout and the writing side (`ring_reader` has the other one). Refuses to know torch and
what becomes of the records. All integers are native-endian signed 64-bit words: readers live on
the same host. The file outlives its process, so what was in flight at a SIGKILL can be read.

    byte 0                                                                              4096
    | header: 32 words | engine id: length, UTF-8 | values: 128 words | coverage: 256 words |
    +----------------------------------------------------------------------------------+ 4096
    | names: 512 entries of 128 bytes: length (2 bytes), UTF-8; entry 0 is "no name"     |
    +----------------------------------------------------------------------------------+ 69632
    | records: `capacity` (a power of two) of 64 bytes; number n is in slot (n - 1) % capacity|

A record is eight words:

    begin_ns | end_ns | step | meta | sequence | nbytes | aux | ticket

    end_ns    0 while the operation is in flight; written last, by one store
    meta      kind: 4 bits | name: 12 | group: 12 | dtype: 12 | group size: 16   (low to high)
              name, group and dtype are indices into the names; a group's entry is
              "label \\t name unique in the cluster"
    aux       low byte the status: OK 0, ERROR 1 | name of the exception type << 8, UNWAITED 2,
              DISCARDED 3
    ticket    the record's number, from 1; published last, by one aligned 8-byte store; 0 while
              the record is being written

    kind        sequence             nbytes                  aux, and what else is special
    COLLECTIVE  number in its group  payload                 OK: ns from begin to Work.wait << 8
    PHASE       -                    -                       -
    STEP_KIND   step                 batch size              -
    FRAME       number               bytes (40 bits) |       metadata bytes (24 bits) |
                                     broadcasts << 40        ns of its last part << 24
    REQUEST     request number       prompt tokens |         0 ok, 1 error | queue us (28) << 8 |
                                     generated << 32         us to first token (27) << 36
                begin = arrival, meta name = finish reason
    CONTEXT     trace id, high word  trace id, low word      parent span id
                step = request number, meta group size = trace flags
    SCHEDULED   request number       1 from this step, 0 not -
    DEVICE      as its COLLECTIVE    as its COLLECTIVE       0
                end = begin + ns on the device; comes late, in any order
    GRAPH       manifest number      -                       -

A collective's number counts all collectives of its group from 1 in the order they were called,
so ranks agree on it; send and recv count apart and are never joined. What a collective exposed
is end - (begin + (aux >> 8)). Only COLLECTIVE, PHASE, STEP_KIND and FRAME belong to the step in
their step word. Ids of traces and spans are unsigned, kept as signed words.

Times are time.perf_counter_ns() (CLOCK_MONOTONIC); the header holds what to add for time_ns().

Ordering: a reader trusts a record only if its ticket word is right before and after copying
it, and treats a slot whose head counter has moved a lap as overrun. Store order is what x86-64
guarantees. On weakly ordered CPUs a record may be seen published a moment before its words; but it
is only counted once it has ended, long after it was opened, and between the two (and between the
words and the ticket of a record written in one go) the interpreter executes operations that order
them in practice; a mistaken read costs one record, never a crash.
"""

import errno
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .errors import TelemetryError
from .forked import keep_from_children

MAGIC = 0x31474E49524E4F  # "ONRING1"
VERSION = 2

WORD = 8
HEADER_BYTES = 4096
ENGINE_ID_OFFSET, ENGINE_ID_BYTES = 256, 768
VALUES_OFFSET, NUM_VALUES = 1024, 128
COVERAGE_OFFSET, NUM_COVERED = 2048, 256
NAMES_OFFSET, NAME_BYTES, NUM_NAMES = HEADER_BYTES, 128, 512
RECORDS_OFFSET = NAMES_OFFSET + NAME_BYTES * NUM_NAMES
RECORD_WORDS = 8
RECORD_BYTES = RECORD_WORDS * WORD
UNSET = -(2**63)  # a value nobody has set yet

# header words
(
    H_MAGIC, H_VERSION, H_CAPACITY, H_PID, H_START_TIME, H_RANK, H_WORLD_SIZE, H_LOCAL_RANK,
    H_LOCAL_WORLD_SIZE, H_CLOCK_OFFSET, H_CLOSED, H_HEAD, H_STEP, H_NAME_COUNT,
) = range(14)  # fmt: skip
# record words
BEGIN, END, STEP, META, SEQUENCE, NBYTES, AUX, TICKET = range(8)
# kinds
NOTHING = 0
COLLECTIVE, PHASE, STEP_KIND, FRAME = 1, 2, 3, 4
REQUEST, CONTEXT, SCHEDULED, DEVICE, GRAPH = 5, 6, 7, 8, 9
LAST_OF_STEP = FRAME  # kinds up to this one belong to the step in their step word
# status (the low byte of aux)
OK, ERROR, UNWAITED, DISCARDED = 0, 1, 2, 3

_NAME_SHIFT, _GROUP_SHIFT, _DTYPE_SHIFT, _SIZE_SHIFT = 4, 16, 28, 40
_FIELD_MASK = 0xFFF
_RECORD = struct.Struct("8q")  # native: each word is one 8-byte store
_OPEN = struct.Struct("q8xqqqq8xq")  # end and aux stay 0


def pack_meta(kind: int, name: int = 0, group: int = 0, dtype: int = 0, group_size: int = 0) -> int:
    return (
        kind
        | name << _NAME_SHIFT
        | group << _GROUP_SHIFT
        | dtype << _DTYPE_SHIFT
        | min(group_size, 0xFFFF) << _SIZE_SHIFT
    )


def with_dtype(meta: int, dtype: int) -> int:
    """A meta word packed without a dtype, with one."""
    return meta | dtype << _DTYPE_SHIFT


def meta_kind(meta: int) -> int:
    return meta & 0xF


def meta_name(meta: int) -> int:
    return meta >> _NAME_SHIFT & _FIELD_MASK


def meta_group(meta: int) -> int:
    return meta >> _GROUP_SHIFT & _FIELD_MASK


def meta_dtype(meta: int) -> int:
    return meta >> _DTYPE_SHIFT & _FIELD_MASK


def meta_group_size(meta: int) -> int:
    return meta >> _SIZE_SHIFT & 0xFFFF


def is_point_to_point(op: str) -> bool:
    """Whether ranks call it unequally often: then its numbers mean nothing to other ranks."""
    return op in ("send", "recv")


def process_start_time(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat; None if there is no such process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the command name may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def clock_offset_ns() -> int:
    """time_ns() - perf_counter_ns(): the tightest of a few readings."""
    best_gap, best = 1 << 62, 0
    for _ in range(16):
        before = time.perf_counter_ns()
        wall = time.time_ns()
        after = time.perf_counter_ns()
        if after - before < best_gap:
            best_gap, best = after - before, wall - (before + after) // 2
    return best


def _reserve(descriptor: int, nbytes: int, path: Path) -> None:
    """Back every page now: a full tmpfs is an error here, not a SIGBUS at some later store."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        info = os.statvfs(path.parent)
        raise TelemetryError(
            f"no room for the telemetry ring {path}: it needs {nbytes} bytes, "
            f"{info.f_bavail * info.f_frsize} are free; make {path.parent.parent} larger "
            "or set fewer ring_records"
        ) from error


class RingMemory(NamedTuple):
    """What it takes to write records without a call: for the wrappers of the hottest operations.

    A ticket is the next of `tickets`; its record is in slot `ticket - 1 & mask`, that is
    `records + (slot << 6)` bytes into the mapping.
    """

    mapping: mmap.mmap
    words: "memoryview[int]"
    mask: int
    records: int
    tickets: "itertools.count[int]"
    step: list[int]  # its only element: the current step
    ends: "memoryview[int]"  # this and the next two by slot
    auxes: "memoryview[int]"
    published: "memoryview[int]"  # tickets
    open_record: Callable[..., None]  # (mapping, offset, begin_ns, step, meta, ... , ticket)


class RingWriter:
    """Writes one rank's records. Safe for several threads of the process.

    `begin`, `end`, `fail` and `record` are closures over the mapping, not methods: that saves
    the attribute look-ups, a third of their cost. The slots come from itertools.count, whose
    `next` is one atomic step under the GIL.

    begin(meta, sequence, nbytes) -> ticket      opens a record
    end(ticket, status=OK)                       closes it; status: the whole word aux
    end_at(ticket, end_ns, status)               the same, as of then
    record(begin_ns, end_ns, meta, sequence, nbytes, aux)   writes a finished one
    record_in_step(step, begin_ns, ...)          the same, with a step word of its own
    set_nbytes(ticket, nbytes)                   what was not known at the beginning
    discard_step(ticket)                         there was no step after all: what its record holds
                                                 belongs to none; close it with DISCARDED
    """

    memory: RingMemory
    begin: Callable[[int, int, int], int]
    end: Callable[..., None]
    end_at: Callable[[int, int, int], None]
    record: Callable[[int, int, int, int, int, int], None]
    record_in_step: Callable[[int, int, int, int, int, int, int], None]
    set_step: Callable[[int], None]
    set_nbytes: Callable[[int, int], None]
    discard_step: Callable[[int], None]

    def __init__(
        self,
        path: Path,
        *,
        capacity: int,
        rank: int,
        local_rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        engine_id: str = "",
    ) -> None:
        if capacity < 64 or capacity & (capacity - 1):
            raise ValueError(f"ring_records is {capacity}; it must be a power of two, at least 64")
        encoded = engine_id.encode()
        if len(encoded) > ENGINE_ID_BYTES - 2:
            raise ValueError(
                f"engine_id has {len(encoded)} bytes; at most {ENGINE_ID_BYTES - 2} fit"
            )
        self.path = path
        nbytes = RECORDS_OFFSET + capacity * RECORD_BYTES
        # Readers look for the final name only: they never see a half-made header.
        unfinished = path.with_suffix(".new")
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(descriptor, nbytes, path)
            # All pages now: a fault would cost the first records on each many times their own.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._mapping = mmap.mmap(descriptor, nbytes, flags)
        except BaseException:
            os.unlink(unfinished)
            raise
        finally:
            os.close(descriptor)
        keep_from_children(self._mapping)
        self._words = memoryview(self._mapping).cast("q")
        self._lock = threading.Lock()
        self._names: dict[str, int] = {"": 0}
        struct.pack_into(
            f"<H{len(encoded)}s", self._mapping, ENGINE_ID_OFFSET, len(encoded), encoded
        )
        values = VALUES_OFFSET // WORD
        for index in range(values, values + NUM_VALUES):
            self._words[index] = UNSET
        pid = os.getpid()
        start_time = process_start_time(pid)
        assert start_time is not None, "this process has no /proc entry"
        for word, value in {
            H_MAGIC: MAGIC,
            H_VERSION: VERSION,
            H_CAPACITY: capacity,
            H_PID: pid,
            H_START_TIME: start_time,
            H_RANK: rank,
            H_WORLD_SIZE: world_size,
            H_LOCAL_RANK: local_rank,
            H_LOCAL_WORLD_SIZE: local_world_size,
            H_CLOCK_OFFSET: clock_offset_ns(),
            H_STEP: -1,
            H_NAME_COUNT: 1,
        }.items():
            self._words[word] = value
        self._bind(capacity)
        os.rename(unfinished, path)

    def _bind(self, capacity: int) -> None:
        mapping, words = self._mapping, self._words
        tickets = itertools.count(1)
        next_ticket, now = tickets.__next__, time.perf_counter_ns
        mask, records = capacity - 1, RECORDS_OFFSET
        columns = [words[RECORDS_OFFSET // WORD + word :: RECORD_WORDS] for word in range(8)]
        ends, auxes, published = columns[END], columns[AUX], columns[TICKET]
        open_record, pack = _OPEN.pack_into, _RECORD.pack_into
        step_now = [-1]
        self.memory = RingMemory(
            mapping, words, mask, records, tickets, step_now, ends, auxes, published, open_record
        )

        def begin(meta: int, sequence: int, nbytes: int) -> int:
            ticket = next_ticket()
            slot = ticket - 1 & mask
            words[H_HEAD] = ticket  # before the slot changes: a reader a lap behind must know
            # Zeroes the slot, then stores word after word, the ticket last.
            open_record(
                mapping, records + (slot << 6), now(), step_now[0], meta, sequence, nbytes,
                ticket,
            )  # fmt: skip
            return ticket

        def end(ticket: int, status: int = OK) -> None:
            slot = ticket - 1 & mask
            if published[slot] != ticket:
                return  # a lap later the slot belongs to another record
            if status:
                auxes[slot] = status
            ends[slot] = now()

        def end_at(ticket: int, end_ns: int, status: int) -> None:
            slot = ticket - 1 & mask
            if published[slot] == ticket:
                auxes[slot] = status
                ends[slot] = end_ns

        def record_in_step(
            step: int, begin_ns: int, end_ns: int, meta: int, sequence: int, nbytes: int, aux: int
        ) -> None:
            ticket = next_ticket()
            slot = ticket - 1 & mask
            words[H_HEAD] = ticket
            pack(
                mapping, records + (slot << 6), begin_ns, end_ns, step, meta, sequence, nbytes,
                aux, 0,
            )  # fmt: skip
            published[slot] = ticket

        def record(
            begin_ns: int, end_ns: int, meta: int, sequence: int, nbytes: int, aux: int
        ) -> None:
            record_in_step(step_now[0], begin_ns, end_ns, meta, sequence, nbytes, aux)

        def set_step(step: int) -> None:
            step_now[0] = step
            words[H_STEP] = step

        def set_nbytes(ticket: int, nbytes: int) -> None:
            slot = ticket - 1 & mask
            if published[slot] == ticket:
                columns[NBYTES][slot] = nbytes

        def discard_step(since: int) -> None:
            # What a reader has taken by now is out of reach: DISCARDED tells it about the rest.
            for ticket in range(since + 1, words[H_HEAD] + 1):
                slot = ticket - 1 & mask
                kind = meta_kind(columns[META][slot])
                if published[slot] != ticket or kind > LAST_OF_STEP:
                    continue
                columns[STEP][slot] = -1
                if kind == PHASE:
                    columns[META][slot] = NOTHING
            set_step(-1)

        self.begin, self.end, self.record, self.set_step = begin, end, record, set_step
        self.record_in_step, self.end_at = record_in_step, end_at
        self.set_nbytes, self.discard_step = set_nbytes, discard_step

    def intern(self, name: str) -> int:
        """The number of a name; the last entry stands for all that no longer fit."""
        known = self._names.get(name)
        if known is not None:
            return known
        with self._lock:
            known = self._names.get(name)
            if known is not None:
                return known
            number = len(self._names)
            if number >= NUM_NAMES - 1:
                number, name = NUM_NAMES - 1, "(other)"
            encoded = name.encode()[: NAME_BYTES - 2]
            offset = NAMES_OFFSET + number * NAME_BYTES
            struct.pack_into(f"<H{len(encoded)}s", self._mapping, offset, len(encoded), encoded)
            self._words[H_NAME_COUNT] = number + 1
            self._names[name] = number
            return number

    def fail(self, ticket: int, error: BaseException) -> None:
        """Close a record as failed, with the type of the exception."""
        self.end(ticket, ERROR | self.intern(type(error).__name__) << 8)

    def set_value(self, index: int, value: int) -> None:
        assert 0 <= index < NUM_VALUES
        self._words[VALUES_OFFSET // WORD + index] = value

    def set_coverage(self, group: int, unrecorded: int) -> None:
        """Collectives issued but not recorded so far, of the group with this name entry."""
        self._words[COVERAGE_OFFSET // WORD + min(group, NUM_COVERED - 1)] = unrecorded

    @property
    def head(self) -> int:
        """How many records were begun so far."""
        return self._words[H_HEAD]

    def close(self) -> None:
        """Say that nothing more will come. The mapping stays until the last operation lets go."""
        self._words[H_CLOSED] = 1
