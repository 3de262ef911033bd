"""What the tokens of a step change: how far sequences are, which fork and which end.

Owns the end of sequences for whatever reason. Knows the queues and the blocks, as far as forking
and ending touch them; who computes what next is up to `scheduler.py`.

A step changes sequences twice: `advance` once it is published, when everything but the drawn tokens
is certain; `commit` when these are known. In between each of them is a PLACEHOLDER, and the next
step can be planned: a draft. What has ended by the time a draft is published, `prune` takes out.
"""

from collections.abc import Collection

from .block_manager import BlockManager
from .counters import Counters
from .queues import Queues
from .request import PLACEHOLDER, SampledToken, Sequence, Status
from .step import ScheduledSequence, StepPlan

_RUNNING, _ENDING = Status.RUNNING, Status.ENDING  # an enum's member takes time to look up


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
        self._advanced: StepPlan | None = None  # its tokens are not known yet
        self._any_ended = False  # since then

    def advance(self, plan: StepPlan) -> None:
        """As `Scheduler.advance`."""
        assert self._advanced is None, f"step {plan.step}: the tokens of the last one are missing"
        self._advanced = plan
        self._any_ended = False
        self._compute(plan.scheduled)
        for sequence in plan.samples:
            if sequence.status is not _RUNNING:  # it ended while the workers computed
                continue
            sequence.token_ids.append(PLACEHOLDER)
            if len(sequence.token_ids) >= sequence.max_num_tokens:
                self._blocks.free(sequence)
                self._queues.leave_to_end(sequence)

    def commit(self, plan: StepPlan, tokens: list[SampledToken]) -> list[Sequence]:
        """As `Scheduler.commit`."""
        assert len(tokens) == len(plan.samples), f"{len(tokens)} of {len(plan.samples)} tokens"
        if self._advanced is not plan:
            self.advance(plan)
        self._advanced = None
        eos_token_ids = self._eos_token_ids
        num_drawn = 0
        finished = []
        for sequence, token in zip(plan.samples, tokens, strict=True):
            token_ids = sequence.token_ids
            if token_ids[-1] != PLACEHOLDER:  # it ended while the workers computed
                continue
            token_ids[-1] = token_id = token.token_id
            sequence.output.append(token)
            num_drawn += 1
            if token_id in sequence.stop_token_ids or (
                token_id in eos_token_ids and not sequence.request.params.ignore_eos
            ):
                self.finish(sequence, "stop")
            elif sequence.status is _ENDING:
                self.finish(sequence, "length")
            else:
                continue
            finished.append(sequence)
        self._counters.generated_tokens += num_drawn
        return finished

    def prune(self, plan: StepPlan) -> bool:
        """As `Scheduler.prune`."""
        if not self._any_ended:
            return False
        ended = {s for s in plan.samples if s.status is Status.FINISHED}
        ended.update(e.sequence for e in plan.scheduled if e.sequence.status is Status.FINISHED)
        if not ended:
            return False
        rows = [entry.sequence for entry in plan.scheduled if entry.samples]
        left = [row for row, sequence in enumerate(rows) if sequence not in ended]
        new_rows = {row: number for number, row in enumerate(left)}
        draws = [
            (sequence, new_rows[row])
            for sequence, row in zip(plan.samples, plan.sample_rows, strict=True)
            if sequence not in ended and row in new_rows
        ]
        plan.scheduled = [entry for entry in plan.scheduled if entry.sequence not in ended]
        plan.samples = [sequence for sequence, _ in draws]
        plan.sample_rows = [row for _, row in draws]
        return True

    def finish(self, sequence: Sequence, reason: str) -> None:
        """As `Scheduler.finish`."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.token_ids[-1] == PLACEHOLDER:
            sequence.token_ids.pop()  # nobody will wait for that token
        self._any_ended = True
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

    def _compute(self, scheduled: list[ScheduledSequence]) -> None:
        """Account for tokens that are in the cache now; fork once a prompt is."""
        num_prompt_tokens = 0
        forks = self._queues.forks if self._queues.forks else None
        for entry in scheduled:
            sequence, num_new = entry.sequence, entry.num_new_tokens
            prompt_left = sequence.num_prompt - sequence.num_computed
            if prompt_left > 0:
                num_prompt_tokens += min(prompt_left, num_new)
            sequence.num_computed += num_new
            if forks is not None and entry.samples:
                for child in forks.pop(sequence):
                    self._blocks.fork(sequence, child)
                    self._queues.enter(child)
        self._counters.prompt_tokens += num_prompt_tokens
