"""All-reduces of small CPU tensors: through shared memory, and by the process group over Gloo.

Owns what is measured of them, and how the stamps of several ranks become times. Knows nothing of
medians.

Before every all-reduce all ranks meet through a page of shared memory. It takes from the moment at
which the last rank begins to the one at which the last rank has the sum: `perf_counter_ns` reads
one clock for all processes of a host. Blocks of one method, methods taking turns; "gloo-again" is
Gloo once more, to show what a difference has to exceed to be one. The sums are of zeros: no tensor
has to be filled in between, which would be in the caches then.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from onecast.comm import open_all_reduce
from onecast.comm.testing import run_ranks

from .shared_page import Gate

SHM, GLOO, GLOO_AGAIN = "all-reduce-shm", "all-reduce-gloo", "all-reduce-gloo-again"
METHODS = (SHM, GLOO, GLOO_AGAIN)
SIZES = {f"{nbytes >> 10} KiB": nbytes for nbytes in (1 << shift for shift in range(10, 21, 2))}
METRIC = "all-reduce us"

_BLOCK, _WARMUP = 25, 5  # timed ones of a method in a row; untimed before them
_TIMEOUT_S = 120.0

Times = dict[tuple[str, str], list[float]]  # by size and method: us


class Stamps(NamedTuple):
    begins: list[int]
    ends: list[int]


def time_all_reduces(ranks: int, steps: int, timeout_s: float = 1800.0) -> Times:
    """Start the ranks, measure each size and method `steps` times, and join what they saw."""
    stamps = run_ranks(_measure, ranks, steps, timeout_s=timeout_s)
    times: Times = {}
    for key in stamps[0]:
        begins = zip(*(one[key].begins for one in stamps), strict=True)
        ends = zip(*(one[key].ends for one in stamps), strict=True)
        times[key] = [
            (max(end) - max(begin)) / 1e3 for begin, end in zip(begins, ends, strict=True)
        ]
    return times


def _measure(rank: int, steps: int) -> dict[tuple[str, str], Stamps]:
    """On one rank."""
    gate = Gate()
    reducer = open_all_reduce(transport="shared-memory", timeout_s=_TIMEOUT_S)
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        SHM: reducer.all_reduce,
        GLOO: lambda tensor: dist.all_reduce(tensor),
        GLOO_AGAIN: lambda tensor: dist.all_reduce(tensor),
    }
    clock = time.perf_counter_ns
    found = {}
    for size, nbytes in SIZES.items():
        tensor = torch.zeros(nbytes // 4)
        stamps = {method: Stamps([], []) for method in METHODS}
        for method, timed in _turns(METHODS, steps):
            call = calls[method]
            gate.meet()
            begin = clock()
            call(tensor)
            end = clock()
            if timed:
                stamps[method].begins.append(begin)
                stamps[method].ends.append(end)
        found.update({(size, method): stamps[method] for method in METHODS})
    reducer.close()
    return found


def _turns(methods: Sequence[str], steps: int) -> Iterator[tuple[str, bool]]:
    """The method of each all-reduce, and whether it is timed."""
    for first in range(0, steps, _BLOCK):
        size = min(_BLOCK, steps - first)
        for method in methods:
            for turn in range(-_WARMUP, size):
                yield method, turn >= 0
