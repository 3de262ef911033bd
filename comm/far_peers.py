"""Peers of several hosts, as those see them who wait for a ring on one.

Owns the joining of what this host shows, whose processes end before its eyes, and what the others
write on the board (`obituaries`). Knows nothing of frames.
"""

import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

from .errors import PeerLost
from .obituaries import Obituaries
from .peers import Peer, Peers

# For what was sent before a rank went to come through a leader, whose wait for a broadcast gives it
# less time than that.
_GRACE_NS = 300_000_000


class FarPeers(Peers):
    """All ranks of a group on several hosts.

    `has_left` tells who has left in order, where a rank can know that: `gone` does not speak of
    them. `board` is what it looks at too, once there is one.
    """

    def __init__(self, peers: list[Peer], own_rank: int) -> None:
        super().__init__(peers, own_rank)
        self.has_left: Callable[[int], bool] = lambda rank: False
        self.board: Obituaries | None = None
        self._heard_ns = 0

    def gone(self) -> int | None:
        """As the base's; raises PeerLost for what others tell, as it may be nameless."""
        while (rank := super().gone()) is not None and self.has_left(rank):
            self.excuse(rank)
        if rank is None and self.board is not None and self.board.heard is not None:
            now_ns = time.monotonic_ns()
            self._heard_ns = self._heard_ns or now_ns
            if now_ns - self._heard_ns > _GRACE_NS:
                raise PeerLost(*self.board.heard)
        return rank


def open_board(number: int, peers: Peers) -> Obituaries:
    """The board of a channel whose ranks are on several hosts; the same number on all of them."""
    # What torch itself uses wherever it needs the store; it has no public name.
    store = dist.distributed_c10d._get_default_store()
    return Obituaries(store, number, peers.own.rank)


def find_leaders(peers: Peers, src: int) -> Mapping[int, list[int]]:
    """The ranks of each host by its leader: the source on its host, elsewhere the lowest rank."""
    hosts: dict[int, list[int]] = {}
    for rank, peer in peers.by_rank.items():
        hosts.setdefault(peer.host, []).append(rank)
    return {src if src in ranks else min(ranks): ranks for ranks in hosts.values()}
