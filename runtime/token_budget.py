"""The tokens that a step has for prefills, shared out among them.

Owns how many tokens are left and the order within the step. Knows nothing of queues or blocks.
"""

from .request import Sequence
from .step import ScheduledSequence


class TokenBudget:
    """Up to `left` new tokens; sequences with a single one come first in the step."""

    __slots__ = ("_chunks", "_singles", "left")

    def __init__(self, left: int) -> None:
        assert left >= 0, f"the decodes of a step overdraw its tokens by {-left}"
        self.left = left
        self._singles: list[ScheduledSequence] = []
        self._chunks: list[ScheduledSequence] = []

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        """The entries given, in a list of their own."""
        return self._singles + self._chunks

    def give(self, sequence: Sequence) -> None:
        """As much of a prefill as the budget allows, perhaps nothing."""
        pending = sequence.num_tokens - sequence.num_computed
        num_new = min(pending, self.left)
        if num_new:
            self.left -= num_new
            entry = ScheduledSequence(sequence, num_new, num_new == pending)
            (self._singles if num_new == 1 else self._chunks).append(entry)
