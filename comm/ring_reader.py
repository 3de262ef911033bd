"""One reader of a frame ring: waits for the next frame, gives its slot back, follows to new rings.

Owns the order of loads and stores on a reader's side; `frame_ring` draws what they go to, `waiting`
decides between sleeping and spinning. Knows nothing of what a frame means.
"""

import os
import time
from collections.abc import Sequence

from .errors import Closed, PeerLost, ReceiveTimeout
from .frame_ring import (
    BASE,
    BEAT,
    BLAMED,
    LEFT,
    LOST,
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
    reader_line,
    table_entry,
)
from .futex import is_weakly_ordered, make_fence
from .peers import Peers
from .region import Region
from .segment import Segment
from .waiting import Cadence

_POLLS = range(32)  # between two looks at the clock while spinning
_SLICE_NS = 200_000_000  # the longest wait between two looks at the peers


class RingReader:
    """Waits, gives back, leaves. `writer` is the global rank of the ring's writer, `source` that
    of whom its frames come from, if not from itself.

    `peers` are watched while a frame is awaited: a dead one is PeerLost.
    """

    def __init__(
        self,
        segment: Segment,
        readers: Sequence[int],
        writer: int,
        peers: Peers,
        spin: float,
        watcher: RingWatcher | None = None,
        source: int | None = None,
    ) -> None:
        """`readers`: the global ranks in the order of their lines, this one among them."""
        self.position = 0
        self._segment = segment
        self._readers = list(readers)
        self._writer = writer
        self._source = writer if source is None else source
        self._peers = peers
        self._cadence = Cadence(spin)
        self._watcher = watcher
        self._fence = make_fence()
        self._weak = is_weakly_ordered()
        # With more ranks than cores a spinning reader may keep the writer itself from running.
        cores = len(os.sched_getaffinity(0))
        self._yields = cores < len(peers.neighbours) + 1
        self._control = Control(segment, len(readers))
        self._words = self._control.words
        index = self._readers.index(peers.own.rank)
        self._taken = reader_line(index) + TAKEN
        self._beat = reader_line(index) + BEAT
        self._blamed = reader_line(index) + BLAMED
        self._sleeper = SLEEPERS * 8 + index
        self._wakes_writer = self._control.taken(index)
        self._ring: Ring
        self._words[self._beat] = time.monotonic_ns()
        self._generation = -1  # the first frame leads to the first ring, as to every later one
        self._next_base = table_entry(0) + BASE

    def next(self, timeout_s: float) -> Region:
        """The slot of the next frame, once it is published; the same until `release`.

        Raises ReceiveTimeout, PeerLost, and Closed once the writer has closed and all it published
        was read.
        """
        words = self._words
        if words[PUBLISHED] >= (self.position + 1) << 1:
            now_ns = words[self._beat] = time.monotonic_ns()
            self._cadence.arrived(now_ns)
        else:
            self._await(timeout_s)
        if self._weak:
            self._fence()  # Fence: what is read of the frame is read after it was published
        if self.position >= words[self._next_base]:
            self._follow()
        ring = self._ring
        return ring.regions[(self.position - ring.base) % ring.slots]

    def release(self) -> None:
        """The slot of the frame may be written anew."""
        if self._weak:
            self._fence()  # Fence: all loads from the slot are over
        self.position += 1
        self._tell_taken(self.position)

    def look(self) -> None:
        """Raise PeerLost if a rank of this host has died, whether or not there is more to read."""
        published = self._words[PUBLISHED]
        if published & 1 and self._words[LOST]:
            self._end()
        self._look(published & ~1)  # who ended after an orderly end is not lost

    def leave(self) -> None:
        """This reader takes nothing any more, and need not be waited for."""
        self._tell_taken(LEFT)

    def _tell_taken(self, taken: int) -> None:
        words = self._words
        words[self._taken] = taken
        self._fence()  # Fence: the writer sees what was taken, or this sees that it waits
        if words[WRITER_WAITS]:
            self._wakes_writer.wake()

    def _await(self, timeout_s: float) -> None:
        """Return once the frame is published, by spinning and sleeping as the cadence says."""
        words, idle = self._words, self.position << 1
        start_ns = now_ns = time.monotonic_ns()
        deadline_ns = now_ns + int(timeout_s * 1e9)
        look_ns = min(now_ns + _SLICE_NS, deadline_ns)
        words[self._beat] = now_ns
        wake_ns, stop_ns = self._cadence.begin(now_ns)
        while True:
            if wake_ns <= now_ns < stop_ns:
                self._spin(idle, min(stop_ns, look_ns))
                now_ns = time.monotonic_ns()
            else:
                alarm_ns = min(wake_ns, look_ns) if now_ns < wake_ns else look_ns
                self._sleep(idle, alarm_ns - now_ns)
                now_ns = time.monotonic_ns()
                if alarm_ns == wake_ns <= now_ns and words[PUBLISHED] == idle:
                    self._cadence.overslept(now_ns - wake_ns)
            published = words[PUBLISHED]
            if published > idle | 1:
                self._cadence.arrived(now_ns)
                return
            if published != idle:
                self._end()
            if now_ns >= look_ns:
                words[self._beat] = now_ns
                self._look(idle)
                if now_ns >= deadline_ns and words[PUBLISHED] == idle:
                    raise ReceiveTimeout(self._describe_wait(start_ns, now_ns))
                look_ns = min(now_ns + _SLICE_NS, deadline_ns)
            if wake_ns < stop_ns <= now_ns:
                wake_ns, stop_ns = self._cadence.begin(now_ns)

    def _spin(self, idle: int, until_ns: int) -> None:
        words, clock, yields = self._words, time.monotonic_ns, self._yields
        while True:
            for _ in _POLLS:
                if words[PUBLISHED] != idle:
                    return
            if clock() >= until_ns:
                return
            if yields:
                os.sched_yield()

    def _sleep(self, idle: int, timeout_ns: int) -> None:
        asleep = self._control.bytes
        asleep[self._sleeper] = 1
        # Fence: the writer sees the sleeper, or this sees what it published. x86-64 needs it too.
        self._fence()
        if self._words[PUBLISHED] == idle:
            self._control.published.wait(idle, max(timeout_ns, 0))
        asleep[self._sleeper] = 0

    def _look(self, idle: int) -> None:
        """Raise PeerLost if a rank of this host has died."""
        while (rank := self._peers.gone()) is not None:
            # What the dead has published or told before its end is visible by now.
            if self._words[PUBLISHED] != idle:
                return
            index = self._readers.index(rank) if rank in self._readers else None
            if index is not None and self._control.has_left(index):
                self._peers.excuse(rank)
                continue
            lost = self._control.blame(index) if index is not None else None
            if lost is None:
                lost = rank
            self._words[self._blamed] = lost + 1
            text = f"its process ended while this rank waited for frame {self.position}"
            raise PeerLost(lost, text)

    def _end(self) -> None:
        """Raise what the writer closed with."""
        if self._weak:
            self._fence()  # Fence: why it ended is read after the end was seen
        lost = self._words[LOST]
        if lost:
            named = None if lost == UNNAMED else lost - 1
            if named is not None:
                self._words[self._blamed] = lost
            raise PeerLost(named, f"rank {self._writer} says so")
        raise Closed(f"rank {self._source} closed the channel after {self.position} frames")

    def _describe_wait(self, start_ns: int, now_ns: int) -> str:
        beat_ns = self._words[WRITER_BEAT]
        age = f"{(now_ns - beat_ns) / 1e9:.1f} s ago" if beat_ns else "never"
        via = f" by way of rank {self._writer}" if self._writer != self._source else ""
        return (
            f"waited {(now_ns - start_ns) / 1e9:.1f} s in vain for frame {self.position} from "
            f"rank {self._source}{via}: its last sign of life here was {age}, "
            f"its {self._peers.describe(self._writer)}"
        )

    def _follow(self) -> None:
        """Go on in the ring that has the position."""
        words = self._words
        generation = self._generation + 1
        # Past rings that were outgrown before their first frame: to map one would take its memory,
        # which the writer may have given back already, anew and for good.
        while self.position >= words[table_entry(generation + 1) + BASE]:
            generation += 1
        entry = table_entry(generation)
        self._next_base = table_entry(generation + 1) + BASE
        if self._watcher is not None and self._generation >= 0:
            self._watcher.unlock(self._ring)
        self._generation = generation
        self._ring = Ring(
            self._segment,
            words[entry + BASE],
            words[entry + OFFSET],
            words[entry + SLOT_BYTES],
            words[entry + SLOTS],
        )
        if self._watcher is not None:
            self._watcher.lock(self._ring)
