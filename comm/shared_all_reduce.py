"""All-reduce of small CPU tensors among the ranks of one host: laid down, met once, added up.

Owns one reducer's life, which tensors it takes, and the order of its steps. What lies where is in
`meeting` and `sum_slots`.

    own part -> own slot;  arrive;  await all;  compare what was brought;  add all slots

One meeting an operation: slots take turns, see `meeting`. With three ranks and more, large tensors
are added by shares, which takes a second meeting and less memory traffic.
"""

import logging
import weakref
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .all_reduce import reduce_through_group
from .dtypes import TENSOR_DTYPES
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
from .meeting import MAX_RANKS, Meeting
from .peers import Peers
from .probe import CollectiveProbe
from .segment import PAGE
from .sharing import gather_reasons, share
from .sum_slots import SumSlots, make_sum_segment

log = logging.getLogger(__name__)

SUMMED = frozenset(
    {
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    }
)  # fmt: skip
# Measured with 4 ranks: by shares 1.2x as fast at 256 KiB, 1.4x at 1 MiB, slower below 64 KiB. With
# 2 ranks the second meeting and the copy take what the halved sum gains, at every size.
_SHARED_BYTES = 128 << 10
_SHARING_RANKS = 3

_CODES = {dtype: code for code, dtype in enumerate(TENSOR_DTYPES, start=1)}
_OTHER_DTYPE, _NOT_STRIDED, _CODE_BITS = 0, 128, 8


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
        self._probe = probe
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._alone = len(ranks) == 1
        self._shares = len(ranks) >= _SHARING_RANKS
        self._error: BaseException | None = None
        self._refuses = False
        self.operations = 0  # so far, of tensors on the CPU
        # When this object goes without having closed, or this process ends: the others are told.
        self._departure = at_end_of(self, self._meeting.leave, peers.own.rank)

    def all_reduce(self, tensor: Tensor) -> None:
        if self._refuses:
            self._refuse()
        if not tensor.is_cpu:
            dist.all_reduce(tensor, group=self._group)
            return
        dtype = tensor.dtype
        if tensor.layout is not torch.strided or dtype not in SUMMED:
            self._leave_to_group(tensor)
            return
        nbytes = tensor.nbytes
        if nbytes > self._max_bytes:
            self._leave_to_group(tensor)
            return
        ticket = 0
        if self._probe is not None:
            ticket = self._begin(nbytes, dtype)
        try:
            if tensor.is_contiguous() and not _cannot_be_written(tensor):
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
        if self._probe is not None:
            self._end(ticket)

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
        turn = self.operations & 1
        self.operations += 1
        if self._alone:
            return
        meeting, slots = self._meeting, self._slots
        brought = nbytes << _CODE_BITS | _CODES[tensor.dtype]
        if self._shares and nbytes >= _SHARED_BYTES:
            self._sum_by_shares(tensor, brought, turn)
            return
        whole = slots.whole(tensor, turn)
        whole.own.copy_(tensor)
        meeting.bring(brought, turn)
        meeting.arrive()
        meeting.await_all(self._timeout_s)
        self._compare(brought, turn)
        slots.add_up(whole, tensor)

    def _sum_by_shares(self, tensor: Tensor, brought: int, turn: int) -> None:
        meeting, slots = self._meeting, self._slots
        flat = tensor.view(-1)
        shared = slots.shared(flat, turn)
        shared.own.copy_(flat)
        meeting.bring(brought, turn)
        meeting.arrive()
        meeting.await_all(self._timeout_s)
        self._compare(brought, turn)
        slots.add_up_own(shared, flat)
        meeting.arrive()
        meeting.await_all(self._timeout_s)
        slots.collect(shared, flat)

    def _leave_to_group(self, tensor: Tensor) -> None:
        """Of a tensor on the CPU: meet as for any, so that ranks that differ are told."""
        turn = self.operations & 1
        self.operations += 1
        nbytes = tensor.numel() * tensor.element_size()
        code = _CODES.get(tensor.dtype, _OTHER_DTYPE)
        if tensor.layout is not torch.strided:
            code |= _NOT_STRIDED
        brought = nbytes << _CODE_BITS | code
        try:
            if not self._alone:
                self._meeting.bring(brought, turn)
                self._meeting.arrive()
                self._meeting.await_all(self._timeout_s)
                self._compare(brought, turn)
        except BaseException as error:
            self._failed(error, 0)
            raise
        reduce_through_group(tensor, self._group)

    def _compare(self, brought: int, turn: int) -> None:
        """Raise Mismatch, on all ranks, unless all have brought the same."""
        found = self._meeting.brought(turn)
        if found.count(brought) != len(found):
            told = [
                f"rank {rank} brought {_describe(one)}"
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
        if self._probe is not None and ticket:
            try:
                self._probe.fail(ticket, error)
            except Exception:
                self._remove_probe()

    def _begin(self, nbytes: int, dtype: torch.dtype) -> int:
        assert self._probe is not None
        try:
            return self._probe.begin("all_reduce", self._group, nbytes, dtype)
        except Exception:
            self._remove_probe()
            return 0

    def _end(self, ticket: int) -> None:
        assert self._probe is not None
        try:
            self._probe.end(ticket)
        except Exception:
            self._remove_probe()

    def _remove_probe(self) -> None:
        log.exception("the probe failed; it is removed")
        self._probe = None

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


def _describe(brought: int) -> str:
    code = brought & (1 << _CODE_BITS) - 1
    names = {number: TENSOR_DTYPES[dtype] for dtype, number in _CODES.items()}
    name = names.get(code & ~_NOT_STRIDED, "another dtype")
    sparse = ", not strided" if code & _NOT_STRIDED else ""
    return f"{brought >> _CODE_BITS:,} bytes of {name}{sparse}"
