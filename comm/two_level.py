"""A channel for ranks on several hosts: one broadcast among hosts, shared memory on each.

Owns the opening, and who is told when a rank is gone. The ranks find their hosts by themselves
(`Peer.host`); the leader of a host is the source on its own, and the lowest rank elsewhere. What
leaders do with a frame is theirs (`leader_ends`).

                      the one broadcast a frame (`trunk`)
    source, leader  ------------------------------------>  leader
      | ring of its host                                     | ring of its host
      +--> member                                            +--> member
      +--> member                                            +--> member

A frame is encoded once, in a slot of the ring on the source's host. From there it is broadcast, and
it arrives in a slot of each other ring, where it is decoded as on one host: nothing is copied on
the way.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .channel import Frame
from .endpoint import at_end_of
from .errors import CannotShare, Closed, PeerLost
from .far_peers import FarPeers, find_leaders, open_board
from .leader_ends import LeaderEnd, NodeWriter, SourceEnd
from .lookout import Lookout
from .obituaries import Obituaries
from .peers import Peers
from .private_group import PrivateGroup
from .ring_reader import RingReader
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
    _ring: NodeWriter | None = None
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
            ring = NodeWriter(segment, readers, peers, self._timeout_s, self._mirror)
            peers.has_left = ring.has_left
            lookout = Lookout(peers, board, spin)
            trunk = Trunk(leaders, [*hosts], self.src, self._origin, lookout, self._timeout_s)
            self._ring, self._trunk = ring, trunk
            self._writer = SourceEnd(ring, trunk)
            self._reader = LeaderEnd(ring, trunk, self._mirror, self.src, self._timeout_s)
        else:
            mirror, src = self._mirror, self.src
            self._reader = RingReader(segment, readers, leader, peers, spin, mirror, src)
        # When this object goes, however it goes: the others are told.
        self._leave = at_end_of(self, _leave, peers, board, self._ring, self._trunk)

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


def _part(peers: Peers, board: Obituaries | None, trunk: Trunk | None) -> None:
    peers.close()
    if board is not None:
        board.close()  # what was posted is out by then, and explains why connections are lost
    if trunk is not None:
        trunk.close()


def _leave(peers: Peers, board: Obituaries, ring: NodeWriter | None, trunk: Trunk | None) -> None:
    """A channel went that was neither closed nor broken."""
    if ring is not None:
        ring.abandon(peers.own.rank)
    board.post(peers.own.rank, "it left without closing the channel")
    _part(peers, board, trunk)
