"""Who computes what in the next step.

Owns the policy: continuous batching with chunked prefill, preemption by swapping to host memory (by
recomputation where that is full), and `n` choices forked off one prompt. Knows nothing of
tensors, and leaves the blocks to the block manager.

State changes in two places: `schedule` moves sequences between queues and blocks between sequences;
`advance` and `commit` (see `progress.py`) move tokens, fork, and end sequences.

Swaps take their time beside a forward that does without their blocks. So a sequence that is
swapped in runs from the next step on, and a step looks one step ahead: where the next one may run
out of blocks, a sequence is swapped out now. Where that cannot be, the step waits for its swaps.

Why everything finishes. A request is admitted only if each of its sequences fits the empty cache,
and blocks that are merely cached count as free, so the last sequence left on the device always
gets its block. A sequence waits for its swap-in only beside others that run, so some sequence
computes a token in every step. A step preempts for one of two reasons:

- A decode needs a block now. As it came to the device with blocks for all its tokens, it has drawn
  one since. Either it goes on and draws another, or it is among the sequences that leave.
- The next step may need more blocks than there are. Then only sequences leave that have drawn a
  token since they came to the device, and what they have computed is kept on the host.

So for each step that preempts there is a token that is drawn in it, or was drawn, since it came, by
a sequence that leaves; a token is counted twice at most. Drawn tokens are kept even by
recomputation, so such steps are bounded by tokens drawn, and between them prefill only goes
forward. As the victim is the least preempted sequence, and nobody new is admitted while others
wait to return, none starves.
"""

from collections.abc import Collection

from .admission import SchedulerConfig
from .block_manager import BlockManager
from .counters import Counters, Gauges
from .growth import Growth
from .preemption import Preemption
from .prefix_cache import Hits
from .progress import Progress
from .queues import Queues
from .request import Request, SampledToken, Sequence
from .step import StepPlan
from .token_budget import TokenBudget

__all__ = ["Scheduler", "SchedulerConfig"]

# Cached blocks given host copies ahead of their reuse, in one step: few enough to be moved beside a
# forward, more than prompts take in most steps.
MAX_WRITE_BACKS = 64


class Scheduler:
    """Plans steps: `add` requests, then `schedule` and `commit` in turn."""

    def __init__(self, config: SchedulerConfig, eos_token_ids: Collection[int] = ()) -> None:
        self.config = config
        self.blocks = BlockManager(
            config.num_blocks,
            config.num_host_blocks,
            config.block_size,
            prefix_caching=config.prefix_caching,
        )
        self.step = 0  # number of the next plan
        self.queues = Queues()
        self._counters = Counters()
        self._progress = Progress(self.queues, self.blocks, self._counters, eos_token_ids)
        self._growth = Growth(config.block_size)
        self._preemption = Preemption(self.queues, self.blocks, self._growth, self._counters)
        # Who was not let in last, with the blocks it lacks: a step in which that cannot have
        # changed need not look through its blocks again.
        self._refused: tuple[Sequence, Hits, int] | None = None
        self._refused_return: tuple[Sequence, int] | None = None

    def add(self, request: Request) -> None:
        """Queue a new request. ValueError, naming value and limit, if it could never finish."""
        self.config.check(request)
        self.queues.add(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.queues.requests)

    def schedule(self) -> StepPlan | None:
        """The next step, with at least one sequence; None when nobody has tokens to compute."""
        queues, blocks = self.queues, self.blocks
        if not queues.has_work:
            self._growth.clear()
            self._refused = self._refused_return = None
            return None
        step = self.step
        ops = blocks.begin_step()
        growing = self._growing()
        needed, lacking = blocks.missing(growing)
        ahead = self._preemption.most_needed_ahead(step)
        if needed + ahead > blocks.device.num_free:
            ahead = self._preemption.needed_ahead(step)
        # A step that preempts takes nobody (back) in: what it freed is for those that stay, and
        # a victim returning at once would only move its blocks to and fro.
        may_enter = needed + ahead <= blocks.device.num_free
        if not may_enter:
            lacking = self._preemption.preempt(growing, step)
        elif queues.swapped:
            self._swap_in(needed, ahead)
        for sequence in lacking:
            blocks.reserve(sequence)
        budget = TokenBudget(self.config.max_batch_tokens - len(queues.decodes))
        for sequence in queues.prefills:
            if sequence.run_from <= step:
                budget.give(sequence)
        if may_enter and queues.waiting and not queues.swapped:
            self._admit(budget, ahead)
        self._write_back_ahead(ahead)

        plan = self._plan(budget)
        ops.validate(self.config.num_blocks, self.config.num_host_blocks)
        self._counters.swapped_out += len(ops.swap_out)
        self._counters.swapped_in += len(ops.swap_in)
        self._counters.copied += len(ops.copy)
        self._growth.forget(step)
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

    def skip(self) -> int:
        """Leave out a step's number, which is returned; there must be nothing to schedule."""
        left = self.schedule()
        assert left is None, "a step is skipped in which sequences have tokens to compute"
        self.step += 1
        return self.step - 1

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
            running=self.queues.num_running,
            swapped=len(self.queues.swapped),
        )

    # -- one step ------------------------------------------------------------------------------

    def _growing(self) -> list[Sequence]:
        """The decodes that may need a block in this step, among them those that begin to decode."""
        queues = self.queues
        growing = [s for s in self._growth.due(self.step) if s in queues.decodes]
        for sequence in list(queues.prefills):
            self.blocks.register(sequence)
            pending = sequence.num_tokens - sequence.num_computed
            if pending == 1 and not queues.forks.leads(sequence):
                queues.start_decoding(sequence)
                growing.append(sequence)
        for sequence in growing:
            self._growth.expect(sequence, self.step)
        return growing

    # -- who comes -----------------------------------------------------------------------------

    def _swap_in(self, needed: int, ahead: int) -> None:
        """Bring swapped sequences back, first out first, beside the blocks that others need."""
        queues, blocks = self.queues, self.blocks
        run_from = self.step + (1 if queues.num_running else 0)
        while queues.swapped and self._has_place(queues.swapped[0]):
            sequence = queues.swapped[0]
            running = queues.num_running
            # With a spare block for each sequence they all go on for `block_size` steps at least
            # (unless a request is admitted in between); with a single spare block, the victim of
            # one step came back in the next and drove out another: up to half as many swaps more.
            spare = max(running + 1, ahead) if running else 0
            room = blocks.device.num_free - needed - spare
            refused = self._refused_return
            if running and refused is not None and refused[0] is sequence and refused[1] > room:
                return
            missing = blocks.missing_to_swap_in(sequence)
            if missing > room:
                self._refused_return = (sequence, missing)
                return
            blocks.swap_in(sequence)
            sequence.run_from = run_from
            queues.enter(queues.swapped.popleft())

    def _admit(self, budget: TokenBudget, ahead: int) -> None:
        """Start waiting sequences, in order, within the tokens, places and blocks left."""
        queues, blocks, config = self.queues, self.blocks, self.config
        while budget.left and queues.waiting and self._has_place(queues.waiting[0]):
            sequence = queues.waiting[0]
            # One spare block for each choice, or the first of them to grow would preempt.
            running = queues.num_running
            spare = queues.forks.places([sequence]) + ahead if running else 0
            room = blocks.device.num_free - spare
            if running and self._is_refused_again(sequence, room):
                return
            hits = blocks.match(sequence)
            missing = blocks.missing_to_admit(sequence, hits)
            if missing > room:
                self._refused = (sequence, hits, missing)
                return
            num_cached = hits.num_blocks * config.block_size
            # Without chunked prefill only a recomputation can be longer than a whole step.
            whole = min(sequence.num_tokens - num_cached, config.max_batch_tokens)
            if not config.chunked_prefill and whole > budget.left:
                return
            blocks.admit(sequence, hits)
            self._count_hits(sequence, num_cached)
            ahead += self._preemption.growth_after_prompt(sequence)
            queues.enter(queues.waiting.popleft())
            if hits.on_host and running and config.chunked_prefill:
                sequence.run_from = self.step + 1
            else:
                budget.give(sequence)

    def _is_refused_again(self, sequence: Sequence, room: int) -> bool:
        """Whether a sequence lacks blocks for the same reason as the last time."""
        if self._refused is None or self._refused[0] is not sequence:
            return False
        _, hits, missing = self._refused
        return missing > room and not self.blocks.prefixes.next_block_is_known(sequence, hits)

    def _count_hits(self, sequence: Sequence, num_cached: int) -> None:
        if not self.config.prefix_caching:
            return
        self._counters.prefix_queried_tokens += sequence.num_tokens
        self._counters.prefix_hit_tokens += num_cached
        if not sequence.num_recomputes:
            sequence.num_cached_tokens = num_cached

    def _has_place(self, sequence: Sequence) -> bool:
        return self.queues.places_with(sequence) <= self.config.max_sequences

    # -- the plan ------------------------------------------------------------------------------

    def _write_back_ahead(self, ahead: int) -> None:
        """Prepare the blocks that the next step is likely to take."""
        queues = self.queues
        first = queues.swapped or queues.waiting
        if first:  # and as many again as the tokens of a step fill: more than one may come
            more = self.config.max_batch_tokens if queues.waiting else 0
            ahead += self.blocks.blocks_for(first[0].num_tokens + more)
        if ahead > self.blocks.device.num_ready:
            self.blocks.write_back_ahead(ahead, MAX_WRITE_BACKS)

    def _plan(self, budget: TokenBudget) -> StepPlan:
        """The step of all decodes and of the prefills that have tokens in the budget."""
        decodes, prefills = self.queues.decodes, budget.scheduled
        samples, rows = list(decodes), list(range(len(decodes)))
        assert samples or prefills, "a step without sequences would never end"
        finishing = [entry.sequence for entry in prefills if entry.samples]
        if finishing:
            drawing, drawn_rows = self.queues.forks.draw(finishing)
            samples += drawing
            rows += [len(decodes) + row for row in drawn_rows]
        # Entries with one token come first: all decodes, then the shortest of the prefills.
        scheduled = [*decodes.values(), *prefills]
        return StepPlan(self.step, scheduled, self.blocks.ops, samples, rows)
