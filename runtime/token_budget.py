"""The tokens of one step, shared out among sequences.

Owns how many tokens are left and the order within the step. Knows nothing of queues or blocks.
"""

from .request import Sequence
from .step import ScheduledSequence


class TokenBudget:
    """Up to `max_batch_tokens` new tokens; sequences with a single one come first in the step."""

    __slots__ = ("_chunks", "_singles", "left")

    def __init__(self, max_batch_tokens: int) -> None:
        self.left = max_batch_tokens
        self._singles: list[ScheduledSequence] = []
        self._chunks: list[ScheduledSequence] = []

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        return self._singles + self._chunks

    def give_running(self, running: list[Sequence]) -> None:
        """One token to every decode (there must be enough), the rest to prefills in turn."""
        prefills = []
        for sequence in running:
            if len(sequence.token_ids) - sequence.num_computed == 1:
                self._singles.append(ScheduledSequence(sequence, 1, True))
            else:
                prefills.append(sequence)
        self.left -= len(self._singles)
        assert self.left >= 0, f"{len(running)} sequences overdraw the tokens by {-self.left}"
        for sequence in prefills:
            self.give(sequence)

    def give(self, sequence: Sequence) -> None:
        """As much of a prefill as the budget allows, perhaps nothing."""
        pending = sequence.num_tokens - sequence.num_computed
        num_new = min(pending, self.left)
        if num_new:
            self.left -= num_new
            entry = ScheduledSequence(sequence, num_new, num_new == pending)
            (self._singles if num_new == 1 else self._chunks).append(entry)
