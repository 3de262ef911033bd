"""The one writer of a frame ring: room for a frame, its publication, larger slots, the goodbye.

Owns the order of stores on the writer's side; `frame_ring` draws what they go to. Knows nothing of
what a frame means.
"""

import contextlib
import time
from collections.abc import Sequence

from .errors import CannotShare, Closed, PeerLost, PublishTimeout
from .frame_ring import (
    BASE,
    BEAT,
    LEFT,
    LOST,
    MAX_READERS,
    NEVER,
    NUM_RINGS,
    OFFSET,
    PUBLISHED,
    SLEEPERS,
    SLOT_BYTES,
    SLOTS,
    TAKEN,
    UNNAMED,
    WRITER_BEAT,
    WRITER_WAITS,
    Control,
    Ring,
    RingWatcher,
    control_bytes,
    reader_line,
    table_entry,
)
from .futex import is_weakly_ordered, make_fence
from .ladder import rung
from .peers import Peers
from .region import Region
from .segment import PAGE, Segment

FIRST_SLOT_BYTES = 512 << 10
_SLOTS, _FEW_SLOTS = 4, 2
_LARGE_SLOT_BYTES = 8 << 20  # from here on a ring has few slots
_WINDOW = 256  # frames; slots of which so many in a row used less than a quarter get smaller

_SPIN_NS = 50_000  # a reader that is a step behind is soon done: about what a wake-up costs
_SLICE_NS = 200_000_000  # the longest sleep between two looks at the readers
_LOOK_NS = 100_000_000  # between two looks at the readers while there is always room


class RingWriter:
    """Makes room, publishes, closes. `readers`: their global ranks, in the order of their lines.

    `peers` must know the readers of this host; they are watched, and a dead one is PeerLost.
    """

    def __init__(
        self,
        segment: Segment,
        readers: Sequence[int],
        peers: Peers,
        timeout_s: float,
        watcher: RingWatcher | None = None,
    ) -> None:
        """`segment` is as `make_ring_segment` made it."""
        self.position = 0
        self._segment = segment
        self._control = Control(segment, len(readers))
        self._readers = list(readers)
        self._peers = peers
        self._timeout_s = timeout_s
        self._watcher = watcher
        self._fence = make_fence()
        self._weak = is_weakly_ordered()
        self._words = self._control.words
        self._sleepers = range(SLEEPERS, SLEEPERS + (len(readers) + 7) // 8)
        self._takens = [self._control.taken(index) for index in range(len(readers))]
        self._rings: list[Ring] = []  # the current one last, before it those still being read
        self._bases: list[int] = []  # of all rings there were
        self._room_until = 0  # a position; before it there is room for certain
        self._largest = self._frames = 0  # of the window
        self._looked_ns = 0
        self._begin_ring(control_bytes(len(readers)), FIRST_SLOT_BYTES, _SLOTS)

    def reserve(self, nbytes: int) -> Region:
        """Memory for the next frame; until `publish` it can be written again and again.

        Waits for the slowest reader if it is a whole ring behind. Raises PeerLost, PublishTimeout
        (nothing has changed then), Closed if all readers have left, and CannotShare if the frame
        needs memory that cannot be had.
        """
        now_ns = time.monotonic_ns()
        self._words[WRITER_BEAT] = now_ns
        if now_ns - self._looked_ns > _LOOK_NS:
            self._look(now_ns)
        if nbytes > self._largest:
            self._largest = nbytes
        if self._frames >= _WINDOW:  # after that: slots that this frame needs stay
            self._end_window()
        if nbytes > self._ring.slot_bytes:
            self._resize(nbytes)
        if self.position >= self._room_until:
            self._make_room()
        ring = self._ring
        return ring.regions[(self.position - ring.base) % ring.slots]

    def publish(self) -> None:
        """What was written to the reserved memory is the next frame."""
        self.position += 1
        if self._weak:
            self._fence()  # Fence: the frame is visible before the word that announces it
        self._words[PUBLISHED] = self.position << 1
        self._wake_readers()
        self._frames += 1

    def close(self) -> None:
        """No more frames: readers find what was published, then the end."""
        self._words[PUBLISHED] = self.position << 1 | 1
        self._wake_readers()

    def abandon(self, lost: int | None) -> None:
        """Tell the readers that global rank `lost`, or one that nobody can name, is gone; close."""
        self._words[LOST] = UNNAMED if lost is None else lost + 1
        if self._weak:
            self._fence()  # Fence: why it ends is visible before the end
        self.close()

    def _wake_readers(self) -> None:
        # Fence: the word is visible before the sleepers are looked at. A reader does it the other
        # way round, so that one of both sees the other. x86-64 needs this one too.
        self._fence()
        words = self._words
        for word in self._sleepers:
            if words[word]:
                self._control.published.wake()
                return

    def _make_room(self) -> None:
        """Wait until the slot of the next position is free."""
        ring = self._ring
        used = self.position - ring.slots  # what the slot held before, if this ring had begun
        slowest = self._await_taken(used + 1 if used >= ring.base else 0)
        self._room_until = max(slowest, ring.base) + ring.slots
        if self._weak:
            self._fence()  # Fence: the readers' loads are over before the slot is written anew
        watcher = self._watcher
        while len(self._rings) > 1 and slowest >= self._rings[1].base:
            if watcher is not None and not watcher.is_through(self._rings[0]):
                return  # it goes the next time
            ring = self._rings.pop(0)
            if watcher is not None:
                watcher.unlock(ring)
            self._segment.give_back(ring.offset, ring.slot_bytes * ring.slots)

    def look(self) -> None:
        """Raise PeerLost if a rank of this host has died, Closed if all readers have left."""
        self._look(time.monotonic_ns())

    def _await_taken(self, position: int) -> int:
        """Wait until all readers have taken what is before `position`; returns what all have."""
        words, takens = self._words, self._control.takens
        start_ns = 0
        while True:
            taken = [words[word] for word in takens]
            slowest = min(taken, default=self.position)
            if slowest >= position:
                return slowest
            now_ns = time.monotonic_ns()
            start_ns = start_ns or now_ns
            if now_ns - start_ns < _SPIN_NS:
                continue
            self._look(now_ns)
            if now_ns - start_ns > self._timeout_s * 1e9:
                raise PublishTimeout(self._describe_wait(position, now_ns))
            words[WRITER_BEAT] = now_ns
            index = taken.index(slowest)
            words[WRITER_WAITS] = 1
            self._fence()  # Fence: a reader sees that the writer waits, or this sees what it took
            if words[takens[index]] == slowest:
                left_ns = start_ns + int(self._timeout_s * 1e9) - now_ns
                self._takens[index].wait(slowest, min(max(left_ns, 0), _SLICE_NS))
            words[WRITER_WAITS] = 0

    def _look(self, now_ns: int) -> None:
        """Raise PeerLost if a rank of this host has died, Closed if all readers have left."""
        self._looked_ns = now_ns
        words, takens = self._words, self._control.takens
        while (rank := self._peers.gone()) is not None:
            index = self._readers.index(rank) if rank in self._readers else None
            if index is None or not self._control.has_left(index):
                lost = self._control.blame(index) if index is not None else None
                text = f"its process ended before all had taken frame {self.position}"
                raise PeerLost(rank if lost is None else lost, text)
            self._peers.excuse(rank)
        if self._readers and all([words[word] == LEFT for word in takens]):
            raise Closed(f"all receivers have closed the channel: ranks {self._readers}")

    def _describe_wait(self, position: int, now_ns: int) -> str:
        """Who is waited for, by what each has taken and when it was last heard of."""
        words = self._words
        behind = []
        for index, rank in enumerate(self._readers):
            line = reader_line(index)
            taken, beat_ns = words[line + TAKEN], words[line + BEAT]
            if taken < position:
                age = f"{(now_ns - beat_ns) / 1e9:.1f} s ago" if beat_ns else "never"
                behind.append(
                    f"rank {rank} has taken {taken} of {self.position} frames, its last sign of "
                    f"life here was {age}, its {self._peers.describe(rank)}"
                )
        return f"frame {self.position} was not published: after {self._timeout_s:g} s " + "; ".join(
            behind
        )

    def _end_window(self) -> None:
        """Smaller slots after long under-use: one huge frame must not keep its memory for good."""
        wanted = _slot_bytes(self._largest)
        self._frames = self._largest = 0
        if wanted * 4 <= self._ring.slot_bytes:
            with contextlib.suppress(CannotShare):  # the large slots do as well
                self._resize(wanted)

    def _resize(self, nbytes: int) -> None:
        """Begin a ring whose slots hold `nbytes`, at the next position."""
        slot_bytes = _slot_bytes(nbytes)
        slots = _SLOTS if slot_bytes < _LARGE_SLOT_BYTES else _FEW_SLOTS
        number = len(self._bases)
        if number >= NUM_RINGS - 1:  # the line after this one: nobody may look there any more
            self._await_taken(self._bases[number - NUM_RINGS + 1] + 1)
        offset = self._segment.extend(slot_bytes * slots)
        try:
            self._begin_ring(offset, slot_bytes, slots)
        except OSError as error:
            self._segment.give_back(offset, slot_bytes * slots)
            raise CannotShare(
                f"{slot_bytes * slots:,} bytes of shared memory cannot be mapped: {error.strerror}"
            ) from error

    def _begin_ring(self, offset: int, slot_bytes: int, slots: int) -> None:
        """Go on in a ring that lies there, from the next position on."""
        number = len(self._bases)
        self._ring = Ring(self._segment, self.position, offset, slot_bytes, slots)
        self._rings.append(self._ring)
        if self._watcher is not None:
            self._watcher.lock(self._ring)
        self._bases.append(self.position)
        self._room_until = 0
        words = self._words
        words[table_entry(number + 1) + BASE] = NEVER
        entry = table_entry(number)
        words[entry + OFFSET] = offset
        words[entry + SLOT_BYTES] = slot_bytes
        words[entry + SLOTS] = slots
        # Its base last, and no fence: readers look here only for a position that is published.
        words[entry + BASE] = self.position


def make_ring_segment(num_readers: int) -> Segment:
    """A segment with a control page and room for the first ring; raises CannotShare."""
    if num_readers > MAX_READERS:
        raise ValueError(f"{num_readers} readers share one host; a ring has {MAX_READERS} at most")
    # The ring's memory too: later on the writer alone would learn that it cannot be had.
    return Segment.create(control_bytes(num_readers) + FIRST_SLOT_BYTES * _SLOTS)


def _slot_bytes(nbytes: int) -> int:
    return -(-rung(max(nbytes, FIRST_SLOT_BYTES)) // PAGE) * PAGE
