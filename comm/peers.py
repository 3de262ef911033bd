"""Who the ranks of a group are, which of them is gone, and how the others are.

Owns the one exchange at which a channel opens: each rank tells its host, process and what it was
asked to open. Afterwards the processes of this host are watched through pidfds: a look at all of
them is one system call, and neither a reused pid nor a zombie passes for alive. Knows nothing of
frames.
"""

import hashlib
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

_SETTLE_S = 1.0  # a socket closes a moment before its process counts as gone
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device",
    "T": "stopped",
    "t": "stopped by a debugger",
    "I": "idle",
}


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank of the group. `host` is equal where processes can see one another in /proc."""

    rank: int
    host: int
    pid: int
    started: int  # clock ticks after boot: a reused pid has another
    told: dict[str, int] = field(default_factory=dict)

    def state(self) -> str | None:
        """What its process does, in a word; None: it is no more."""
        try:
            letter, started = _stat(self.pid)
        except FileNotFoundError:
            return None
        except ProcessLookupError:  # it went between open and read
            return None
        if letter in "ZX" or started != self.started:
            return None
        return _STATES.get(letter, f"in state {letter}")


class Peers:
    """All ranks of a group, seen from one of them."""

    def __init__(self, peers: list[Peer], own_rank: int) -> None:
        self.by_rank = {peer.rank: peer for peer in peers}
        self.own = self.by_rank[own_rank]
        self.ranks = list(self.by_rank)
        self.neighbours = [
            peer for peer in peers if peer.host == self.own.host and peer.rank != own_rank
        ]
        self.on_one_host = len(self.neighbours) + 1 == len(peers)
        self._poll = select.poll()
        self._watched: dict[int, int] = {}  # pidfd: rank
        self._gone: list[int] = []
        for peer in self.neighbours:
            self._watch(peer)

    @classmethod
    def exchange(
        cls,
        group: dist.ProcessGroup,
        device: torch.device,
        agreement: Mapping[str, int],
        told: Mapping[str, int] | None = None,
    ) -> "Peers":
        """One all_gather. Every rank must bring an equal `agreement`, or all raise ValueError.

        `told` has the same names on every rank; what each brought is in `Peer.told`.
        """
        told = told or {}
        _, started = _stat(os.getpid())
        fields = [_host_key(), os.getpid(), started, *agreement.values(), *told.values()]
        own = torch.tensor(fields, dtype=torch.int64, device=device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, own, group=group)
        ranks = dist.get_process_group_ranks(group)
        table = [row.tolist() for row in rows]
        for column, name in enumerate(agreement, start=3):
            if len({row[column] for row in table}) > 1:
                brought = {rank: row[column] for rank, row in zip(ranks, table, strict=True)}
                raise ValueError(f"the ranks disagree about {name}: {brought}")
        first = 3 + len(agreement)
        peers = [
            Peer(rank, row[0], row[1], row[2], dict(zip(told, row[first:], strict=True)))
            for rank, row in zip(ranks, table, strict=True)
        ]
        return cls(peers, dist.get_rank())

    def gone(self) -> int | None:
        """The first rank of this host whose process is no more; about a microsecond."""
        if not self._gone:
            for fd, _ in self._poll.poll(0):
                self._gone.append(self._watched[fd])
                self._unwatch(fd)
        return self._gone[0] if self._gone else None

    def excuse(self, rank: int) -> None:
        """`rank` has left in order: from now on its process may end."""
        for fd, watched in list(self._watched.items()):
            if watched == rank:
                self._unwatch(fd)
        if rank in self._gone:
            self._gone.remove(rank)

    def find_gone(self) -> int | None:
        """The same after a connection was lost: waits a moment for the process to end."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            rank = self.gone()
            if rank is not None or time.monotonic() >= deadline:
                return rank
            time.sleep(0.01)

    def describe(self, rank: int) -> str:
        """What can be said of a rank that is waited for."""
        peer = self.by_rank[rank]
        if peer.host != self.own.host:
            return "on another host"
        state = peer.state()
        return f"process {peer.pid} is {state}" if state else f"process {peer.pid} has ended"

    def is_near(self, rank: int) -> bool:
        """Whether the process of `rank` can be seen from here; this rank's own can."""
        return self.by_rank[rank].host == self.own.host

    def close(self) -> None:
        """Stop watching; `gone` finds nobody any more."""
        for fd in list(self._watched):
            self._unwatch(fd)

    def __del__(self) -> None:
        self.close()

    def _watch(self, peer: Peer) -> None:
        try:
            fd = os.pidfd_open(peer.pid)
        except ProcessLookupError:
            self._gone.append(peer.rank)
            return
        self._watched[fd] = peer.rank
        self._poll.register(fd, select.POLLIN)
        if peer.state() is None:  # the pid had changed hands before it could be watched
            self._unwatch(fd)
            self._gone.append(peer.rank)

    def _unwatch(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._watched[fd]
        os.close(fd)


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])


def _host_key() -> int:
    """A number that processes share exactly if they share a kernel and a pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    namespace = os.readlink("/proc/self/ns/pid")
    digest = hashlib.blake2b((boot + namespace).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
