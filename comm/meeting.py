"""Where the ranks of a host meet, again and again: each says that it is there, and waits for all.

Owns what lies in the control pages, the order of loads and stores on them, and the wait. Knows
nothing of why the ranks meet.

    control pages, u64 words                                                    written by
    +------------------------------------------------------------------------+
    | line 0       key of the segment                                        |  nobody again
    | line 3-7     sleepers: a byte per rank                                 |  ranks, to sleep
    +------------------------------------------------------------------------+
    | line 8 + i   arrivals << 1 | left   brought, by turns   sign of life   |  rank i
    |              whom it lost                                              |
    +------------------------------------------------------------------------+

`arrivals` of a rank counts its meetings, by one aligned 8-byte store, after which all that the rank
stored before is visible; its low half is the futex word that the others sleep on. What a rank
brought to a meeting is a number for the others to compare with their own. Two of them take turns:
while a rank looks at what was brought to a meeting, others may be at the next one, but at no later
one, since that wants this rank too. The same holds for whatever else ranks write before a meeting
and read after it: two places in turn are enough, and one meeting.

x86-64 orders this by itself but for one thing; elsewhere fences ensure it (`futex.make_fence`),
which stand where a comment begins with "Fence".
"""

import os
import time
from collections.abc import Sequence
from typing import NoReturn

from .errors import AllReduceTimeout, Closed, PeerLost
from .futex import Futex, is_weakly_ordered, make_fence
from .peers import Peers
from .segment import PAGE, Segment
from .waiting import Cadence

MAX_RANKS = 320
_SLEEPERS = 24
_RANKS, _LINE = 64, 8
ARRIVALS, BROUGHT, BEAT, BLAMED = 0, 1, 3, 4  # of a rank, in its line; the last is a rank + 1

_POLLS = range(32)  # between two looks at the clock while spinning
_SLICE_NS = 200_000_000  # the longest wait between two looks at the peers


class Meeting:
    """One rank's view. `ranks`: all of them, global, in the order of their lines; `peers` are
    watched while this rank waits. `spin` is what `Cadence` takes.
    """

    def __init__(self, segment: Segment, ranks: Sequence[int], peers: Peers, spin: float) -> None:
        self.count = 0  # of meetings that this rank has arrived at
        self._ranks = list(ranks)
        self._peers = peers
        self._cadence = Cadence(spin)
        memory = segment.map(0, control_bytes(len(ranks)))
        self._words = memoryview(memory).cast("Q")
        self._bytes = memoryview(memory)
        self._fence = make_fence()
        self._weak = is_weakly_ordered()
        self._lines = [_line(index) for index in range(len(ranks))]
        own = self._ranks.index(peers.own.rank)
        self._own = self._lines[own]
        self._others = [line for line in self._lines if line != self._own]
        self._sleeper = _SLEEPERS * 8 + own
        self._sleepers = range(_SLEEPERS, _SLEEPERS + (len(ranks) + 7) // 8)
        self._futexes = {line: Futex(memory, line * 8) for line in self._lines}
        self._words[self._own + BEAT] = time.monotonic_ns()

    def bring(self, number: int, turn: int) -> None:
        """What the others may ask for after this rank's next arrival; `turn`: 0, 1, 0, 1, ..."""
        self._words[self._own + BROUGHT + turn] = number

    def brought(self, turn: int) -> list[int]:
        """What each rank brought, once all are here."""
        words, place = self._words, BROUGHT + turn
        return [words[line + place] for line in self._lines]

    def arrive(self) -> None:
        """This rank is here, and all that it has stored is for the others to see."""
        words = self._words
        self.count += 1
        if self._weak:
            # Fence: what was stored is visible, and what the others stored was read, before this.
            self._fence()
        words[self._own] = self.count << 1
        self._wake_others()

    def await_all(self, timeout_s: float) -> None:
        """Wait until all ranks have arrived as often as this one.

        Raises PeerLost, Closed if one has left instead, and AllReduceTimeout.
        """
        words, want = self._words, self.count << 1
        for line in self._others:
            if words[line] < want:
                self._await(want, timeout_s)
                break
        else:
            self._cadence.arrived(time.monotonic_ns())
        if self._weak:
            self._fence()  # Fence: what the others stored is read after they arrived

    def leave(self, lost: int | None = None) -> None:
        """This rank comes to no more meetings, because of the rank that is `lost`, if one is."""
        if lost is not None:
            self._blame(lost)
            if self._weak:
                self._fence()  # Fence: why it leaves is visible before that it has left
        self._words[self._own] = self.count << 1 | 1
        self._wake_others()

    def _wake_others(self) -> None:
        # Fence: the arrival is visible before the sleepers are looked at. Who goes to sleep does
        # it the other way round, so that one of both sees the other. x86-64 needs this one too.
        self._fence()
        words = self._words
        for word in self._sleepers:
            if words[word]:
                self._futexes[self._own].wake()
                return

    def _await(self, want: int, timeout_s: float) -> None:
        """Return once nobody is missing, by spinning and sleeping as the cadence says."""
        words = self._words
        start_ns = now_ns = time.monotonic_ns()
        deadline_ns = now_ns + int(timeout_s * 1e9)
        look_ns = min(now_ns + _SLICE_NS, deadline_ns)
        words[self._own + BEAT] = now_ns
        wake_ns, stop_ns = self._cadence.begin(now_ns)
        while True:
            if wake_ns <= now_ns < stop_ns:
                self._spin(want, min(stop_ns, look_ns))
                now_ns = time.monotonic_ns()
                missing = self._missing(want)
            else:
                alarm_ns = min(wake_ns, look_ns) if now_ns < wake_ns else look_ns
                self._sleep(want, alarm_ns - now_ns)
                now_ns = time.monotonic_ns()
                missing = self._missing(want)
                if alarm_ns == wake_ns <= now_ns and missing:
                    self._cadence.overslept(now_ns - wake_ns)
            if not missing:
                self._cadence.arrived(now_ns)
                return
            if words[missing] & 1:
                self._end(missing)
            if now_ns >= look_ns:
                words[self._own + BEAT] = now_ns
                self._look(want)
                if now_ns >= deadline_ns and self._missing(want):
                    raise AllReduceTimeout(self._describe_wait(want, start_ns, now_ns))
                look_ns = min(now_ns + _SLICE_NS, deadline_ns)
            if wake_ns < stop_ns <= now_ns:
                wake_ns, stop_ns = self._cadence.begin(now_ns)

    def _missing(self, want: int) -> int:
        """The line of a rank that is not here; 0, which is nobody's: there is none."""
        words = self._words
        for line in self._others:
            if words[line] < want:
                return line
        return 0

    def _spin(self, want: int, until_ns: int) -> None:
        words, clock = self._words, time.monotonic_ns
        for line in self._others:
            while True:
                for _ in _POLLS:
                    if words[line] >= want:
                        break
                else:
                    if clock() >= until_ns:
                        return
                    # Who is waited for may be waiting for this very core. Where a machine has more
                    # to do than cores, a sum and a matrix product took 1.4 times as long without.
                    os.sched_yield()
                    continue
                break

    def _sleep(self, want: int, timeout_ns: int) -> None:
        """Until one that is missing arrives or leaves, it is time, or something else happens."""
        asleep = self._bytes
        asleep[self._sleeper] = 1
        # Fence: who arrives sees the sleeper, or this sees the arrival. x86-64 needs it too.
        self._fence()
        line = self._missing(want)
        if line:
            found = self._words[line]
            if found < want and not found & 1:
                self._futexes[line].wait(found, max(timeout_ns, 0))
        asleep[self._sleeper] = 0

    def _look(self, want: int) -> None:
        """Raise PeerLost if a rank has died; one that had left may."""
        while (rank := self._peers.gone()) is not None:
            # What the dead has stored before its end is visible by now.
            line = self._lines[self._ranks.index(rank)]
            if self._words[line] & 1:
                self._peers.excuse(rank)
                continue
            if not self._missing(want):
                return
            lost = self._words[line + BLAMED] - 1 if self._words[line + BLAMED] else rank
            self._blame(lost)
            raise PeerLost(lost, f"its process ended while this rank waited for {self._told(want)}")

    def _end(self, line: int) -> NoReturn:
        """Raise why the rank of this line has left."""
        if self._weak:
            self._fence()  # Fence: why it left is read after that it has
        rank = self._ranks[self._lines.index(line)]
        lost = self._words[line + BLAMED]
        if lost:
            self._blame(lost - 1)
            raise PeerLost(lost - 1, f"rank {rank} says so")
        raise Closed(f"rank {rank} has closed after {self._told(self._words[line])}")

    def _blame(self, lost: int) -> None:
        """Write down whose loss ends this rank's meetings: the first one."""
        words, place = self._words, self._own + BLAMED
        words[place] = words[place] or lost + 1

    def _told(self, arrivals: int) -> str:
        return f"meeting {arrivals >> 1}"

    def _describe_wait(self, want: int, start_ns: int, now_ns: int) -> str:
        """Who is waited for, how often each has arrived, and when it was last heard of."""
        words = self._words
        told = []
        for rank, line in zip(self._ranks, self._lines, strict=True):
            found, beat_ns = words[line], words[line + BEAT]
            if found < want:
                told.append(
                    f"rank {rank} has come to {found >> 1}, it last waited here "
                    f"{(now_ns - beat_ns) / 1e9:.1f} s ago, its {self._peers.describe(rank)}"
                )
        waited_s = (now_ns - start_ns) / 1e9
        return f"waited {waited_s:.1f} s in vain at {self._told(want)}: " + "; ".join(told)


def control_bytes(num_ranks: int) -> int:
    """Bytes that meetings of so many ranks take at the start of a segment."""
    return -(-(_RANKS + num_ranks * _LINE) * 8 // PAGE) * PAGE


def _line(index: int) -> int:
    """The first word of a rank's line."""
    return _RANKS + index * _LINE
