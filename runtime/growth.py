"""When decodes need their next block.

Owns the sequences that compute one token in every step, by the step in which they outgrow their
blocks, so that a step looks only at those that need something. Knows nothing of pools or queues: a
sequence that has left the device is still here until its step comes, and then no longer `due`.
"""

from .request import Sequence


class Growth:
    """Step -> the decodes that are due for a block in it."""

    __slots__ = ("_block_size", "_due")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # A sequence that left and came back may be expected in the same step again.
        self._due: dict[int, dict[Sequence, None]] = {}

    def expect(self, sequence: Sequence, step: int) -> None:
        """A decode has blocks for all its tokens in `step`: from which step on has it not?"""
        tokens = len(sequence.token_ids)
        blocks = max(len(sequence.block_table), -(-tokens // self._block_size))
        sequence.due = step + blocks * self._block_size - tokens + 1
        self._due.setdefault(sequence.due, {})[sequence] = None

    def due(self, step: int) -> list[Sequence]:
        """Whoever was expected in this step, and not anew since; some may have left."""
        return [sequence for sequence in self._due.get(step, ()) if sequence.due == step]

    def most_due(self, step: int) -> int:
        """No more than this many are due in a step."""
        return len(self._due.get(step, ()))

    def forget(self, step: int) -> None:
        """A step is planned: the list of those that were due in it goes."""
        self._due.pop(step, None)

    def clear(self) -> None:
        """Nobody is on the device."""
        self._due.clear()
