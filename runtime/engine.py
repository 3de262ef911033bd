"""The driver: rank 0's loop around the scheduler, the channel and its own part of the model.

    schedule -> publish -> execute -> sample -> commit

While the workers carry out a step the next one is planned and its frame built, with placeholders
for the tokens that are being drawn: a queue of one. Before it is published the tokens are filled
in, and what has ended meanwhile is taken out. Tokens are the same as without.

That happens in this thread: behind the launch of the forward where a device carries it out, and on
a CPU right behind the publish, while the other ranks wake up. A helper thread was tried: handing
over to it costs more than planning a step does.

Owns the order of these and the texts of sequences that end. Knows nothing of files or of OpenAI's
formats.
"""

import time
from dataclasses import dataclass
from typing import Any

from onecast.comm import Channel

from .detokenizer import Detokenizer
from .executor import StepExecutor
from .input_builder import InputBuilder
from .observer import Observer
from .request import Request, Sequence
from .request_log import RequestLog
from .sampling import Sampler
from .scheduler import Scheduler
from .step import StepPlan
from .tokenizer import Tokenizer

# Between two times that the values are published, which takes 12 us: short steps would feel it, and
# whoever reads them comes once a second at most. After the last step they are exact.
_VALUES_NS = 10_000_000


@dataclass(slots=True)
class FrameTotals:
    """All frames published, one a step, and their bytes.

    Metadata is what is neither tensor content nor padding.
    """

    count: int = 0
    frame_bytes: int = 0
    metadata_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A step and its frame, ahead of its turn."""

    plan: StepPlan
    inputs: dict[str, Any]


class Engine:
    """Runs requests step by step; one step is one publish."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        channel: Channel,
        executor: StepExecutor,
        sampler: Sampler,
        tokenizer: Tokenizer,
        observer: Observer,
        builder: InputBuilder | None = None,
        overlap: bool = True,
    ) -> None:
        """Without `overlap` a step is planned when the one before it is over."""
        self.scheduler = scheduler
        self.frames = FrameTotals()
        self._channel = channel
        self._executor = executor
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._observer = observer
        self._builder = InputBuilder(scheduler.config) if builder is None else builder
        self._overlap = overlap
        self._draft: _Draft | None = None
        self._resting = False
        self._log = None if observer.requests is None else RequestLog(observer.requests)
        self._num_requests = 0
        self._values_due_ns = 0
        self._texts: dict[Sequence, Detokenizer] = {}  # of sequences with stop strings

    def add(self, request: Request) -> None:
        """Queue a request; ValueError, naming value and limit, if it could never finish."""
        stop = request.params.stop
        texts = {s: Detokenizer(self._tokenizer, stop) for s in request.sequences} if stop else {}
        self.scheduler.add(request)
        self._texts.update(texts)
        request.number = self._num_requests
        self._num_requests += 1
        if self._log is not None:
            self._log.admitted(request)

    def abort(self, request_id: str) -> None:
        """End a request without a result; an unknown id ends nothing."""
        ended = self.scheduler.abort(request_id)
        for sequence in ended:
            self._texts.pop(sequence, None)
        if ended and self._log is not None:
            self._log.aborted(ended[0].request)
        self._publish_values()  # there may be no step for a while

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def step(self) -> list[tuple[Sequence, str]]:
        """Run one step; returns the sequences it finished, with their whole texts.

        There must be something unfinished. A step may be left with blocks to move alone, when all
        that it was planned for has ended.
        """
        try:
            return self._run_step()
        except Exception as error:
            if self._log is not None:
                self._log.failed(error)
            raise

    def rest(self) -> None:
        """Tell the followers that there is nothing to do; again for a sign of life.

        There must be nothing unfinished. The first time takes a step's number, in which nobody does
        anything: so how long followers wait for requests is in no step's time. `step` ends it.
        """
        if self._resting:
            self._channel.publish({"idle": True}).release()
            return
        draft, self._draft = self._draft, None
        if draft is not None:  # of sequences that have ended, but blocks may be left to move
            self.scheduler.prune(draft.plan)
            if not draft.plan.empty:
                self._draft = _Draft(draft.plan, self._builder.build(draft.plan))
                self.step()
        with self._channel.publish({"idle": True, "step": self.scheduler.skip()}) as frame:
            self.frames.count += 1
            self.frames.frame_bytes += frame.nbytes
            self.frames.metadata_bytes += frame.metadata_bytes
        self._resting = True
        self._publish_values()

    def _run_step(self) -> list[tuple[Sequence, str]]:
        if self._resting:
            self._resting = False
            self._channel.publish({"idle": False}).release()
        scheduler, observer = self.scheduler, self._observer
        number = self.frames.count
        with observer.step(number) as observed:
            with observer.phase("schedule"):
                plan, inputs = self._next_step()
                assert plan.step == number, f"step {plan.step} comes in the place of {number}"
                if self._log is not None:
                    self._log.scheduled(plan)
            observed.set_batch_size(len(plan.scheduled))
            with observer.phase("step.publish"):
                frame = self._channel.publish(inputs)
            with frame:
                self.frames.count += 1
                self.frames.frame_bytes += frame.nbytes
                self.frames.metadata_bytes += frame.metadata_bytes
                if self._overlap and not self._executor.asynchronous:
                    self._look_ahead(plan)
                logits = self._executor.execute(frame.mapping)
                if self._overlap and self._executor.asynchronous:
                    self._look_ahead(plan)
            tokens = []
            if plan.samples:
                assert logits is not None, "the driver is not rank 0 of the model's group"
                with observer.phase("sample"):
                    tokens = self._sampler.sample(logits, plan.sample_rows, plan.samples)
            with observer.phase("commit"):
                ended = scheduler.commit(plan, tokens)
                finished = self._take_texts(plan, ended)
                if self._log is not None:
                    self._log.committed(plan)
        now_ns = time.monotonic_ns()
        if now_ns >= self._values_due_ns or not scheduler.has_unfinished:
            self._values_due_ns = now_ns + _VALUES_NS
            self._publish_values()
        return finished

    def _next_step(self) -> tuple[StepPlan, dict[str, Any]]:
        """The draft, as far as it still holds; without one, a step planned now."""
        scheduler, builder = self.scheduler, self._builder
        draft, self._draft = self._draft, None
        if draft is not None:
            if not scheduler.prune(draft.plan):
                builder.fill(draft.plan)
                return draft.plan, draft.inputs
            if not draft.plan.empty:
                return draft.plan, builder.build(draft.plan)
        plan = scheduler.schedule()
        assert plan is not None, "a step without an unfinished request"
        return plan, builder.build(plan)

    def _look_ahead(self, plan: StepPlan) -> None:
        """What needs no token of the step that has been published: plan the next one, above all."""
        with self._observer.phase("schedule.ahead"):
            self.scheduler.advance(plan)
            following = self.scheduler.schedule()
            if following is not None:
                self._draft = _Draft(following, self._builder.build(following))

    def _take_texts(self, plan: StepPlan, ended: list[Sequence]) -> list[tuple[Sequence, str]]:
        """End sequences whose stop string came up; all that the step ended, with their texts."""
        stopped = self._texts and self._extend_texts(plan)
        if not (ended or stopped):
            return []
        over = [sequence for sequence in plan.samples if sequence.finish_reason is not None]
        return [(sequence, self._text_of(sequence)) for sequence in over]

    def _extend_texts(self, plan: StepPlan) -> bool:
        """Add new tokens to the texts of sequences with stop strings; True if any came up."""
        any_stopped = False
        for sequence in plan.samples:
            text = self._texts.get(sequence)
            # The token that ended a sequence, other than by its length, is not part of its text.
            if text is None or sequence.finish_reason == "stop":
                continue
            if text.add(sequence.output[-1].token_id):
                if sequence.finish_reason is None:
                    self.scheduler.finish(sequence, "stop")
                sequence.finish_reason = "stop"
                any_stopped = True
        return any_stopped

    def _text_of(self, sequence: Sequence) -> str:
        text = self._texts.pop(sequence, None)
        if text is not None:
            return text.finish()
        token_ids = [token.token_id for token in sequence.output]
        return self._tokenizer.decode(
            token_ids[:-1] if sequence.finish_reason == "stop" else token_ids
        )

    def _publish_values(self) -> None:
        scheduler, set_value = self.scheduler, self._observer.set_value
        gauges, counters = scheduler.gauges, scheduler.counters
        set_value("kv_blocks.device.used", gauges.used_blocks)
        set_value("kv_blocks.device.free", gauges.free_blocks)
        set_value("kv_blocks.host.used", gauges.used_host_blocks)
        set_value("kv_blocks.host.free", gauges.free_host_blocks)
        for kind, blocks in (
            ("swap_out", counters.swapped_out),
            ("swap_in", counters.swapped_in),
            ("copy", counters.copied),
        ):
            set_value(f"kv_blocks_moved.{kind}", blocks)
            set_value(f"kv_bytes_moved.{kind}", blocks * self._executor.bytes_per_block)
        set_value("kv_blocks_evicted.device", scheduler.blocks.device.num_evicted)
        set_value("kv_blocks_evicted.host", scheduler.blocks.host.num_evicted)
        set_value("preemptions.swap", counters.preemptions - counters.recomputes)
        set_value("preemptions.recompute", counters.recomputes)
        set_value("step_tokens_limit", scheduler.config.max_batch_tokens)
        set_value("sequences.waiting", gauges.waiting)
        set_value("sequences.running", gauges.running)
        set_value("sequences.swapped", gauges.swapped)
        set_value("tokens.prompt", counters.prompt_tokens)
        set_value("tokens.generated", counters.generated_tokens)
        if scheduler.config.prefix_caching:
            hits = counters.prefix_hit_tokens
            set_value("prefix_cache_tokens.hit", hits)
            set_value("prefix_cache_tokens.computed", counters.prefix_queried_tokens - hits)
