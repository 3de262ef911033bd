"""The tokens of one step, shared out among sequences.

Owns how many tokens are left and the order within the step. Knows nothing of queues or blocks.
"""

from .request import Sequence
from .step import ScheduledSequence


class TokenBudget:
    """Up to `max_batch_tokens` new tokens; sequences with a single one come first in the step.

    Kept from step to step, for its memory of who decodes: a sequence that does goes on doing so for
    as long as it is running, with the same entry.
    """

    __slots__ = ("_all_decoding", "_chunks", "_decodes", "_max_batch_tokens", "_singles", "left")

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._decodes: dict[Sequence, ScheduledSequence] = {}  # of the latest step
        self._all_decoding: list[Sequence] = []  # what was running then, if nothing else was
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self.left = self._max_batch_tokens
        self._singles: list[ScheduledSequence] = []
        self._chunks: list[ScheduledSequence] = []

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        """The step's entries, in a list of their own."""
        return self._singles + self._chunks

    def give_running(self, running: list[Sequence]) -> None:
        """One token to every decode (there must be enough), the rest to prefills in turn.

        `running`: all that may run, once a step; who has left it for a step begins anew.
        """
        prefills: list[Sequence] = []
        if not running or running != self._all_decoding:  # sequences are equal to themselves only
            known, self._decodes = self._decodes, {}
            for sequence in running:
                if len(sequence.token_ids) - sequence.num_computed == 1:
                    entry = known.get(sequence)
                    self._decodes[sequence] = entry or ScheduledSequence(sequence, 1, True)
                else:
                    prefills.append(sequence)
            self._all_decoding = [] if prefills else running.copy()
        self._singles += self._decodes.values()
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
