"""`onecast serve` on rank 0: requests as they come from the HTTP server, and an engine.

Owns the loop: take what has come, run a step, tell of what it brought; sleep when there is nothing
to do. Knows nothing of HTTP; texts, tokens and reasons leave it as messages.

An engine without requests sleeps in the kernel. The followers wait for a frame then, for as long as
it takes; every two seconds they get one that says so, which keeps their time-outs, and those of a
process group's broadcast, for a driver that is lost.
"""

import sys
import time
from dataclasses import dataclass, field

from .assembly import make_engine
from .engine import Engine
from .front_end import FrontEnd
from .model_config import ModelConfig
from .observer import Observer
from .rank import Rank
from .request import Request, Sequence, TraceHeaders
from .serve_config import ServeConfig
from .serve_messages import (
    STATUSES,
    Abort,
    Answered,
    Ask,
    Drain,
    Drained,
    Ended,
    News,
    Progress,
    Prompt,
    Serving,
    ToEngine,
)
from .stop_signal import StopSignal, stop_signal
from .tokenizer import Tokenizer

IDLE_S = 2.0  # well below what the hang watch waits for
_SIGNS_PER_TIMEOUT = 4


def serve(config: ServeConfig, rank: Rank, front_end: FrontEnd) -> None:
    """Answer requests until SIGTERM, then those that are under way; `rank` is the driver's.

    What has not ended `config.drain_timeout_s` after the signal is cut off, and said so.
    """
    engine = make_engine(config, rank, ModelConfig.from_dir(config.model), Tokenizer(config.model))
    with stop_signal(rank.environment.launcher_pid) as stop:
        front_end.send(Serving(engine.scheduler.config))
        ranks = rank.environment.world_size
        print(
            f"onecast: serving {config.model_name} at {front_end.url} "
            f"({ranks} rank{'s' if ranks > 1 else ''})",
            flush=True,
        )
        server = Server(
            engine,
            front_end,
            stop,
            rank.observer,
            drain_timeout_s=config.drain_timeout_s,
            idle_s=min(IDLE_S, config.timeout_s / _SIGNS_PER_TIMEOUT),
        )
        server.run()
        if server.num_cut:
            print(
                f"onecast: --drain-timeout-s {config.drain_timeout_s:g} was over, "
                f"{server.num_cut} requests were cut off",
                file=sys.stderr,
            )
        front_end.close()


@dataclass(slots=True)
class _Call:
    """A body whose sequences are with the engine."""

    number: int
    stream: bool
    requests: list[Request]
    choices: dict[Sequence, int] = field(init=False)  # in the order of the answer
    told: dict[Sequence, int] = field(init=False)  # tokens, of those that have not ended

    def __post_init__(self) -> None:
        sequences = [sequence for request in self.requests for sequence in request.sequences]
        self.choices = {sequence: index for index, sequence in enumerate(sequences)}
        self.told = dict.fromkeys(sequences, 0)


class Server:
    """The loop. One of it, for one engine and one front end."""

    def __init__(
        self,
        engine: Engine,
        front_end: FrontEnd,
        stop: StopSignal,
        observer: Observer,
        *,
        drain_timeout_s: float,
        idle_s: float,
    ) -> None:
        """An idle engine gives its followers a sign of life every `idle_s`."""
        self._engine = engine
        self._front_end = front_end
        self._stop = stop
        self._observer = observer
        self._drain_timeout_s = drain_timeout_s
        self._idle_s = idle_s
        self._deadline_s: float | None = None  # once it drains; CLOCK_MONOTONIC
        self._drained = False  # no request comes any more
        self._calls: dict[int, _Call] = {}
        self._by_request: dict[Request, _Call] = {}
        self.num_cut = 0  # requests

    def run(self) -> None:
        """Until asked to stop, and all that was asked for before has an answer."""
        engine = self._engine
        while True:
            for message in self._front_end.receive():
                self._take(message)
            if self._stop.asked:
                self._drain()
            if engine.has_unfinished:
                self._tell(engine.step())
            elif self._drained:
                return
            else:
                engine.rest()
                self._front_end.wait(self._idle_s, self._stop.fileno())

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Ask):
            requests = [_request(prompt) for prompt in message.prompts]
            call = _Call(message.call, message.stream, requests)
            self._calls[call.number] = call
            for request in requests:
                self._by_request[request] = call
                self._engine.add(request)
        elif isinstance(message, Abort):
            call_or_none = self._calls.get(message.call)  # else its last word was on its way
            if call_or_none is not None:
                self._abort(call_or_none)
        elif isinstance(message, Answered):
            for status in STATUSES:
                self._observer.set_value(f"http_responses.{status}", message.by_status[status])
        else:
            assert isinstance(message, Drained), message
            self._drained = True

    def _tell(self, finished: list[tuple[Sequence, str]]) -> None:
        news = []
        for sequence, text in finished:
            call = self._by_request[sequence.request]
            reason = sequence.finish_reason
            assert reason is not None
            news.append(_news(call, sequence, Ended(text, reason, sequence.num_cached_tokens)))
            del call.told[sequence]
            if not call.told:
                self._forget(call)
        for call in self._calls.values():
            if call.stream:
                news += [
                    _news(call, sequence, None)
                    for sequence, told in call.told.items()
                    if len(sequence.output) > told
                ]
        if news:
            self._front_end.send(Progress(news))

    def _drain(self) -> None:
        if self._deadline_s is None:
            self._stop.taken()
            self._deadline_s = time.monotonic() + self._drain_timeout_s
            self._front_end.send(Drain())
        elif time.monotonic() > self._deadline_s and self._calls:
            self.num_cut = len(self._by_request)
            for call in list(self._calls.values()):
                self._abort(call)

    def _abort(self, call: _Call) -> None:
        for request in call.requests:
            self._engine.abort(request.request_id)
        self._forget(call)

    def _forget(self, call: _Call) -> None:
        del self._calls[call.number]
        for request in call.requests:
            del self._by_request[request]


def _request(prompt: Prompt) -> Request:
    request = Request(prompt.request_id, prompt.token_ids, prompt.params)
    if prompt.traceparent is not None:
        request.trace = TraceHeaders(prompt.traceparent, prompt.tracestate)
    return request


def _news(call: _Call, sequence: Sequence, ended: Ended | None) -> News:
    """All tokens that have not been told of."""
    tokens = sequence.output[call.told[sequence] :]
    call.told[sequence] += len(tokens)
    logprobs = None
    if sequence.request.params.logprobs is not None:
        logprobs = [(token.logprob, token.top_logprobs) for token in tokens]
    return News(
        call.number,
        call.choices[sequence],
        [token.token_id for token in tokens],
        logprobs,
        ended,
    )
