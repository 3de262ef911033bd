"""What the leader of a host does with each frame: from its ring to the broadcast, or the other way.

Owns the order of both. Knows nothing of what a frame means, nor of how the others are found.
"""

import contextlib
import time

from .errors import Closed, FrameError, PublishTimeout, ReceiveTimeout
from .frame_ring import PUBLISHED
from .header import CLOSES
from .mirror import Mirror
from .region import Region
from .ring_writer import RingWriter
from .trunk import Trunk


class NodeWriter(RingWriter):
    """The ring of one host among several, written by its leader."""

    def reserve_within(self, nbytes: int, timeout_s: float) -> Region:
        """`reserve`, with another time-out."""
        usual_s, self._timeout_s = self._timeout_s, timeout_s
        try:
            return self.reserve(nbytes)
        finally:
            self._timeout_s = usual_s

    def has_left(self, rank: int) -> bool:
        """Whether this reader closed; from then on its process may end."""
        return rank in self._readers and self._control.has_left(self._readers.index(rank))

    def is_closed(self) -> bool:
        """Whether the readers were told that there is no more."""
        return bool(self._words[PUBLISHED] & 1)

    def _look(self, now_ns: int) -> None:
        with contextlib.suppress(Closed):  # not all receivers are on this host
            super()._look(now_ns)


class SourceEnd:
    """What the source writes to: its own ring first, then the broadcast."""

    def __init__(self, ring: NodeWriter, trunk: Trunk) -> None:
        self._ring = ring
        self._trunk = trunk
        self._region: Region | None = None  # of the next frame
        self._total = 0

    def reserve(self, nbytes: int) -> Region:
        self._trunk.check()
        self._total = nbytes
        self._region = self._ring.reserve(self._trunk.room(nbytes))
        return self._region

    def publish(self) -> None:
        assert self._region is not None
        self._ring.publish()
        self._trunk.send(self._region, self._total)

    def look(self) -> None:
        self._trunk.check()

    def close(self) -> None:
        # In this order: a member that finds the ring closed may end, and must not pass for lost.
        self._trunk.send_goodbye()
        self._ring.close()

    def abandon(self, lost: int | None) -> None:
        self._ring.abandon(lost)


class LeaderEnd:
    """What a leader reads from: the broadcast, into the ring of its host."""

    def __init__(
        self, ring: NodeWriter, trunk: Trunk, mirror: Mirror | None, src: int, timeout_s: float
    ) -> None:
        self._ring = ring
        self._trunk = trunk
        self._mirror = mirror
        self._src = src
        self._timeout_s = timeout_s
        self._here: Region | None = None  # the frame that was not released
        self._deadline_ns = 0

    def next(self, timeout_s: float) -> Region:
        if self._here is not None:
            return self._here
        self._deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        try:
            header, region = self._trunk.receive(self._room, self._deadline_ns)
        except FrameError:
            self._ring.publish()  # as it came, so that the members see for themselves
            raise
        if header.flags & CLOSES:
            self._ring.close()
            number = self._trunk.sequence - 1
            raise Closed(f"rank {self._src} closed the channel after {number} frames")
        self._ring.publish()
        self._here = region
        return region

    def release(self) -> None:
        self._here = None

    def look(self) -> None:
        self._trunk.check()

    def leave(self) -> None:
        if self._ring.is_closed():
            return
        deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
        with contextlib.suppress(Closed):
            while True:
                self.next(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
                self.release()

    def _room(self, nbytes: int) -> Region:
        """Memory of the ring, once all members have read what lay there."""
        left_s = max(self._deadline_ns - time.monotonic_ns(), 0) / 1e9
        try:
            region = self._ring.reserve_within(nbytes, left_s)
        except PublishTimeout as error:
            raise ReceiveTimeout(f"the ring of this host has no room: {error}") from error
        if self._mirror is not None:
            # Over by then: the frame that lay here was given back when its copy was.
            assert self._mirror.is_read(region)
        return region
