"""The driver: rank 0's loop around the scheduler, the channel and its own part of the model.

    schedule -> publish -> execute -> sample -> commit

Owns the order of these and the texts of the sequences that are under way. Knows nothing of files
or of OpenAI's formats.
"""

from dataclasses import dataclass

from onecast.comm import Channel

from .detokenizer import Detokenizer
from .executor import StepExecutor
from .observer import Observer
from .request import Request, Sequence
from .request_log import RequestLog
from .sampling import Sampler
from .scheduler import Scheduler
from .step import StepPlan, prepare_inputs
from .tokenizer import Tokenizer


@dataclass(slots=True)
class FrameTotals:
    """Bytes of all frames published; metadata is what is neither tensor content nor padding."""

    frame_bytes: int = 0
    metadata_bytes: int = 0


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
    ) -> None:
        self.scheduler = scheduler
        self.frames = FrameTotals()
        self._channel = channel
        self._executor = executor
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._observer = observer
        self._log = None if observer.requests is None else RequestLog(observer.requests)
        self._num_requests = 0
        self._texts: dict[Sequence, Detokenizer] = {}

    def add(self, request: Request) -> None:
        """Queue a request; ValueError, naming value and limit, if it could never finish."""
        self.scheduler.add(request)
        request.number = self._num_requests
        self._num_requests += 1
        if self._log is not None:
            self._log.admitted(request)
        for sequence in request.sequences:
            self._texts[sequence] = Detokenizer(self._tokenizer, request.params.stop)

    def abort(self, request_id: str) -> None:
        """End a request without a result; an unknown id ends nothing."""
        ended = self.scheduler.abort(request_id)
        for sequence in ended:
            del self._texts[sequence]
        if ended and self._log is not None:
            self._log.aborted(ended[0].request)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def step(self) -> list[tuple[Sequence, str]]:
        """Run one step; returns the sequences it finished, with their whole texts."""
        try:
            return self._run_step()
        except Exception as error:
            if self._log is not None:
                self._log.failed(error)
            raise

    def _run_step(self) -> list[tuple[Sequence, str]]:
        scheduler, observer, log = self.scheduler, self._observer, self._log
        with observer.step(scheduler.step) as observed:
            with observer.phase("schedule"):
                plan = scheduler.schedule()
                assert plan is not None, "a step without an unfinished request"
                inputs = prepare_inputs(plan, scheduler.config.block_size)
                if log is not None:
                    log.scheduled(plan)
            observed.set_batch_size(len(plan.scheduled))
            with observer.phase("step.publish"):
                frame = self._channel.publish(inputs)
            with frame:
                self.frames.frame_bytes += frame.nbytes
                self.frames.metadata_bytes += frame.metadata_bytes
                logits = self._executor.execute(frame.mapping)
            assert logits is not None, "the driver is not rank 0 of the model's group"
            with observer.phase("sample"):
                tokens = self._sampler.sample(logits, plan.sample_rows, plan.samples)
            with observer.phase("commit"):
                scheduler.commit(plan, tokens)
                finished = self._extend_texts(plan)
                if log is not None:
                    log.committed(plan)
        self._publish_values()
        return finished

    def _extend_texts(self, plan: StepPlan) -> list[tuple[Sequence, str]]:
        """Add each sequence's new token to its text, and end those whose stop string came up."""
        finished = []
        for sequence in plan.samples:
            text = self._texts[sequence]
            # The token that ended a sequence, other than by its length, is not part of its text.
            if sequence.finish_reason != "stop" and text.add(sequence.token_ids[-1]):
                if sequence.finish_reason is None:
                    self.scheduler.finish(sequence, "stop")
                sequence.finish_reason = "stop"
            if sequence.finish_reason is not None:
                finished.append((sequence, self._texts.pop(sequence).finish()))
        return finished

    def _publish_values(self) -> None:
        scheduler, set_value = self.scheduler, self._observer.set_value
        gauges, counters = scheduler.gauges, scheduler.counters
        set_value("kv_blocks.device.used", gauges.used_blocks)
        set_value("kv_blocks.device.free", gauges.free_blocks)
        set_value("kv_blocks.host.used", gauges.used_host_blocks)
        set_value("kv_blocks.host.free", gauges.free_host_blocks)
        set_value("kv_blocks_moved.swap_out", counters.swapped_out)
        set_value("kv_blocks_moved.swap_in", counters.swapped_in)
        set_value("kv_blocks_moved.copy", counters.copied)
        set_value("sequences.waiting", gauges.waiting)
        set_value("sequences.running", gauges.running)
        set_value("sequences.swapped", gauges.swapped)
        set_value("tokens.prompt", counters.prompt_tokens)
        set_value("tokens.generated", counters.generated_tokens)
