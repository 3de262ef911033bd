"""The sum over the ranks of a group, in place: through shared memory where they share a host.

Owns the `AllReduce` protocol, the choice of an implementation, and the one that leaves it to
torch.distributed. Knows nothing of how ranks share memory.

    reducer = open_all_reduce(group)    # on every rank of the group
    reducer.all_reduce(tensor)          # likewise, with equal shapes and dtypes
    rows = reducer.gather(tensor)       # likewise: all of them, side by side, on the first rank
    reducer.close()
"""

import logging
import weakref
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .channel import DEFAULT_TIMEOUT_S
from .endpoint import check_group, check_timeout, meeting_place
from .errors import CannotShare
from .peers import Peers
from .probe import CollectiveProbe
from .strides import refuse_overlap
from .waiting import DEFAULT_SPIN, Cadence

log = logging.getLogger(__name__)

TRANSPORTS = ("auto", "shared-memory", "process-group")
# Measured with 2 and with 4 ranks, shared memory is faster than Gloo at every size up to 16 MiB: 50
# times at 16 KiB, 5 times at 4 MiB, 3 times at 16 MiB. What ends it is the memory that it takes.
DEFAULT_MAX_BYTES = 4 << 20


class AllReduce(Protocol):
    """One rank's end. Use it from one thread; several may be open, on one group too."""

    @property
    def name(self) -> str:
        """The transport."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by the sum of what all ranks of the group brought, on each of them.

        A collective call. Raises ValueError, before anything is done, for a strided tensor on the
        CPU that overlaps itself; what torch.distributed raises; and through shared memory PeerLost,
        Mismatch, AllReduceTimeout and Closed.
        """

    def gather(self, tensor: Tensor) -> Tensor | None:
        """What all ranks of the group brought, joined along the last axis, on its first rank.

        A collective call, with equal shapes `[..., n]` and dtypes; gives `[..., ranks * n]` on rank
        0 of the group, in new memory, and None elsewhere. Raises what `all_reduce` does, and
        ValueError for a tensor without an axis.
        """

    def close(self) -> None:
        """Not collective; the others are told. A second call does nothing."""


class ProcessGroupAllReduce:
    """`dist.all_reduce`, whatever the tensor."""

    name = "process-group"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)  # it must go when it is destroyed

    def all_reduce(self, tensor: Tensor) -> None:
        if is_dense_on_cpu(tensor):
            refuse_overlap(tensor)
        reduce_through_group(tensor, self._group())

    def gather(self, tensor: Tensor) -> Tensor | None:
        check_axis(tensor)
        return gather_through_group(tensor, self._group())

    def close(self) -> None:
        """There is nothing to give back."""


def reduce_through_group(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """`dist.all_reduce`, whatever the strides: Gloo sums views with gaps wrongly."""
    if not is_dense_on_cpu(tensor) or (tensor.is_contiguous() and not tensor.is_neg()):
        dist.all_reduce(tensor, group=group)
        return
    with torch.inference_mode():
        total = tensor.detach().resolve_neg().contiguous()
        dist.all_reduce(total, group=group)
        tensor.detach().copy_(total)


def gather_through_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor | None:
    """`dist.gather` to the first rank, joined along the last axis."""
    tensor = tensor.detach().resolve_neg().contiguous()
    if dist.get_rank(group) != 0:
        dist.gather(tensor, group=group, group_dst=0)
        return None
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.gather(tensor, parts, group=group, group_dst=0)
    return torch.cat(parts, -1)


def check_axis(tensor: Tensor) -> None:
    """ValueError for a tensor that cannot be joined to others."""
    if tensor.ndim == 0:
        raise ValueError("gather joins along the last axis: a tensor of 0 axes has none")


def is_dense_on_cpu(tensor: Tensor) -> bool:
    """Whether its bytes can be read and written where they lie."""
    return tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_quantized


def open_all_reduce(
    group: dist.ProcessGroup | None = None,
    *,
    transport: str = "auto",
    probe: CollectiveProbe | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    spin: float = DEFAULT_SPIN,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> AllReduce:
    """Open an all-reduce (sum) for the ranks of `group` (None: the world).

    A collective call: every rank of the group makes it, with equal arguments. "auto" takes shared
    memory where all ranks are on one host, can share, and have a group that takes CPU tensors.
    Sums of more than `max_bytes`, elsewhere than on the CPU, or of a dtype that is not in
    `shared_all_reduce.SUMMED`, still go through the group; a dtype that the group cannot sum is
    refused by it at every size. What is gathered goes through shared memory row by row, up to rows
    of `max_bytes`. Shared memory takes 2 x `max_bytes` for each rank.

    `probe` is told of what torch.distributed does not see. `timeout_s` bounds each wait for other
    ranks. `spin` is the share of a core that waiting for them may take, see `waiting.Cadence`.

    Raises ValueError for arguments that cannot be or differ between ranks, and CannotShare, with
    each rank's reason, if shared memory was asked for and cannot be had.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is {transport!r}; there are: {', '.join(TRANSPORTS)}")
    check_timeout(timeout_s)
    if type(max_bytes) is not int or not 1 <= max_bytes < 1 << 62:
        raise ValueError(f"max_bytes is {max_bytes!r}, it must be an int from 1 to 2**62 - 1")
    Cadence(spin)  # refuses a share that cannot be before any rank has opened anything
    group = check_group(group)
    meet = meeting_place(group)
    agreement = {
        "transport (its place in TRANSPORTS)": TRANSPORTS.index(transport),
        "max_bytes": max_bytes,
    }
    peers = Peers.exchange(group, meet, agreement)
    if transport == "process-group" or (transport == "auto" and meet.type != "cpu"):
        peers.close()
        return ProcessGroupAllReduce(group)
    from .shared_all_reduce import SharedMemoryAllReduce  # here: it imports this module's defaults

    try:
        return SharedMemoryAllReduce(group, peers, probe, timeout_s, spin, max_bytes)
    except CannotShare as error:
        peers.close()
        if transport != "auto":
            raise
        log.info("no shared memory, the process group carries the sums: %s", error)
        return ProcessGroupAllReduce(group)
