"""What the tokens of a step change: how far sequences are, which fork and which end.

Owns the end of sequences for whatever reason. Knows the queues and the blocks, as far as forking
and ending touch them; who computes what next is up to `scheduler.py`.
"""

from collections.abc import Collection

from .block_manager import BlockManager
from .counters import Counters
from .queues import Queues
from .request import SampledToken, Sequence, Status
from .step import ScheduledSequence, StepPlan


class Progress:
    """Moves tokens (`num_computed`, `token_ids`), forks, and ends sequences."""

    def __init__(
        self,
        queues: Queues,
        blocks: BlockManager,
        counters: Counters,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._queues = queues
        self._blocks = blocks
        self._counters = counters
        self._eos_token_ids = frozenset(eos_token_ids)

    def commit(self, plan: StepPlan, tokens: list[SampledToken]) -> list[Sequence]:
        """As `Scheduler.commit`."""
        assert len(tokens) == len(plan.samples), f"{len(tokens)} of {len(plan.samples)} tokens"
        for entry in plan.scheduled:
            self._advance(entry)
        finished = []
        for sequence, token in zip(plan.samples, tokens, strict=True):
            if sequence.status is not Status.RUNNING:
                continue
            sequence.token_ids.append(token.token_id)
            sequence.output.append(token)
            self._counters.generated_tokens += 1
            reason = self._end_reason(sequence, token.token_id)
            if reason is not None:
                self.finish(sequence, reason)
                finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: str) -> None:
        """As `Scheduler.finish`."""
        if sequence.status is Status.FINISHED:
            return
        self._blocks.free(sequence)
        sequence.finish_reason = reason
        self._queues.end(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """As `Scheduler.abort`."""
        request = self._queues.requests.get(request_id)
        if request is None:
            return []
        ended = [s for s in request.sequences if s.status is not Status.FINISHED]
        for sequence in reversed(ended):  # the one that computes the prompt last: no hand-over
            self.finish(sequence, "abort")
        return ended

    def _advance(self, entry: ScheduledSequence) -> None:
        """Account for tokens that are in the cache now; fork once the prompt is."""
        sequence = entry.sequence
        prompt_left = sequence.num_prompt - sequence.num_computed
        if prompt_left > 0:
            self._counters.prompt_tokens += min(prompt_left, entry.num_new_tokens)
        sequence.num_computed += entry.num_new_tokens
        if entry.samples:
            for child in self._queues.forks.pop(sequence):
                self._blocks.fork(sequence, child)
                self._queues.enter(child)

    def _end_reason(self, sequence: Sequence, token_id: int) -> str | None:
        params = sequence.request.params
        if token_id in self._eos_token_ids and not params.ignore_eos:
            return "stop"
        if token_id in params.stop_token_ids:
            return "stop"
        if len(sequence.output) >= params.max_tokens:  # admission: never beyond max_model_len
            return "length"
        return None
