"""Memory that all ranks of a host see, and the gate through which they meet before an exchange.

Owns the sharing, for the bench's floors and for the gate. Needs no names in a file system: rank 0
makes an unnamed file, and the others open it through /proc.

    gate:   one cache line per rank, its first 8 bytes the number of exchanges it is ready for
"""

import mmap
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from onecast.comm.futex import is_weakly_ordered, make_fence

_LINE_WORDS = 8  # of 8 bytes, to a cache line
_SPINS = 20_000  # then a waiter lets others run: there may be fewer cores than ranks
_TIMEOUT_S = 60.0


def share_memory(nbytes: int) -> mmap.mmap:
    """Map zeroed memory that all ranks of the world share; a collective call."""
    fd = -1
    place = torch.zeros(2, dtype=torch.int64)
    if dist.get_rank() == 0:
        fd = os.memfd_create("onecast-bench")
        os.ftruncate(fd, nbytes)
        place = torch.tensor([os.getpid(), fd])
    dist.broadcast(place, src=0)
    if fd < 0:
        pid, theirs = place.tolist()
        fd = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
    memory = mmap.mmap(fd, nbytes)
    dist.barrier()  # rank 0's descriptor stays until everyone has opened it
    os.close(fd)
    return memory


def await_word(words: memoryview, index: int, value: int) -> None:
    """Spin until the 64-bit word is `value` or more."""
    for _ in range(_SPINS):
        if words[index] >= value:
            return
    deadline = time.monotonic() + _TIMEOUT_S
    while words[index] < value:
        os.sched_yield()
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_TIMEOUT_S:g} s for word {index} to become {value}")


def ordering_fence() -> Callable[[], object] | None:
    """What must stand between a flag and its data, a call where the CPU reorders; else None."""
    return make_fence() if is_weakly_ordered() else None


class Gate:
    """Receivers say that they are about to receive; the source waits for all of them to be.

    Two stores and loads of shared memory, so that a meeting leaves caches and the scheduler as
    they were; a barrier of the process group would do neither.
    """

    def __init__(self) -> None:
        """A collective call."""
        self._rank = dist.get_rank()
        self._world = dist.get_world_size()
        self._words = memoryview(share_memory(mmap.PAGESIZE)).cast("Q")
        self._count = 0

    def ready(self) -> None:
        """A receiver's side."""
        self._count += 1
        self._words[self._rank * _LINE_WORDS] = self._count

    def meet(self) -> None:
        """All of them wait for one another; for exchanges that have no source."""
        self.ready()
        for rank in range(self._world):
            await_word(self._words, rank * _LINE_WORDS, self._count)

    def await_all(self) -> None:
        """The source's side."""
        self._count += 1
        for rank in range(1, self._world):
            await_word(self._words, rank * _LINE_WORDS, self._count)
