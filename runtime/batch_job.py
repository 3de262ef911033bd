"""A batch file answered by the engine: lines in, result lines out as they are finished.

Owns which lines are under way and what becomes of those that cannot be answered. Knows nothing of
ranks, nor of how a result reaches the disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .batch_file import BatchLine, BatchWriter
from .body_fields import RequestError
from .engine import Engine
from .openai_body import BodyContext, Call, parse_request
from .openai_response import response_body
from .request import Request, Sequence


@dataclass(slots=True)
class _UnderWay:
    """A line whose sequences are with the engine."""

    line: BatchLine
    call: Call
    texts: dict[Sequence, str] = field(default_factory=dict)


class BatchJob:
    """Keeps the engine fed with lines and writes each line's result once all of it is there."""

    def __init__(
        self,
        lines: Iterator[BatchLine],
        writer: BatchWriter,
        engine: Engine,
        context: BodyContext,
        *,
        created_s: int,
        max_queued: int,
        on_result: Callable[[Call | None, list[str]], None],
    ) -> None:
        """`on_result` is told of every result line: the call and the texts of its choices, or
        None where the line could not be answered."""
        self._lines = lines
        self._writer = writer
        self._engine = engine
        self._context = context
        self._created_s = created_s
        self._max_queued = max_queued  # sequences: enough to fill the next steps, not the memory
        self._on_result = on_result
        self._queued = 0
        self._under_way: dict[Request, _UnderWay] = {}

    def run(self) -> None:
        """Answer every line."""
        while True:
            self._feed()
            if not self._engine.has_unfinished:
                return
            try:
                finished = self._engine.step()
            except FloatingPointError as error:
                raise FloatingPointError(self._named_by_user(str(error))) from error
            for sequence, text in finished:
                self._collect(sequence, text)

    def _named_by_user(self, text: str) -> str:
        """With the custom_id of the line whose request `text` names by its id in the engine."""
        for request, entry in self._under_way.items():
            text = text.replace(repr(request.request_id), repr(entry.line.custom_id))
        return text

    def _feed(self) -> None:
        while self._queued < self._max_queued:
            line = next(self._lines, None)
            if line is None:
                return
            if line.problem is not None:
                self._writer.write(line.problem_result())
                self._on_result(None, [])
                continue
            try:
                call = self._start(line)
            except RequestError as error:
                self._writer.write(line.result(error.body(), error.status_code))
                self._on_result(None, [])
                continue
            entry = _UnderWay(line, call)
            for request in call.requests:
                self._under_way[request] = entry
                self._queued += len(request.sequences)

    def _start(self, line: BatchLine) -> Call:
        """Hand all requests of a line to the engine, or none."""
        assert line.custom_id is not None
        call = parse_request(
            line.url,
            line.body,
            request_id=line.key,
            seed_key=line.custom_id,
            context=self._context,
        )
        for number, request in enumerate(call.requests):
            try:
                self._engine.add(request)
            except ValueError as error:
                for added in call.requests[:number]:
                    self._engine.abort(added.request_id)
                # What is left to refuse once the body has been checked against the context.
                raise RequestError(str(error), param="n", code="invalid_value") from error
        return call

    def _collect(self, sequence: Sequence, text: str) -> None:
        entry = self._under_way[sequence.request]
        entry.texts[sequence] = text
        self._queued -= 1
        if len(entry.texts) < len(entry.call.choices):
            return
        texts = [entry.texts[choice] for choice in entry.call.choices]
        body = response_body(
            entry.call,
            texts,
            self._context.tokenizer,
            self._created_s,
            prefix_caching=self._engine.scheduler.config.prefix_caching,
        )
        self._writer.write(entry.line.result(body))
        for request in entry.call.requests:
            del self._under_way[request]
        self._on_result(entry.call, texts)
