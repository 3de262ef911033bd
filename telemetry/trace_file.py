"""The trace file: one JSON object that both Perfetto's page and Jaeger's open.

    {"traceEvents": [Chrome trace events ...],     Perfetto reads this and skips keys it does not
     "data": [Jaeger traces, one per step ...],    know; Jaeger's upload reads `data` alone
     "otherData": {engine, epoch, what was left out}}

`traceEvents` come first, as Perfetto reads a stream; strings are ASCII, which older versions of
it need. A key `resourceSpans` must never appear at the top: Jaeger would take the file for OTLP.

Keeps the latest steps, up to a number of steps and of spans, and says how many it left out. Steps
that have something to show (`notable`) are left out last, as long as they are no more than half;
of requests it keeps the latest, too. Knows neither how a step becomes spans nor what the formats
are.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from heapq import merge
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar

from .spans import Span
from .trace_formats import ChromeEvents, by_trace, jaeger_trace


class _Weighed(Protocol):
    @property
    def num_records(self) -> int: ...


Step = TypeVar("Step", bound=_Weighed)


class TraceFile(Generic[Step]):
    """Holds steps as records (64 bytes an operation) and renders them once, at the end."""

    def __init__(
        self,
        path: str,
        *,
        engine_id: str,
        service_name: str,
        max_steps: int,
        max_spans: int,
    ) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise ValueError(f"trace_file {path}: its directory does not exist")
        if self.path.is_dir():
            raise ValueError(f"trace_file {path} is a directory")
        self._engine_id = engine_id
        self._service_name = service_name
        self._max_steps = max_steps
        self._max_spans = max_spans
        # Each with its place in the file; no step is in both.
        self._ordinary: deque[tuple[int, Step]] = deque()
        self._notable: deque[tuple[int, Step]] = deque()
        self._added = 0
        self._notable_records = 0
        self._requests: deque[Span] = deque(maxlen=max_spans)
        self._records = 0
        self.left_out = 0  # steps

    def __len__(self) -> int:
        return len(self._ordinary) + len(self._notable)

    @property
    def _steps(self) -> list[Step]:
        both = merge(self._ordinary, self._notable, key=lambda numbered: numbered[0])
        return [step for _, step in both]

    def add(self, step: Step, *, notable: bool = False) -> None:
        (self._notable if notable else self._ordinary).append((self._added, step))
        self._added += 1
        self._records += step.num_records
        self._notable_records += step.num_records if notable else 0
        while len(self) > self._max_steps or (self._records > self._max_spans and len(self) > 1):
            self._leave_one_out()

    def _leave_one_out(self) -> None:
        crowded = (
            2 * len(self._notable) > self._max_steps or 2 * self._notable_records > self._max_spans
        )
        if self._notable and (crowded or not self._ordinary):
            _, step = self._notable.popleft()
            self._notable_records -= step.num_records
        else:
            _, step = self._ordinary.popleft()
        self._records -= step.num_records
        self.left_out += 1

    def add_requests(self, spans: Iterable[Span]) -> None:
        self._requests.extend(spans)

    def write(self, build: Callable[[Step], list[Span]]) -> None:
        """Write the file whole or not at all. Raises OSError."""
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(unfinished, "w", encoding="ascii") as file:
                self._write(file, build)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _write(self, file: TextIO, build: Callable[[Step], list[Span]]) -> None:
        # Built twice, once per format, rather than held: the spans weigh ten times the records.
        steps = self._steps
        starts = [span.start_ns for span in self._requests]
        if steps:
            starts += [span.start_ns for span in build(steps[0])]
        epoch_ns = min(starts, default=0)
        events = ChromeEvents(self._service_name, epoch_ns)
        file.write('{"traceEvents":[\n')
        spans = (span for step in steps for span in build(step))
        separator = _write_list(file, (event for span in spans for event in events.of(span)))
        _write_list(
            file, (event for span in self._requests for event in events.of(span)), separator
        )
        file.write('],\n"displayTimeUnit":"ns",\n"data":[\n')
        separator = _write_list(file, (self._jaeger(build(step)) for step in steps))
        _write_list(file, map(self._jaeger, by_trace(self._requests)), separator)
        other = {
            "engine_id": self._engine_id,
            "epoch_ns": str(epoch_ns),
            "steps": str(len(steps)),
            "steps_left_out": str(self.left_out),
            "requests": str(len(self._requests)),
        }
        file.write(f'],\n"otherData":{json.dumps(other)}}}\n')

    def _jaeger(self, spans: list[Span]) -> dict[str, Any]:
        return jaeger_trace(spans, self._service_name, self._engine_id)


def _write_list(file: TextIO, items: Iterable[Any], separator: str = "") -> str:
    """Returns what must stand before one more item."""
    for item in items:
        file.write(separator)
        file.write(json.dumps(item, separators=(",", ":")))
        separator = ",\n"
    return separator
