"""How the ranks of a host come to share a segment.

Owns the handshake, collective over the whole group: the writer of each host makes a segment, its
readers attach, and all ranks learn whether all could. Knows nothing of what is shared.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .endpoint import meeting_place
from .errors import CannotShare, PeerLost
from .futex import unsupported
from .peers import Peers
from .ring_writer import make_ring_segment
from .segment import Segment

_TEXT_BYTES = 256
_POLL_S = 0.0005


def share_segment(group: dist.ProcessGroup, peers: Peers, writer: int, num_readers: int) -> Segment:
    """The segment that `writer`, a rank of this host, made for a ring with so many readers.

    See `share`.
    """
    return share(group, peers, writer, lambda: make_ring_segment(num_readers))


def share(
    group: dist.ProcessGroup, peers: Peers, writer: int, make: Callable[[], Segment]
) -> Segment:
    """The segment that `writer`, a rank of this host, has made.

    Every rank of the group must call this. Raises CannotShare on all of them, with the reasons, if
    any rank could not make or attach its segment; where `make` raised something that is no matter
    of memory, the writer raises that.
    """
    is_writer = peers.own.rank == writer
    segment: Segment | None = None
    unforeseen: Exception | None = None
    reason = unsupported()
    if is_writer and reason is None:
        try:
            segment = make()
        except (OSError, CannotShare) as error:
            reason = str(error)
        except Exception as error:  # told first: the readers would wait for it
            reason, unforeseen = f"{type(error).__name__}: {error}", error
    told = [segment.fd, segment.key] if segment is not None else [-1, 0]
    table = dict(
        zip(peers.ranks, _gather(group, peers, torch.tensor(told, device="cpu")), strict=True)
    )
    fd, key = table[writer].tolist()
    if not is_writer and reason is None and fd >= 0:
        try:
            segment = Segment.attach(peers.by_rank[writer].pid, fd, key)
        except (OSError, CannotShare) as error:
            reason = f"cannot open the memory of rank {writer}: {error}"
    failed = gather_reasons(group, peers, reason)
    if failed:
        if segment is not None:
            segment.close()
        if unforeseen is not None:
            raise unforeseen
        raise CannotShare("the ranks cannot share memory: " + "; ".join(failed))
    assert segment is not None
    return segment


def gather_reasons(group: dist.ProcessGroup, peers: Peers, reason: str | None) -> list[str]:
    """Which ranks cannot go on, and why; every rank of the group must call this."""
    text = (reason or "").encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    reasons = _gather(group, peers, torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return [
        f"rank {rank}: {bytes(row.tolist()).rstrip(bytes(1)).decode(errors='replace')}"
        for rank, row in zip(peers.ranks, reasons, strict=True)
        if row.any()
    ]


def _gather(group: dist.ProcessGroup, peers: Peers, own: torch.Tensor) -> list[torch.Tensor]:
    """What each rank brought, in the group's order, on the host; raises PeerLost.

    The group's own time-out bounds it.
    """
    own = own.to(meeting_place(group))
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(rows, own, group=group, async_op=True)
    assert work is not None
    while not work.is_completed():
        gone = peers.gone()
        if gone is not None:
            raise PeerLost(gone, "its process ended while the channel was being opened")
        time.sleep(_POLL_S)
    work.wait()
    return [row.cpu() for row in rows]
