"""All-reduce of small CPU tensors among the ranks of one host: laid down, met once, added up.

And their gathering on the first rank, which is the same without the sum.

Owns one reducer's life, which tensors it takes, and the order of its steps. What lies where is in
`meeting` and `sum_slots`.

    own part -> own slot;  arrive;  await all;  compare what was brought;  add all slots
                                                                           (first rank: join them)

One meeting an operation: slots take turns, see `meeting`. With three ranks and more, large tensors
are added by shares, which takes a second meeting and less memory traffic. What is gathered and
larger than a slot goes in pieces of whole rows, each with a meeting of its own: while the first
rank reads one, the others write the next.
"""

import weakref
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .all_reduce import check_axis, gather_through_group, reduce_through_group
from .brought import NOT_STRIDED, describe_brought, pack_brought, pack_gathered
from .endpoint import at_end_of
from .errors import (
    AllReduceTimeout,
    BrokenChannel,
    CannotShare,
    Closed,
    CommError,
    Mismatch,
    PeerLost,
)
from .guarded_probe import NO_TICKET, GuardedProbe
from .meeting import MAX_RANKS, Meeting
from .peers import Peers
from .probe import CollectiveProbe
from .segment import PAGE
from .sharing import gather_reasons, share
from .strides import refuse_overlap
from .sum_slots import SumSlots, make_sum_segment

# Those that Gloo carries: whether a tensor can be summed or gathered must not depend on its size.
SUMMED = frozenset(
    {
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.uint8, torch.int8, torch.int32, torch.int64,
    }
)  # fmt: skip
# Measured with 4 ranks: by shares 1.2x as fast at 256 KiB, 1.4x at 1 MiB, slower below 64 KiB. With
# 2 ranks the second meeting and the copy take what the halved sum gains, at every size.
_SHARED_BYTES = 128 << 10
_SHARING_RANKS = 3


class SharedMemoryAllReduce:
    """See `AllReduce`; `open_all_reduce` opens it. Opening is a collective call."""

    name = "shared-memory"

    def __init__(
        self,
        group: dist.ProcessGroup,
        peers: Peers,
        probe: CollectiveProbe | None,
        timeout_s: float,
        spin: float,
        max_bytes: int,
    ) -> None:
        """`peers` is this reducer's own from here on. Raises CannotShare, on all ranks."""
        ranks = peers.ranks
        if not peers.on_one_host:
            hosts = {rank: peer.host for rank, peer in peers.by_rank.items()}
            raise CannotShare(f"the ranks are on different hosts: {hosts}")
        if len(ranks) > MAX_RANKS:
            raise CannotShare(f"{len(ranks)} ranks share the host; {MAX_RANKS} can meet at most")
        slot_bytes = -(-max_bytes // PAGE) * PAGE
        segment = share(group, peers, ranks[0], partial(make_sum_segment, len(ranks), slot_bytes))
        reason = None
        try:
            self._meeting = Meeting(segment, ranks, peers, spin)
            index = ranks.index(peers.own.rank)
            self._slots = SumSlots(segment, index, len(ranks), slot_bytes)
        except OSError as error:  # of address space
            reason = f"cannot map the memory: {error}"
        failed = gather_reasons(group, peers, reason)
        segment.close()  # all have it, or nobody will
        if failed:
            raise CannotShare("the ranks cannot share memory: " + "; ".join(failed))
        self._group_reference = weakref.ref(group)
        self._group_text = group.group_desc if group.group_desc != "undefined" else group.group_name
        self._peers = peers
        self._probe = None if probe is None else GuardedProbe(probe)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._alone = len(ranks) == 1
        self._is_first = index == 0
        self._turn = 0  # of the slots
        self._shares = len(ranks) >= _SHARING_RANKS
        self._error: BaseException | None = None
        self._refuses = False
        self.operations = 0  # so far, of tensors on the CPU, gathered ones too
        # When this object goes without having closed, or this process ends: the others are told.
        self._departure = at_end_of(self, self._meeting.leave, peers.own.rank)

    def all_reduce(self, tensor: Tensor) -> None:
        if self._refuses:
            self._refuse()
        if not tensor.is_cpu:
            dist.all_reduce(tensor, group=self._group)
            return
        is_strided = tensor.layout is torch.strided
        is_contiguous = is_strided and tensor.is_contiguous()
        if is_strided and not is_contiguous:
            refuse_overlap(tensor)
        dtype = tensor.dtype
        if not is_strided or dtype not in SUMMED or tensor.nbytes > self._max_bytes:
            self._meet_for_group(tensor, gathers=False)
            reduce_through_group(tensor, self._group)
            return
        nbytes = tensor.nbytes
        probe, ticket = self._probe, NO_TICKET
        if probe is not None:
            ticket = probe.begin("all_reduce", self._group, nbytes, dtype)
        try:
            self.operations += 1
            if is_contiguous and not _cannot_be_written(tensor):
                self._sum(tensor, nbytes)
            else:
                # On all ranks the same loop over the elements: it decides the bits of a NaN.
                with torch.inference_mode():
                    total = tensor.detach().contiguous()
                    self._sum(total, nbytes)
                    if total.data_ptr() != tensor.data_ptr():
                        tensor.detach().copy_(total)
        except BaseException as error:
            self._failed(error, ticket)
            raise
        if probe is not None:
            probe.end(ticket)

    def gather(self, tensor: Tensor) -> Tensor | None:
        if self._refuses:
            self._refuse()
        check_axis(tensor)
        if not tensor.is_cpu:
            return gather_through_group(tensor, self._group)
        dtype = tensor.dtype
        row_bytes = tensor.shape[-1] * dtype.itemsize
        is_strided = tensor.layout is torch.strided
        if not is_strided or dtype not in SUMMED or row_bytes > self._max_bytes:
            self._meet_for_group(tensor, gathers=True)
            return gather_through_group(tensor, self._group)
        probe, ticket = self._probe, NO_TICKET
        if probe is not None:
            whole_bytes = tensor.nbytes * len(self._peers.ranks)
            ticket = probe.begin("gather", self._group, whole_bytes, dtype)
        try:
            self.operations += 1
            with torch.no_grad():
                joined = self._join(tensor.detach().contiguous(), row_bytes)
        except BaseException as error:
            self._failed(error, ticket)
            raise
        if probe is not None:
            probe.end(ticket)
        return joined

    def close(self) -> None:
        if self._departure.detach() is None:
            return  # it is closed
        self._refuses = True
        lost = self._error.rank if isinstance(self._error, PeerLost) else None
        if lost is None and self._error is not None and not isinstance(self._error, Closed):
            lost = self._peers.own.rank  # the others wait for what this rank does not do any more
        self._meeting.leave(lost)
        self._peers.close()

    def _sum(self, tensor: Tensor, nbytes: int) -> None:
        if self._alone:
            return
        slots, turn = self._slots, self._next_turn()
        brought = pack_brought(nbytes, tensor.dtype)
        if self._shares and nbytes >= _SHARED_BYTES:
            self._sum_by_shares(tensor, brought, turn)
            return
        whole = slots.whole(tensor, turn)
        whole.own.copy_(tensor)
        self._meet(brought, turn)
        slots.add_up(whole, tensor)

    def _sum_by_shares(self, tensor: Tensor, brought: int, turn: int) -> None:
        meeting, slots = self._meeting, self._slots
        flat = tensor.view(-1)
        shared = slots.shared(flat, turn)
        shared.own.copy_(flat)
        self._meet(brought, turn)
        slots.add_up_own(shared, flat)
        meeting.arrive()
        meeting.await_all(self._timeout_s)
        slots.collect(shared, flat)

    def _join(self, tensor: Tensor, row_bytes: int) -> Tensor | None:
        """Of a contiguous tensor; the first rank's own part need not go through its slot."""
        if self._alone:
            return tensor.clone()
        slots = self._slots
        size = tensor.shape[-1]
        rows = tensor.view(-1, size) if size else tensor.new_empty(0, 0)
        brought = pack_gathered(tensor)
        count = len(self._peers.ranks)
        joined = rows.new_empty(len(rows), size * count) if self._is_first else None
        step = max(self._max_bytes // max(row_bytes, 1), 1)
        for begin in range(0, max(len(rows), 1), step):  # without rows they still meet
            piece, turn = rows[begin : begin + step], self._next_turn()
            whole = slots.whole(piece, turn)
            if joined is None:
                whole.own.copy_(piece)
                self._meet(brought, turn)
            else:
                self._meet(brought, turn)
                torch.cat([piece, *whole.slots[1:]], -1, out=joined[begin : begin + step])
        return None if joined is None else joined.view(*tensor.shape[:-1], size * count)

    def _meet_for_group(self, tensor: Tensor, *, gathers: bool) -> None:
        """Before the group carries a tensor on the CPU, so that ranks that differ are told."""
        self.operations += 1
        flags = 0 if tensor.layout is torch.strided else NOT_STRIDED
        nbytes = tensor.numel() * tensor.element_size()
        brought = (
            pack_gathered(tensor, flags) if gathers else pack_brought(nbytes, tensor.dtype, flags)
        )
        try:
            if not self._alone:
                self._meet(brought, self._next_turn())
        except BaseException as error:
            self._failed(error, NO_TICKET)
            raise

    def _next_turn(self) -> int:
        turn = self._turn
        self._turn = turn ^ 1
        return turn

    def _meet(self, brought: int, turn: int) -> None:
        """Return once all are here; what they wrote to their slots before is there to be read.

        Raises Mismatch, on all ranks, unless all have brought the same.
        """
        meeting = self._meeting
        meeting.bring(brought, turn)
        meeting.arrive()
        meeting.await_all(self._timeout_s)
        found = meeting.brought(turn)
        if found.count(brought) != len(found):
            told = [
                f"rank {rank} brought {describe_brought(one)}"
                for rank, one in zip(self._peers.ranks, found, strict=True)
            ]
            raise Mismatch(f"{self._told()}: {', '.join(told)}")

    def _told(self) -> str:
        return f"all-reduce {self.operations} of group {self._group_text}"

    def _failed(self, error: BaseException, ticket: int) -> None:
        """What follows from an error: the ranks are out of step, unless all have the same one."""
        if isinstance(error, AllReduceTimeout):
            error.args = (f"{self._told()}: {error}",)
        if not isinstance(error, Mismatch):
            self._error = error
            self._refuses = True
        if self._probe is not None:
            self._probe.fail(ticket, error)

    def _refuse(self) -> NoReturn:
        if self._error is not None:
            raise BrokenChannel(f"an earlier error left the ranks out of step: {self._error!r}")
        raise Closed("the all-reduce is closed")

    @property
    def _group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup | None = self._group_reference()
        if group is None:
            raise CommError("the process group was destroyed before the all-reduce was closed")
        return group


def _cannot_be_written(tensor: Tensor) -> bool:
    """Whether it needs gradients, or is of inference mode and this is outside of that."""
    return tensor.requires_grad or (tensor.is_inference() and not torch.is_inference_mode_enabled())
