"""Who leaves the device so that the others have their blocks.

Owns the choice of the victims and the look one step ahead: what those on the device may need next.
Knows nothing of who comes to the device, nor of the tokens of a step. The proof that all this ends
is in `scheduler.py`.
"""

from .block_manager import BlockManager
from .counters import Counters
from .growth import Growth
from .queues import Queues
from .request import Sequence


class Preemption:
    """Takes sequences off the device: to the host, or to be recomputed where that is full."""

    def __init__(
        self, queues: Queues, blocks: BlockManager, growth: Growth, counters: Counters
    ) -> None:
        self._queues = queues
        self._blocks = blocks
        self._growth = growth
        self._counters = counters

    def most_needed_ahead(self, step: int) -> int:
        """An upper bound of `needed_ahead`."""
        most = self._growth.most_due(step + 1)
        return most + self._queues.forks.places(self._queues.prefills)

    def needed_ahead(self, step: int) -> int:
        """Blocks that those now on the device may take in the next step, beside what is free.

        Less what sequences give back that surely end with this one's token.
        """
        queues, references = self._queues, self._blocks.device.references
        needed = sum(s in queues.decodes for s in self._growth.due(step + 1))
        needed += sum(map(self.growth_after_prompt, queues.prefills))
        for sequence in filter(_ends_now, queues.decodes):
            needed -= sum(references[block] == 1 for block in sequence.block_table)
        return max(needed, 0)

    def growth_after_prompt(self, sequence: Sequence) -> int:
        """Blocks that a prefill needs as soon as its last known token is computed."""
        choices = self._queues.forks.places([sequence])
        aligned = sequence.num_tokens % self._blocks.block_size == 0
        return choices if aligned else choices - 1  # one of them goes on in the block they share

    def preempt(self, growing: list[Sequence], step: int) -> list[Sequence]:
        """Take sequences off the device until the others have their blocks; who still lacks any."""
        queues, blocks = self._queues, self._blocks
        while True:
            needed, lacking = blocks.missing(s for s in growing if s in queues.decodes)
            now = needed > blocks.device.num_free
            if not now and needed + self.needed_ahead(step) <= blocks.device.num_free:
                return lacking
            assert queues.num_running > 1 or not now, "a sequence alone on the device always fits"
            # The least preempted so far; among equals the latest to arrive.
            candidates = queues.running if now else filter(_may_leave_early, queues.decodes)
            victim = min(candidates, key=lambda s: (s.num_preemptions, -s.arrival), default=None)
            may_swap = victim is not None and blocks.can_swap_out(victim)
            if victim is None or not (now or (may_swap and queues.num_running > 1)):
                return lacking
            self._counters.preemptions += 1
            if may_swap:
                blocks.swap_out(victim)
                victim.num_swaps += 1
                queues.leave_to_host(victim)
            else:
                blocks.free(victim)
                victim.num_computed = 0
                victim.num_recomputes += 1
                queues.leave_to_recompute(victim)
                self._counters.recomputes += 1


def _ends_now(sequence: Sequence) -> bool:
    """Whether the token that a decode draws in this step is the last one that it may have."""
    num_drawn = sequence.num_tokens - sequence.num_prompt
    return num_drawn + 1 >= sequence.request.params.max_tokens


def _may_leave_early(sequence: Sequence) -> bool:
    """Whether a decode may be preempted before a block is lacking: see `scheduler.py`."""
    return sequence.num_tokens > sequence.tokens_at_entry and not _ends_now(sequence)
