"""The seam between the KV cache and what moves its blocks: the host's memory, or a GPU's.

Owns what every mover promises. Knows nothing of pools, layers or sequences.

A step's moves are asked for in this order, each kind at most once:

    swap_out(step, ...), swap_in(step, ...), wait(swaps_awaited), copy(...)
"""

from typing import Any, Protocol, TypeAlias

import numpy as np

# int64 [n, 2], n >= 1, contiguous host memory: (source, destination), all of them in their pools.
# Read-only, and valid during the call alone.
Pairs: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


class BlockMover(Protocol):
    """Moves whole blocks between a device pool and a host pool, and within the device pool.

    The KV cache has checked the pairs' ranges. The driver has checked the rules of `block_ops.py`:
    no block is a destination twice, and none is both read and filled within one call. So a mover
    may carry out the pairs of a call in any order or at once.

    `step` never falls from one call to the next.
    """

    def swap_out(self, step: int, pairs: Pairs) -> None:
        """Copy blocks from the device to the host: pairs (device block, host block).

        Reads what the current stream's earlier work leaves in the device pool. What comes later
        on that stream may write to those blocks only after `wait(step)`.
        """
        ...

    def swap_in(self, step: int, pairs: Pairs) -> None:
        """Copy blocks from the host to the device: pairs (host block, device block).

        Comes after the current stream's earlier work and all earlier swaps. What comes later on
        that stream sees the blocks only after `wait(step)`.
        """
        ...

    def copy(self, pairs: Pairs) -> None:
        """Copy blocks within the device, in the order of the current stream's work."""
        ...

    def wait(self, step: int) -> None:
        """Swaps of steps up to `step` come before what follows on the current stream.

        -1 waits for nothing. Does not make the caller wait for a GPU.
        """
        ...

    def close(self) -> None:
        """Return once no swap is under way any more, and give back what the mover holds."""
        ...
