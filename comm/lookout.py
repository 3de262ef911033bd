"""Waiting for a broadcast with an eye on the ranks that it takes.

Owns the one loop in which a process-group channel waits: asleep until the frame is nearly due,
spinning around that moment (`waiting` says when), asleep in slices afterwards, and four times a
second a look at who is gone. Knows nothing of what is awaited: it is given two calls, one that says
whether it is there and one that sleeps.
"""

import os
import time
from collections.abc import Callable

from .obituaries import Obituaries
from .peers import Peers
from .waiting import Cadence

_SLICE_NS = 250_000_000  # of a wait, between two looks at the peers
_LATELY_NS = 100_000_000  # between two looks of a source that never has to wait
_GRACE_NS = 250_000_000  # for what a rank had sent before it ended to arrive
_SETTLE_S = 1.0  # for a rank's end to be known after a connection to it was lost
_HEAR_S = 6.0  # for a store that is slow to tell of it: one answer, and a bit
_TURNS = 8  # of spinning between two looks at the clock
_CENSUS_NS = 20_000_000  # between two looks at how many threads want a core

_clock = time.monotonic_ns
_yield = os.sched_yield  # the thread that receives may have been put on this very core


class Lookout:
    """One rank's waits, and what it knows of the others."""

    def __init__(
        self, peers: Peers, board: Obituaries | None, spin: float, sends: bool = False
    ) -> None:
        """`sends`: waits are for what the group's threads do on this host, not for other ranks.

        Such a wait is slept through: to spin would keep a core from the very thread that works.
        """
        self._peers = peers
        self._board = board
        self._near = [rank for rank in peers.ranks if peers.is_near(rank)]
        self._cadence = Cadence(spin)
        self._may_sleep = spin < 1
        self._sends = sends
        self._crowded = False
        self._counted_ns = 0  # when that was seen
        self._looked_ns = 0

    def wait(
        self, ready: Callable[[], bool], sleep: Callable[[int], None], deadline_ns: int
    ) -> bool:
        """Whether `ready` came true before the deadline, and before somebody was gone.

        `sleep` is given nanoseconds; it may return early, and should where it can tell that what
        is awaited has come. What either raises goes through.
        """
        cadence = self._cadence
        if not ready():
            now = _clock()
            until = now  # the first look is due at once: who is gone already is not waited for
            wake, stop = cadence.begin(now)
            sleeps = self._sends or (self._may_sleep and self._is_crowded(now))
            if sleeps:
                wake = stop = now
            while True:
                if now >= until:
                    if self.gone() is not None:
                        deadline_ns = min(deadline_ns, now + _GRACE_NS)
                    if now >= deadline_ns:
                        return False
                    until = min(now + _SLICE_NS, deadline_ns)
                if now >= wake and now >= stop and not sleeps:
                    wake, stop = cadence.begin(now)
                before = now
                if before < wake:
                    sleep(min(wake, until) - before)
                elif before < stop:
                    if _spin(ready):
                        break
                else:
                    sleep(until - before)
                if ready():
                    break
                now = _clock()
                if before < wake <= now:
                    cadence.overslept(now - wake)
        cadence.arrived(_clock())
        return True

    def _is_crowded(self, now_ns: int) -> bool:
        """Whether more threads want a core than there are.

        To spin then keeps a core from the threads that bring the frame: they have been woken, and
        stand in line behind somebody else on another core.
        """
        if now_ns - self._counted_ns >= _CENSUS_NS:
            self._counted_ns = now_ns
            with open("/proc/loadavg") as file:  # "0.00 0.01 0.05 <running>/<all> <last pid>"
                running = int(file.read().split()[3].partition("/")[0])
            self._crowded = running > len(os.sched_getaffinity(0))
        return self._crowded

    def gone(self) -> tuple[int | None, str] | None:
        """Who is gone, as far as known here and now, and why; about a microsecond."""
        self._looked_ns = _clock()
        rank = self._peers.gone()
        if rank is not None:
            return rank, "its process ended"
        return self._board.heard if self._board is not None else None

    def gone_lately(self) -> tuple[int | None, str] | None:
        """The same; None at once if the last look was a moment ago."""
        return None if _clock() - self._looked_ns < _LATELY_NS else self.gone()

    def find_gone(self) -> tuple[int | None, str] | None:
        """The same after a connection was lost: who lost it is known a moment later."""
        board, begin = self._board, time.monotonic()
        looks = board.looks + 2 if board is not None else 0  # the one under way may be too early
        while True:
            gone = self.gone()
            waited_s = time.monotonic() - begin
            heard = board is None or board.looks >= looks or board.silence is not None
            if gone is not None or waited_s >= (_SETTLE_S if heard else _HEAR_S):
                return gone
            time.sleep(0.01)

    def only_suspect(self) -> int | None:
        """The rank behind a lost connection of which nobody has told; None if it can be several.

        With several hosts it is one of another host: those of this one would have been seen to end,
        and a rank that gives up says so on the board.
        """
        near = [self._peers.own.rank] if self._board is None else self._near
        others = [rank for rank in self._peers.ranks if rank not in near]
        return others[0] if len(others) == 1 else None

    def describe(self) -> str:
        """How the other ranks are, as far as can be told."""
        board = self._board
        far = [rank for rank in self._peers.ranks if rank not in self._near]
        ages = board.ages(far) if board is not None and board.silence is None else {}
        told = []
        for rank in self._peers.ranks:
            if rank != self._peers.own.rank:
                text = f"rank {rank}: {self._peers.describe(rank)}"
                told.append(f"{text}, last alive {ages[rank]:.1f} s ago" if rank in ages else text)
        if board is not None and board.silence is not None:
            told.append(board.silence)
        return "; ".join(told) or "there is no other rank"


def _spin(ready: Callable[[], bool]) -> bool:
    for _ in range(_TURNS):
        if ready():
            return True
        _yield()
    return False
