"""A channel for ranks on several hosts: one broadcast among hosts, shared memory on each.

Owns who leads a host, and how frames get from the broadcast into the ring. The ranks find their
hosts by themselves (`Peer.host`); the leader of a host is the source on its own, and the lowest
rank elsewhere.

                      the one broadcast a frame (`trunk`)
    source, leader  ------------------------------------>  leader
      | ring of its host                                     | ring of its host
      +--> member                                            +--> member
      +--> member                                            +--> member

A frame is encoded once, in a slot of the ring on the source's host. From there it is broadcast, and
it arrives in a slot of each other ring, where it is decoded as on one host: nothing is copied on
the way.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from .channel import Frame
from .errors import CannotShare, Closed, FrameError, PeerLost, PublishTimeout, ReceiveTimeout
from .far_peers import FarPeers, find_leaders, open_board
from .frame_ring import LEFT, PUBLISHED
from .header import CLOSES
from .lookout import Lookout
from .mirror import Mirror
from .obituaries import Obituaries
from .peers import Peers
from .private_group import PrivateGroup
from .region import Region
from .ring_reader import RingReader
from .ring_writer import RingWriter
from .shared_memory import SharedMemoryChannel
from .sharing import gather_reasons, share_segment
from .trunk import Trunk


class TwoLevelChannel(SharedMemoryChannel):
    """See `Channel`; opens like a SharedMemoryChannel, on ranks of any number of hosts.

    A leader passes frames on while it itself receives, and not in between: the members of its host
    wait for it. A leader that closes goes on passing frames to them until the source says goodbye,
    as on a ProcessGroupChannel; a member that closes is not waited for any more.

    A rank that is gone is told to all others by its neighbours and by its leader, through the
    rendezvous store (`obituaries`) and through the rings. With one host for all ranks no broadcast
    is made, and this is a SharedMemoryChannel.
    """

    name = "two-level"
    _peers_type = FarPeers
    _trunk: Trunk | None = None  # of a leader
    _ring: RingWriter | None = None
    _board: Obituaries | None = None
    _told_broadcasts = 0

    def _connect(self, spin: float) -> None:
        peers, group = self._peers, self._group
        assert isinstance(peers, FarPeers)
        if peers.on_one_host:
            super()._connect(spin)
            return
        hosts = find_leaders(peers, self.src)
        leader, node = next(item for item in hosts.items() if self.rank in item[1])
        readers = [rank for rank in node if rank != leader]
        segment = share_segment(group, peers, leader, len(readers))
        number = peers.by_rank[self.src].told["channel"]
        reason = None
        if self.rank == leader:
            try:
                leaders = PrivateGroup([*hosts], f"onecast-{number}", self._timeout_s)
            except RuntimeError as error:
                reason = f"the leaders of the hosts, ranks {[*hosts]}, cannot connect: {error}"
        failed = gather_reasons(group, peers, reason)
        if failed:
            if self.rank == leader and reason is None:
                leaders.close(busy=False)
            raise CannotShare("; ".join(failed))
        board = self._board = peers.board = open_board(number, peers)
        if self.rank == leader:
            ring = _NodeWriter(segment, readers, peers, self._timeout_s, self._mirror)
            peers.has_left = ring.has_left
            lookout = Lookout(peers, board, spin)
            trunk = Trunk(leaders, [*hosts], self.src, self._origin, lookout, self._timeout_s)
            self._ring, self._trunk = ring, trunk
            self._writer = _SourceEnd(ring, trunk)
            self._reader = _LeaderEnd(ring, trunk, self._mirror, self.src, self._timeout_s)
        else:
            mirror, src = self._mirror, self.src
            self._reader = RingReader(segment, readers, leader, peers, spin, mirror, src)
        # When this object goes, however it goes: the others are told.
        self._leave = weakref.finalize(self, _leave, peers, board, self._ring, self._trunk)

    def publish(self, mapping: Mapping[Any, Any]) -> Frame:
        try:
            return super().publish(mapping)
        finally:
            self._count()

    def receive(self, timeout_s: float | None = None) -> Frame:
        try:
            return super().receive(timeout_s)
        finally:
            self._count()

    def close(self) -> None:
        if self._closed:
            return
        try:
            super().close()
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._count()
        if self._board is not None:
            self._part()

    def _end(self, error: BaseException) -> None:
        board, ring = self._board, self._ring
        if board is None:
            super()._end(error)
            return
        if isinstance(error, Closed):
            self._closed = self._refuses = True
            self._part()
            return
        if self._error is not None:
            return
        self._break(error)
        lost: int | None = self.rank
        why = f"it gave up: {error!r}"
        if isinstance(error, PeerLost):
            lost, why = error.rank, error.details
        if ring is not None:
            ring.abandon(lost)
        if board.heard is None:
            board.post(lost, why)
        self._part()

    def _part(self) -> None:
        """This rank is through with the others: in order, or they have been told."""
        finalizer = self._leave.detach()
        if finalizer is not None:
            _part(self._peers, self._board, self._trunk)

    def _count(self) -> None:
        if self._trunk is not None:
            self.broadcasts = self._trunk.broadcasts

    def _tell(
        self,
        tell: Callable[[int, int, int, int, int, int, int], None],
        frame: Frame,
        broadcasts: int,
        first_ns: int,
        second_ns: int,
        end_ns: int,
    ) -> None:
        self._count()
        broadcasts = self.broadcasts - self._told_broadcasts
        self._told_broadcasts = self.broadcasts
        super()._tell(tell, frame, broadcasts, first_ns, second_ns, end_ns)


class _NodeWriter(RingWriter):
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
        if rank not in self._readers:
            return False
        return self._words[self._control.takens[self._readers.index(rank)]] == LEFT

    def is_closed(self) -> bool:
        """Whether the readers were told that there is no more."""
        return bool(self._words[PUBLISHED] & 1)

    def _look(self, now_ns: int) -> None:
        with contextlib.suppress(Closed):  # not all receivers are on this host
            super()._look(now_ns)


class _SourceEnd:
    """What the source writes to: its own ring first, then the broadcast."""

    def __init__(self, ring: _NodeWriter, trunk: Trunk) -> None:
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


class _LeaderEnd:
    """What a leader reads from: the broadcast, into the ring of its host."""

    def __init__(
        self, ring: _NodeWriter, trunk: Trunk, mirror: Mirror | None, src: int, timeout_s: float
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


def _part(peers: Peers, board: Obituaries | None, trunk: Trunk | None) -> None:
    peers.close()
    if board is not None:
        board.close()  # what was posted is out by then, and explains why connections are lost
    if trunk is not None:
        trunk.close()


def _leave(peers: Peers, board: Obituaries, ring: RingWriter | None, trunk: Trunk | None) -> None:
    """A channel went that was neither closed nor broken."""
    if ring is not None:
        ring.abandon(peers.own.rank)
    board.post(peers.own.rank, "it left without closing the channel")
    _part(peers, board, trunk)
