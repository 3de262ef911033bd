"""The step in which each device block was last swapped, and which steps wait for it.

Owns, at the driver, what a step has to wait for before it copies, reads or writes a block: swaps
run beside the forwards, and are awaited only where their blocks are used. Knows nothing of streams
or of sequences.
"""

from typing import Any

import numpy as np

Blocks = np.ndarray[Any, np.dtype[Any]]  # device block numbers, of any shape


class SwapLedger:
    """Told of every step in turn: `begin`, then `touch` with the blocks that the step uses.

    Waiting for the swaps of a step is waiting for all before them, so what a later step needs is
    only looked up while swaps newer than the newest awaited ones are around.
    """

    def __init__(self, num_blocks: int) -> None:
        self._swapped_in_step = np.full(num_blocks, -1, dtype=np.int64)
        self._newest = -1  # step with swaps
        self._step = -1
        self._awaited = -1  # by the steps before this one
        self._awaits = -1  # and this one

    @property
    def open(self) -> bool:
        """Are there swaps that no step has waited for?"""
        return self._newest > self._awaits

    def begin(self, step: int, swap_out: Blocks, swap_in: Blocks) -> None:
        """The pairs `[n, 2]` of a step. It may be begun again: it was drafted, and has changed."""
        if step != self._step:
            self._step, self._awaited = step, self._awaits
        self._awaits = self._awaited
        if len(swap_out) or len(swap_in):
            self._swapped_in_step[swap_out[:, 0]] = step
            self._swapped_in_step[swap_in[:, 1]] = step
            self._newest = step

    def touch(self, blocks: Blocks) -> None:
        """The step copies, reads or writes these blocks."""
        if self.open:
            newest = int(self._swapped_in_step[blocks].max(initial=-1))
            self._awaits = max(self._awaits, newest)

    @property
    def awaits(self) -> int:
        """Newest step whose swaps this one waits for; -1: for none, or none not awaited before."""
        return self._awaits if self._awaits > self._awaited else -1
