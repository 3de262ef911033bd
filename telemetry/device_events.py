"""Pairs of CUDA events around operations: a bounded pool, asked now and then how far they are.

Owns the events, the order in which they are asked, and the rule that nobody asks while a CUDA graph
is captured. Refuses to know what is timed and why.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from .cuda_graphs import CaptureLog


class Timing:
    """One operation: its pair of events, and what its record will hold."""

    __slots__ = ("begin", "begin_ns", "device", "end", "key", "meta", "nbytes", "sequence", "step",
                 "stream")  # fmt: skip

    begin_ns: int
    key: int  # of the group
    meta: int
    nbytes: int
    sequence: int
    step: int
    stream: Any  # that `begin` is on

    def __init__(self, device: int, begin: Any, end: Any) -> None:
        self.device = device
        self.begin = begin
        self.end = end


class EventPool:
    """At most `size` pairs per device. `over` is called once for each pair that is done.

    Events of one stream are done in the order they were recorded, so only the oldest of each
    stream is asked; the streams take turns, and a late one holds up no other. Every method may
    raise what CUDA raises, a RuntimeError.
    """

    def __init__(
        self, cuda: Any, captures: CaptureLog, size: int, over: Callable[[Timing], None]
    ) -> None:
        self._cuda = cuda
        self._captures = captures
        self._size = size
        self._over = over
        self._made: Counter[int] = Counter()  # pairs, by device
        self._free: dict[int, list[Timing]] = {}
        self._lanes: dict[tuple[int, int], deque[Timing]] = {}  # by device and stream
        self._turn: deque[deque[Timing]] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Operations that have ended on the host, and whose time is not known yet."""
        return sum(len(lane) for lane in list(self._lanes.values()))

    def take(self, device: int) -> Timing | None:
        """A pair; None if all are in use."""
        free = self._free.get(device)
        if free is None:
            free = self._free.setdefault(device, [])
        try:
            return free.pop()
        except IndexError:
            if self._made[device] >= self._size:
                return None
            self._made[device] += 1
            event = self._cuda.Event
            return Timing(device, event(enable_timing=True), event(enable_timing=True))

    def give(self, timing: Timing) -> None:
        timing.stream = None
        self._free[timing.device].append(timing)

    def end(self, timing: Timing, stream: Any) -> None:
        """Record the end on `stream`; the pair comes back by itself."""
        timing.end.record(stream)
        timing.stream = None
        key = timing.device, stream.cuda_stream
        lane = self._lanes.get(key)
        if lane is None:
            with self._lock:
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = deque()
                    self._turn.append(lane)
        lane.append(timing)

    def look(self, limit: int) -> None:
        """Ask after the oldest operations of the stream whose turn it is."""
        if not self._turn or not self._captures.lock.acquire(blocking=False):
            return
        try:
            if self._captures.open:
                return
            lane = self._turn[0]
            self._turn.rotate(-1)
            for _ in range(limit):
                if not lane or not (lane[0].end.query() and lane[0].begin.query()):
                    return
                timing = lane.popleft()
                self._over(timing)
                self.give(timing)
        finally:
            self._captures.lock.release()

    def look_everywhere(self, limit: int) -> None:
        """The same of each stream."""
        for _ in range(len(self._turn)):
            self.look(limit)

    def clear(self) -> None:
        """Forget what is still running."""
        self._lanes.clear()
        self._turn.clear()
