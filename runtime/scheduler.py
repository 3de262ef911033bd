"""Who computes what in the next step.

Owns the policy: continuous batching with chunked prefill, preemption by swapping to host memory (by
recomputation where that is full), and `n` choices forked off one prompt. Knows nothing of tensors,
and leaves the blocks to the block manager.

State changes in two places: `schedule`, here, moves sequences between queues and blocks between
sequences; `commit`, in `progress.py`, moves tokens (`num_computed`, `token_ids`), forks, and ends
sequences.

Why everything finishes. A request is admitted only if each of its sequences fits the empty cache,
so the last sequence left on the device always gets its block: some sequence computes a token in
every step. A step preempts only because a decoding sequence needs a block; either that one goes
on, or it has drawn a token since it came to the device. Drawn tokens are kept even by
recomputation, so preemptions are bounded by tokens drawn, and between them prefill only goes
forward. As the victim is the least preempted sequence, and nobody new is admitted while others
wait to return, none starves.
"""

from collections.abc import Collection

from .admission import SchedulerConfig
from .block_manager import BlockManager
from .counters import Counters, Gauges
from .progress import Progress
from .queues import Queues
from .request import Request, SampledToken, Sequence
from .step import StepPlan
from .token_budget import TokenBudget

__all__ = ["Scheduler", "SchedulerConfig"]


class Scheduler:
    """Plans steps: `add` requests, then `schedule` and `commit` in turn."""

    def __init__(self, config: SchedulerConfig, eos_token_ids: Collection[int] = ()) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.num_host_blocks, config.block_size)
        self.step = 0  # number of the next plan
        self.queues = Queues()
        self._counters = Counters()
        self._progress = Progress(self.queues, self.blocks, self._counters, eos_token_ids)

    def add(self, request: Request) -> None:
        """Queue a new request. ValueError, naming value and limit, if it could never finish."""
        self.config.check(request)
        self.queues.add(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.queues.requests)

    def schedule(self) -> StepPlan | None:
        """The next step, with at least one sequence in it; None when nothing is unfinished."""
        if not self.queues.requests:
            return None
        ops = self.blocks.begin_step()
        needed, lacking = self.blocks.missing(self.queues.running)
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
        budget.give_running(self.queues.running)
        if may_enter and not self.queues.swapped:
            self._admit(budget)

        scheduled = budget.scheduled
        assert scheduled, "a step without sequences would never end"
        rows = [entry.sequence for entry in scheduled if entry.samples]
        plan = StepPlan(self.step, scheduled, ops, *self.queues.forks.draw(rows))
        ops.validate(self.config.num_blocks, self.config.num_host_blocks)
        self._counters.swapped_out += len(ops.swap_out)
        self._counters.swapped_in += len(ops.swap_in)
        self._counters.copied += len(ops.copy)
        self.step += 1
        return plan

    def advance(self, plan: StepPlan) -> None:
        """Account for a published step but for its tokens, so that the next can be scheduled.

        `commit` does it where the caller has not.
        """
        self._progress.advance(plan)

    def commit(self, plan: StepPlan, tokens: list[SampledToken]) -> list[Sequence]:
        """Account for a step that the workers have done; the sequences that it finished.

        `tokens` are parallel to `plan.samples`. The token that ends a sequence (end of text, or
        one of `stop_token_ids`) is the last of its output. Sequences finished or aborted since the
        plan was made are passed over.
        """
        return self._progress.commit(plan, tokens)

    def prune(self, plan: StepPlan) -> bool:
        """Take sequences that have ended out of a plan not published yet; True if there were any.

        Its moves stay: the blocks they fill are free from the step after it on. Where none are
        left either, the plan need not be carried out, and its number is the next one's.
        """
        pruned = self._progress.prune(plan)
        if pruned and plan.empty:
            assert self.step == plan.step + 1, f"step {self.step - 1} has been scheduled already"
            self.step = plan.step
        return pruned

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence in whatever state it is and free its blocks; no effect if it has ended."""
        self._progress.finish(sequence, reason)

    def abort(self, request_id: str) -> list[Sequence]:
        """End all sequences of a request as "abort"; those it ended. Unknown ids end nothing."""
        return self._progress.abort(request_id)

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
            waiting=self.queues.num_waiting,
            running=len(self.queues.running),
            swapped=len(self.queues.swapped),
        )

    # -- one step ------------------------------------------------------------------------------

    def _preempt(self, needed: int, lacking: list[Sequence]) -> list[Sequence]:
        """Take sequences off the device until the others have their blocks; who still lacks any."""
        queues = self.queues
        while needed > self.blocks.device.num_free:
            assert len(queues.running) > 1, "a sequence alone on the device always fits"
            # The least preempted so far; among equals the latest to arrive.
            victim = min(queues.running, key=lambda s: (s.num_preemptions, -s.arrival))
            self._counters.preemptions += 1
            if self.blocks.can_swap_out(victim):
                self.blocks.swap_out(victim)
                victim.num_swaps += 1
                queues.leave_to_host(victim)
            else:
                self.blocks.free(victim)
                victim.num_computed = 0
                victim.num_recomputes += 1
                queues.leave_to_recompute(victim)
                self._counters.recomputes += 1
            needed, lacking = self.blocks.missing(queues.running)
        return lacking

    def _swap_in(self, needed: int) -> None:
        """Bring swapped sequences back, first out first, beside the `needed` blocks of others."""
        queues = self.queues
        while queues.swapped and self._has_place(queues.swapped[0]):
            sequence = queues.swapped[0]
            # With a spare block for each sequence they all go on for `block_size` steps at least
            # (unless a request is admitted in between); with a single spare block, the victim of
            # one step came back in the next and drove out another: up to half as many swaps more.
            spare = len(queues.running) + 1 if queues.running else 0
            wanted = needed + self.blocks.missing_to_swap_in(sequence) + spare
            if wanted > self.blocks.device.num_free:
                return
            self.blocks.swap_in(sequence)
            queues.enter(queues.swapped.popleft())

    def _admit(self, budget: TokenBudget) -> None:
        """Start waiting sequences, in order, within the tokens, places and blocks left."""
        queues = self.queues
        while budget.left and queues.waiting and self._has_place(queues.waiting[0]):
            sequence = queues.waiting[0]
            # One spare block for each choice, or the first of them to grow would preempt.
            spare = queues.forks.places([sequence]) if queues.running else 0
            wanted = self.blocks.blocks_for(sequence.num_tokens) + spare
            if wanted > self.blocks.device.num_free:
                return
            # Without chunked prefill only a recomputation can be longer than a whole step.
            whole = min(sequence.num_tokens, self.config.max_batch_tokens)
            if not self.config.chunked_prefill and whole > budget.left:
                return
            self.blocks.reserve(sequence)
            queues.enter(queues.waiting.popleft())
            budget.give(sequence)

    def _has_place(self, sequence: Sequence) -> bool:
        return self.queues.places_with(sequence) <= self.config.max_sequences
