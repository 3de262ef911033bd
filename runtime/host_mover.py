"""Moves blocks between pools that both lie in host memory: one memcpy a run, done on return.

Owns how bytes are copied there. Knows nothing of layers, nor of what blocks hold.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .block_mover import Pairs
from .block_runs import run_columns

Pool: TypeAlias = tuple[np.ndarray[Any, np.dtype[np.uint8]], memoryview]

# From here on through numpy, which lets other threads run meanwhile. Tried for shorter runs, where
# the call counts: numpy (8% slower at 32 KiB), ctypes.memmove (10%), views made beforehand (9%: the
# copies evict them from the caches), threads (slower: they pass Python's lock on at every run),
# index_select and index_copy_ (the bytes go twice). Tensor.copy_ costs 3 us a call, and with
# several threads waits for the slowest: on busy cores it took ten times as long.
_LONG_BYTES = 1 << 20


class HostMover:
    """A `BlockMover` of pools `[num_blocks, bytes per block]` (uint8, contiguous, CPU).

    Moves are over when a call returns, so there is nothing to wait for.
    """

    def __init__(self, device_rows: Tensor, host_rows: Tensor) -> None:
        for rows in (device_rows, host_rows):
            assert rows.dtype == torch.uint8 and rows.is_cpu and rows.is_contiguous()
        assert device_rows.shape[1] == host_rows.shape[1]
        self._block_bytes = device_rows.shape[1]
        self._device, self._host = _bytes(device_rows), _bytes(host_rows)

    def swap_out(self, step: int, pairs: Pairs) -> None:
        """As the protocol says."""
        self._move(self._device, self._host, pairs)

    def swap_in(self, step: int, pairs: Pairs) -> None:
        """As the protocol says."""
        self._move(self._host, self._device, pairs)

    def copy(self, pairs: Pairs) -> None:
        """As the protocol says."""
        self._move(self._device, self._device, pairs)

    def wait(self, step: int) -> None:
        """Swaps are over already."""

    def close(self) -> None:
        """Nothing is under way, and the pools are the cache's."""

    def _move(self, source: Pool, destination: Pool, pairs: Pairs) -> None:
        (from_array, from_view), (to_array, to_view) = source, destination
        runs = run_columns(pairs, self._block_bytes)
        for start, target, size in zip(*runs, strict=True):
            if size < _LONG_BYTES:
                to_view[target : target + size] = from_view[start : start + size]
            else:
                to_array[target : target + size] = from_array[start : start + size]


def _bytes(rows: Tensor) -> Pool:
    """A pool's bytes twice: as an array, and as the view whose slices cost least."""
    array = rows.view(-1).numpy()
    return array, array.data
