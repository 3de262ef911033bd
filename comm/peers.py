"""Who the ranks of a group are, and which of them is gone.

Owns the one exchange at which a channel opens: each rank tells its host, process and what it was
asked to open. Afterwards a lost connection, which Gloo reports without a rank, can be given one:
processes of this host are looked up in /proc. Knows nothing of frames.
"""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_SETTLE_S = 1.0  # a socket closes a moment before its process counts as gone


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank of the group. `host` is equal where processes can see one another in /proc."""

    rank: int
    host: int
    pid: int
    started: int  # clock ticks after boot: a reused pid has another

    def alive(self) -> bool:
        try:
            state, started = _stat(self.pid)
        except FileNotFoundError:
            return False
        except ProcessLookupError:  # it went between open and read
            return False
        return state not in "ZX" and started == self.started


class Peers:
    """All ranks of a group."""

    def __init__(self, peers: list[Peer], own_rank: int) -> None:
        self._host = next(peer.host for peer in peers if peer.rank == own_rank)
        self.ranks = [peer.rank for peer in peers]
        self._neighbours = [
            peer for peer in peers if peer.host == self._host and peer.rank != own_rank
        ]
        self.on_one_host = len(self._neighbours) + 1 == len(peers)

    @classmethod
    def exchange(
        cls, group: dist.ProcessGroup, device: torch.device, agreement: dict[str, int]
    ) -> "Peers":
        """One all_gather. Every rank must bring an equal `agreement`, or all raise ValueError."""
        _, started = _stat(os.getpid())
        own = torch.tensor([_host_key(), os.getpid(), started, *agreement.values()], device=device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, own, group=group)
        ranks = dist.get_process_group_ranks(group)
        table = [row.tolist() for row in rows]
        for column, name in enumerate(agreement, start=3):
            if len({row[column] for row in table}) > 1:
                told = {rank: row[column] for rank, row in zip(ranks, table, strict=True)}
                raise ValueError(f"the ranks disagree about {name}: {told}")
        peers = [Peer(rank, *row[:3]) for rank, row in zip(ranks, table, strict=True)]
        return cls(peers, dist.get_rank())

    def gone(self) -> int | None:
        """The first rank of this host whose process is no more."""
        return next((peer.rank for peer in self._neighbours if not peer.alive()), None)

    def find_gone(self) -> int | None:
        """The same after a connection was lost: waits a moment for the process to end."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            rank = self.gone()
            if rank is not None or time.monotonic() >= deadline:
                return rank
            time.sleep(0.01)


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
