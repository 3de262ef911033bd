"""The plan of one step: which sequences compute how many tokens, who draws, which blocks move.

Owns what a plan says. Knows nothing of how it came about, nor of the arrays that it becomes.
"""

from dataclasses import dataclass, field

from .block_ops import BlockOps
from .request import Sequence

__all__ = ["BlockOps", "ScheduledSequence", "StepPlan"]


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """A sequence's part of a step: its next `num_new_tokens` tokens not in the cache yet.

    One that goes on decoding has the same entry in every step; entries are not changed.
    """

    sequence: Sequence
    num_new_tokens: int
    samples: bool  # the last of them is its last known token, so the next one can be drawn


@dataclass(slots=True)
class StepPlan:
    """What every rank does in one step. Sequences with one new token come first.

    Sample i, for `samples[i]`, is drawn from logits row `sample_rows[i]`; all choices of a request
    draw their first token from the one row of its prompt.
    """

    step: int
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    block_ops: BlockOps = field(default_factory=BlockOps)
    samples: list[Sequence] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do for any rank."""
        ops = self.block_ops
        return not (self.scheduled or ops.swap_out or ops.swap_in or ops.copy)
