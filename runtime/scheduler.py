"""Who computes what in the next step.

Owns the queues of sequences and the policy: continuous batching with chunked prefill, preemption by
swapping to host memory (by recomputation where that is full), and `n` choices forked off one
prompt. Knows nothing of tensors, and leaves the blocks to the block manager.

State changes in two places: `schedule` moves sequences between queues and blocks between sequences;
`commit` moves tokens (`num_computed`, `token_ids`), forks, and ends sequences.

Why everything finishes. A request is admitted only if each of its sequences fits the empty cache,
so the last sequence left on the device always gets its block: some sequence computes a token in
every step. A step preempts only because a decoding sequence needs a block; either that one goes
on, or it has drawn a token since it came to the device. Drawn tokens are kept even by
recomputation, so preemptions are bounded by tokens drawn, and between them prefill only goes
forward. As the victim is the least preempted sequence, and nobody new is admitted while others
wait to return, none starves.
"""

from collections import deque
from collections.abc import Collection

from .admission import SchedulerConfig
from .block_manager import BlockManager
from .counters import Counters, Gauges
from .forks import Forks
from .request import Request, SampledToken, Sequence, Status
from .step import ScheduledSequence, StepPlan
from .token_budget import TokenBudget

__all__ = ["Scheduler", "SchedulerConfig"]


class Scheduler:
    """Plans steps: `add` requests, then `schedule` and `commit` in turn."""

    def __init__(self, config: SchedulerConfig, eos_token_ids: Collection[int] = ()) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.num_host_blocks, config.block_size)
        self.step = 0  # number of the next plan
        self._counters = Counters()
        self._eos_token_ids = frozenset(eos_token_ids)
        self._arrivals = 0
        self._requests: dict[str, Request] = {}  # those with an unfinished sequence
        self._waiting: deque[Sequence] = deque()  # recomputations, then new ones as they came
        self._running: list[Sequence] = []
        self._swapped: deque[Sequence] = deque()  # as they left
        self._forks = Forks()

    def add(self, request: Request) -> None:
        """Queue a new request. ValueError, naming value and limit, if it could never finish."""
        if request.request_id in self._requests:
            raise ValueError(
                f"request id {request.request_id!r} is in use by an unfinished request"
            )
        self.config.check(request)
        self._requests[request.request_id] = request
        for sequence in request.sequences:
            sequence.arrival = self._arrivals
            self._arrivals += 1
        self._waiting.append(self._forks.add(request))

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def schedule(self) -> StepPlan | None:
        """The next step, with at least one sequence in it; None when nothing is unfinished."""
        if not self._requests:
            return None
        ops = self.blocks.begin_step()
        needed, lacking = self.blocks.missing(self._running)
        # A step that preempts takes nobody (back) in: what it freed is for those that stay, and
        # a victim returning at once would only move its blocks to and fro.
        may_enter = needed <= self.blocks.device.num_free
        if may_enter:
            self._swap_in(needed)
        else:
            lacking = self._preempt(needed, lacking)
        for sequence in lacking:
            self.blocks.reserve(sequence)
        budget = TokenBudget(self.config.max_batch_tokens)
        budget.give_running(self._running)
        if may_enter and not self._swapped:
            self._admit(budget)

        scheduled = budget.scheduled
        assert scheduled, "a step without sequences would never end"
        rows = [entry.sequence for entry in scheduled if entry.samples]
        plan = StepPlan(self.step, scheduled, ops, *self._forks.draw(rows))
        ops.validate(self.config.num_blocks, self.config.num_host_blocks)
        self._counters.swapped_out += len(ops.swap_out)
        self._counters.swapped_in += len(ops.swap_in)
        self._counters.copied += len(ops.copy)
        self.step += 1
        return plan

    def commit(self, plan: StepPlan, tokens: list[SampledToken]) -> list[Sequence]:
        """Account for a step that the workers have done; the sequences that it finished.

        `tokens` are parallel to `plan.samples`. The token that ends a sequence (end of text, or
        one of `stop_token_ids`) is the last of its output. Sequences finished or aborted since the
        plan was made are passed over.
        """
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
        """End a sequence in whatever state it is and free its blocks; no effect if it has ended."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is Status.SWAPPED:
            self._swapped.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        successor = self._forks.remove(sequence)
        if successor is not None:
            self._wait_first(successor)
        if sequence.request.finished:
            del self._requests[sequence.request.request_id]

    def abort(self, request_id: str) -> list[Sequence]:
        """End all sequences of a request as "abort"; those it ended. Unknown ids end nothing."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        ended = [s for s in request.sequences if s.status is not Status.FINISHED]
        for sequence in reversed(ended):  # the one that computes the prompt last: no hand-over
            self.finish(sequence, "abort")
        return ended

    @property
    def counters(self) -> Counters:
        self._counters.peak_device_blocks = self.blocks.device.peak_used
        return self._counters

    @property
    def gauges(self) -> Gauges:
        device, host = self.blocks.device, self.blocks.host
        return Gauges(
            used_blocks=device.num_used,
            free_blocks=device.num_free,
            used_host_blocks=host.num_used,
            free_host_blocks=host.num_free,
            waiting=len(self._waiting) + len(self._forks),
            running=len(self._running),
            swapped=len(self._swapped),
        )

    # -- one step ------------------------------------------------------------------------------

    def _preempt(self, needed: int, lacking: list[Sequence]) -> list[Sequence]:
        """Take sequences off the device until the others have their blocks; who still lacks any."""
        while needed > self.blocks.device.num_free:
            assert len(self._running) > 1, "a sequence alone on the device always fits"
            # The least preempted so far; among equals the latest to arrive.
            victim = min(self._running, key=lambda s: (s.num_preemptions, -s.arrival))
            self._running.remove(victim)
            self._counters.preemptions += 1
            if self.blocks.can_swap_out(victim):
                self.blocks.swap_out(victim)
                victim.status = Status.SWAPPED
                victim.num_swaps += 1
                self._swapped.append(victim)
            else:
                self.blocks.free(victim)
                victim.num_computed = 0
                victim.num_recomputes += 1
                self._wait_first(victim)
                self._counters.recomputes += 1
            needed, lacking = self.blocks.missing(self._running)
        return lacking

    def _swap_in(self, needed: int) -> None:
        """Bring swapped sequences back, first out first, beside the `needed` blocks of others."""
        while self._swapped and self._has_place(self._swapped[0]):
            sequence = self._swapped[0]
            # With a spare block for each sequence they all go on for `block_size` steps at least
            # (unless a request is admitted in between); with a single spare block, the victim of
            # one step came back in the next and drove out another: up to half as many swaps more.
            spare = len(self._running) + 1 if self._running else 0
            wanted = needed + self.blocks.missing_to_swap_in(sequence) + spare
            if wanted > self.blocks.device.num_free:
                return
            self.blocks.swap_in(sequence)
            self._enter(self._swapped.popleft())

    def _admit(self, budget: TokenBudget) -> None:
        """Start waiting sequences, in order, within the tokens, places and blocks left."""
        while budget.left and self._waiting and self._has_place(self._waiting[0]):
            sequence = self._waiting[0]
            # One spare block for each choice, or the first of them to grow would preempt.
            spare = self._forks.places([sequence]) if self._running else 0
            wanted = self.blocks.blocks_for(sequence.num_tokens) + spare
            if wanted > self.blocks.device.num_free:
                return
            # Without chunked prefill only a recomputation can be longer than a whole step.
            whole = min(sequence.num_tokens, self.config.max_batch_tokens)
            if not self.config.chunked_prefill and whole > budget.left:
                return
            self.blocks.reserve(sequence)
            self._enter(self._waiting.popleft())
            budget.give(sequence)

    def _advance(self, entry: ScheduledSequence) -> None:
        """Account for tokens that are in the cache now; fork once the prompt is."""
        sequence = entry.sequence
        prompt_left = sequence.num_prompt - sequence.num_computed
        if prompt_left > 0:
            self._counters.prompt_tokens += min(prompt_left, entry.num_new_tokens)
        sequence.num_computed += entry.num_new_tokens
        if entry.samples:
            for child in self._forks.pop(sequence):
                self.blocks.fork(sequence, child)
                self._enter(child)

    def _end_reason(self, sequence: Sequence, token_id: int) -> str | None:
        params = sequence.request.params
        if token_id in self._eos_token_ids and not params.ignore_eos:
            return "stop"
        if token_id in params.stop_token_ids:
            return "stop"
        if len(sequence.output) >= params.max_tokens:  # admission: never beyond max_model_len
            return "length"
        return None

    # -- queues --------------------------------------------------------------------------------

    def _enter(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        self._running.append(sequence)

    def _wait_first(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._waiting.appendleft(sequence)

    def _has_place(self, sequence: Sequence) -> bool:
        taken = self._forks.places(self._running) if self._forks else len(self._running)
        return taken + self._forks.places([sequence]) <= self.config.max_sequences
