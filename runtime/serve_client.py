"""The engine, seen from the HTTP server: calls go to it, and what becomes of them comes back.

Owns the other end of rank 0's socket, the calls under way, and how many may be. Knows nothing of
HTTP. For one event loop.
"""

import asyncio
import math
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from .admission import SchedulerConfig
from .body_context import body_context
from .model_config import ModelConfig
from .openai_body import BodyContext, Call
from .request import SampledToken
from .serve_messages import (
    STATUSES,
    Abort,
    Answered,
    Ask,
    Drain,
    Drained,
    News,
    Progress,
    Prompt,
    Serving,
    Setup,
    ToEngine,
    ToServer,
    Unframer,
    frame,
)
from .tokenizer import Tokenizer

STARTING, READY, DRAINING, LOST = "starting", "ready", "draining", "lost"
_CHUNK_BYTES = 1 << 18
_REMEMBERED = 32  # ends of sequences, for when to come again
_LATEST_RETRY_S = 60
_TOLD_S = 0.5  # between two times that the engine is told how many answers there were


class Busy(Exception):
    """As many sequences are unfinished as there may be."""

    def __init__(self, message: str, retry_s: int) -> None:
        super().__init__(message)
        self.retry_s = retry_s


@dataclass(slots=True, eq=False)
class LiveCall:
    """A call that is with the engine. Its choices' tokens are in `call`, and grow."""

    number: int
    call: Call
    texts: dict[int, str] = field(default_factory=dict)  # of choices that have ended
    fresh: list[int] = field(default_factory=list)  # choices with news since it was cleared
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # there are fresh ones, or:
    lost: bool = False  # no more will come

    @property
    def finished(self) -> bool:
        return len(self.texts) == len(self.call.choices)


class EngineClient:
    """`run` until the engine is gone; then `state` is LOST."""

    def __init__(self, setup: Setup, tokenizer: Tokenizer, model: ModelConfig) -> None:
        self.state = STARTING
        self.setup = setup
        self.tokenizer = tokenizer
        self.created_s = int(time.time())
        self.context: BodyContext | None = None  # once it is READY
        self.limits: SchedulerConfig | None = None
        self._model = model
        self._writer: asyncio.StreamWriter | None = None
        self._calls: dict[int, LiveCall] = {}
        self._num_calls = 0
        self._num_unfinished = 0  # sequences
        self._ends_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._answers: Counter[int] = Counter()  # by status
        self._telling: asyncio.TimerHandle | None = None

    async def run(self, end: socket.socket, first: ToEngine) -> None:
        """Say `first`, then take what the engine says until it closes the socket."""
        reader, self._writer = await asyncio.open_connection(sock=end)
        self._send(first)
        unframer = Unframer(ToServer)
        try:
            while data := await reader.read(_CHUNK_BYTES):
                for message in unframer.feed(data):
                    self._take(message)
        except ConnectionError:
            pass  # rank 0 has died: what follows is the same
        finally:
            self.state = LOST
            for live in self._calls.values():
                live.lost = True
                live.changed.set()
            self._writer.close()

    def ask(self, call: Call, *, stream: bool) -> LiveCall:
        """Hand a call to the engine, which must be READY. Busy: not now.

        ValueError: it could never be carried out.
        """
        assert self.limits is not None
        wanted, most = len(call.choices), self.setup.max_unfinished
        if wanted > most:
            raise ValueError(f"{wanted} choices are asked for; at most {most} can be at once")
        for request in call.requests:
            self.limits.check(request)
        if self._num_unfinished + wanted > most:
            raise Busy(
                f"{self._num_unfinished} sequences are running or waiting, {wanted} more would be "
                f"above {most}: try again later",
                self._retry_s(self._num_unfinished + wanted - most),
            )
        number = self._num_calls
        prompts = [
            Prompt(
                request.request_id,
                request.prompt_token_ids,
                request.params,
                *(() if request.trace is None else (
                    request.trace.traceparent, request.trace.tracestate,
                )),
            )
            for request in call.requests
        ]  # fmt: skip
        self._send(Ask(number, prompts, stream))
        # Only now: a call that cannot be sent takes no place.
        self._num_calls += 1
        self._num_unfinished += wanted
        live = self._calls[number] = LiveCall(number, call)
        return live

    def leave(self, live: LiveCall) -> None:
        """Nobody waits for it any more; if it has not finished, the engine is told to end it."""
        if self._calls.pop(live.number, None) is None:
            return
        self._num_unfinished -= len(live.call.choices) - len(live.texts)
        if not live.finished and self.state != LOST:
            self._send(Abort(live.number))

    def count_answer(self, status: int) -> None:
        """A body has been answered; rank 0 publishes how many were."""
        self._answers[status] += 1
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_TOLD_S, self._tell_answers)

    def _tell_answers(self) -> None:
        self._telling = None
        if self.state in (READY, DRAINING):  # before, nobody has a place to publish them at
            self._send(Answered({status: self._answers[status] for status in STATUSES}))

    def _take(self, message: ToServer) -> None:
        if isinstance(message, Progress):
            for news in message.news:
                live = self._calls.get(news.call)
                if live is not None:  # else it was left, and this was on its way
                    self._note(live, news)
        elif isinstance(message, Serving):
            self.limits = message.limits
            name = self.setup.model_name
            self.context = body_context(message.limits, self.tokenizer, self._model, name)
            self.state = READY
            self._tell_answers()
        else:
            assert isinstance(message, Drain), message
            self.state = DRAINING
            self._send(Drained())

    def _note(self, live: LiveCall, news: News) -> None:
        choice = live.call.choices[news.choice]
        if news.logprobs is None:
            choice.output += map(SampledToken, news.token_ids)
        else:
            choice.output += [
                SampledToken(token_id, logprob, top)
                for token_id, (logprob, top) in zip(news.token_ids, news.logprobs, strict=True)
            ]
        if news.ended is not None:
            choice.finish_reason = news.ended.reason
            choice.num_cached_tokens = news.ended.num_cached_tokens
            live.texts[news.choice] = news.ended.text
            self._num_unfinished -= 1
            self._ends_s.append(time.monotonic())
        live.fresh.append(news.choice)
        live.changed.set()

    def _retry_s(self, too_many: int) -> int:
        """How long it may take until so many sequences have ended, as the last ones did."""
        ends = self._ends_s
        if len(ends) < 2:
            return 1
        per_end_s = (time.monotonic() - ends[0]) / len(ends)
        return max(1, min(_LATEST_RETRY_S, math.ceil(too_many * per_end_s)))

    def _send(self, message: ToEngine) -> None:
        assert self._writer is not None
        self._writer.write(frame(message))
