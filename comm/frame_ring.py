"""The ring of slots in which frames wait for their readers: one writer, any number of readers.

Owns what lies where in the segment. `ring_writer` and `ring_reader` own what is done with it, and
nobody here knows what a frame means. Positions count what was ever written to the ring; frame
number and position differ by nothing but the error that made a channel refuse.

    control page, u64 words                                                     written by
    +------------------------------------------------------------------------+
    | line 0     key of the segment                                          |  nobody again
    | line 1     published << 1 | closed      writer's last sign of life     |  writer, each frame
    | line 2     writer waits                 lost rank + 1                  |  writer, seldom
    | line 3-7   sleepers: a byte per reader                                 |  readers, to sleep
    | line 8-39  table of rings: base, offset, bytes per slot, slots         |  writer, to resize
    +------------------------------------------------------------------------+
    | line 64 + i   taken by reader i   its last sign of life   whom it lost |  reader i
    +------------------------------------------------------------------------+
    ring 0: slots, one frame each, from its header on
    ring 1: ...

`published` is one aligned 8-byte store, which makes all that was written before visible as one;
that, where the CPU does not promise it, is for fences to ensure (`futex.make_fence`), which stand
in the code where a comment begins with "Fence". Its low half is the futex word that readers sleep
on, and the low half of `taken` the one that the writer sleeps on.

Ring r holds the positions from its base on, position p in slot (p - base) mod slots, up to the base
of ring r + 1. A reader looks there for the position that it reads next. The memory of a ring goes
back to the system once all readers have left it.
"""

import mmap
from typing import Protocol

import torch

from .futex import Futex
from .region import Region
from .segment import PAGE, Segment

PUBLISHED, WRITER_BEAT = 8, 9
WRITER_WAITS, LOST = 16, 17
SLEEPERS, MAX_READERS = 24, 320
_TABLE, NUM_RINGS, _ENTRY = 64, 32, 8
BASE, OFFSET, SLOT_BYTES, SLOTS = range(4)  # of a ring, in its line
_READERS, _LINE = 512, 8
TAKEN, BEAT, BLAMED = range(3)  # of a reader, in its line; the last is a rank + 1

NEVER = LEFT = (1 << 64) - 1  # a base not reached yet; what a reader that closed has taken
UNNAMED = 1 << 63  # in the place of a lost rank that nobody can name


class Control:
    """The control page, mapped by one process."""

    def __init__(self, segment: Segment, num_readers: int) -> None:
        self.memory = segment.map(0, control_bytes(num_readers))
        self.words = memoryview(self.memory).cast("Q")
        self.bytes = memoryview(self.memory)
        self.published = Futex(self.memory, PUBLISHED * 8)
        self.takens = [reader_line(index) + TAKEN for index in range(num_readers)]

    def has_left(self, index: int) -> bool:
        """Whether reader `index` has closed."""
        return self.words[self.takens[index]] == LEFT

    def blame(self, index: int) -> int | None:
        """The rank whose loss made reader `index` give up; its own end is only what follows."""
        blamed = self.words[reader_line(index) + BLAMED]
        return blamed - 1 if blamed else None

    def taken(self, index: int) -> Futex:
        """The word by which reader `index` wakes the writer."""
        return Futex(self.memory, self.takens[index] * 8)


class Ring:
    """One ring of the table, mapped by one process."""

    def __init__(
        self, segment: Segment, base: int, offset: int, slot_bytes: int, slots: int
    ) -> None:
        self.base = base
        self.offset = offset
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.memory: mmap.mmap = segment.map(offset, slot_bytes * slots)
        with torch.inference_mode(False):  # or no frame could be written here outside of it
            tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
            self.regions = [
                Region(tensor[begin : begin + slot_bytes], (segment.fd, offset + begin))
                for begin in range(0, slot_bytes * slots, slot_bytes)
            ]


class RingWatcher(Protocol):
    """Told which rings a process uses: a GPU wants their memory page-locked."""

    def lock(self, ring: Ring) -> None:
        """The ring was mapped."""

    def is_through(self, ring: Ring) -> bool:
        """Whether nothing reads the ring's memory any more behind this process's back."""

    def unlock(self, ring: Ring) -> None:
        """It is through, and will not be used any more."""


def control_bytes(num_readers: int) -> int:
    """Where ring 0 begins."""
    return -(-(_READERS + num_readers * _LINE) * 8 // PAGE) * PAGE


def reader_line(index: int) -> int:
    """The first word of a reader's line."""
    return _READERS + index * _LINE


def table_entry(generation: int) -> int:
    """The first word of a ring's line in the table."""
    return _TABLE + generation % NUM_RINGS * _ENTRY
