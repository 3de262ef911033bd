"""Where the ranks of a host lay down what is to be summed, and the summing.

Owns the slots, two for each rank that take turns, the views of them by shape and dtype, and the
order of additions. Knows nothing of who is there when: `shared_all_reduce` calls what it may.

    control pages of `meeting`
    slots of turn 0:  rank 0 | rank 1 | ...       `slot_bytes` each
    slots of turn 1:  rank 0 | rank 1 | ...

A sum is ((slot 0 + slot 1) + slot 2) + ..., by torch's own addition in the tensor's dtype, rounded
after each: the same bits on every rank, and those of a plain loop over the ranks' tensors (but for
those of a NaN, which depend on where in a loop of torch's an element comes). Each rank adds all of
it, or, with a large tensor, its share, which the others then copy.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .meeting import control_bytes
from .segment import PAGE, Segment

_KEPT = 64  # views of so many shapes are kept; decode steps repeat a handful
_SHARE = 64  # bytes; shares of a sum begin at multiples, so that no cache line has two writers


class Whole(NamedTuple):
    """The slots of one turn, as tensors of one shape, by rank."""

    own: Tensor
    slots: list[Tensor]


class Shared(NamedTuple):
    """The same, flat, and divided: the rank's own share of each slot, and each rank's share."""

    own: Tensor
    own_share: list[Tensor]  # of every slot
    shares: list[Tensor]  # of rank i in the slot of rank i
    bounds: list[tuple[int, int]]  # of the shares, in elements


class SumSlots:
    """The slots as one rank, `index` of `size`, sees them."""

    def __init__(self, segment: Segment, index: int, size: int, slot_bytes: int) -> None:
        self._index = index
        self._size = size
        self._slot_bytes = slot_bytes
        memory = segment.map(control_bytes(size), 2 * size * slot_bytes)
        with torch.inference_mode(False):  # or they could not be written outside of it
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._typed: dict[torch.dtype, Tensor] = {}
        self._wholes: dict[tuple[torch.Size, torch.dtype], tuple[Whole, Whole]] = {}
        self._shareds: dict[tuple[int, torch.dtype], tuple[Shared, Shared]] = {}

    def whole(self, tensor: Tensor, turn: int) -> Whole:
        """Slots in the shape of `tensor`, which fits."""
        key = tensor.shape, tensor.dtype
        both = self._wholes.get(key)
        if both is None:
            both = self._make_whole(*key, 0), self._make_whole(*key, 1)
            _keep(self._wholes, key, both)
        return both[turn]

    def add_up(self, whole: Whole, tensor: Tensor) -> None:
        """The sum of all slots, into `tensor`, whose slot holds what it holds."""
        slots = whole.slots
        first, second = slots[0], slots[1]
        # This rank's own part need not be read from its slot.
        if self._index == 0:
            first = tensor
        elif self._index == 1:
            second = tensor
        torch.add(first, second, out=tensor)
        for slot in slots[2:]:
            tensor.add_(slot)

    def shared(self, flat: Tensor, turn: int) -> Shared:
        """Slots for a tensor of one axis, divided among the ranks."""
        key = flat.numel(), flat.dtype
        both = self._shareds.get(key)
        if both is None:
            both = self._make_shared(*key, 0), self._make_shared(*key, 1)
            _keep(self._shareds, key, both)
        return both[turn]

    def add_up_own(self, shared: Shared, flat: Tensor) -> None:
        """The sum of this rank's share, into `flat` and into its slot."""
        begin, end = shared.bounds[self._index]
        result, parts = flat[begin:end], shared.own_share
        torch.add(parts[0], parts[1], out=result)
        for part in parts[2:]:
            result.add_(part)
        parts[self._index].copy_(result)

    def collect(self, shared: Shared, flat: Tensor) -> None:
        """The shares of the others, into `flat`."""
        for rank, (begin, end) in enumerate(shared.bounds):
            if rank != self._index:
                flat[begin:end].copy_(shared.shares[rank])

    def _make_whole(self, shape: torch.Size, dtype: torch.dtype, turn: int) -> Whole:
        slots = [self._slot(rank, turn, shape.numel(), dtype) for rank in range(self._size)]
        with torch.inference_mode(False):
            views = [slot.view(shape) for slot in slots]
        return Whole(views[self._index], views)

    def _make_shared(self, numel: int, dtype: torch.dtype, turn: int) -> Shared:
        size, step = self._size, max(_SHARE // dtype.itemsize, 1)
        cuts = [numel * rank // size // step * step for rank in range(size)] + [numel]
        bounds = list(pairwise(cuts))
        slots = [self._slot(rank, turn, numel, dtype) for rank in range(size)]
        begin, end = bounds[self._index]
        with torch.inference_mode(False):
            own_share = [slot[begin:end] for slot in slots]
            shares = [slot[b:e] for slot, (b, e) in zip(slots, bounds, strict=True)]
        return Shared(slots[self._index], own_share, shares, bounds)

    def _slot(self, rank: int, turn: int, numel: int, dtype: torch.dtype) -> Tensor:
        assert numel * dtype.itemsize <= self._slot_bytes
        with torch.inference_mode(False):
            typed = self._typed.get(dtype)
            if typed is None:
                typed = self._typed[dtype] = self._memory.view(dtype)
            begin = (turn * self._size + rank) * self._slot_bytes // dtype.itemsize
            return typed[begin : begin + numel]


def make_sum_segment(size: int, slot_bytes: int) -> Segment:
    """A segment for `size` ranks; raises CannotShare if there is not so much memory."""
    assert slot_bytes % PAGE == 0
    return Segment.create(control_bytes(size) + 2 * size * slot_bytes)


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _KEPT:
        del cache[next(iter(cache))]  # the oldest
    cache[key] = value
