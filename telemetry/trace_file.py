"""The trace file: one JSON object that both Perfetto's page and Jaeger's open.

    {"traceEvents": [Chrome trace events ...],     Perfetto reads this and skips keys it does not
     "data": [Jaeger traces, one per step ...],    know; Jaeger's upload reads `data` alone
     "otherData": {engine, epoch, what was left out}}

`traceEvents` come first, as Perfetto reads a stream; strings are ASCII, which older versions of
it need. Its times are microseconds since the first step, not since 1970: those would not keep
their nanoseconds in a double. Jaeger's are whole microseconds since 1970, each end cut down like
each start, so children stay inside their parents. A key `resourceSpans` must never appear at the
top: Jaeger would take the file for OTLP.

Keeps the latest steps, up to a number of steps and of spans, and says how many it left out.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from .spans import Span
from .steps import JoinedStep

_ENGINE_PID = 1_000_000  # Perfetto's process number of the engine; a rank's is rank + 1


class TraceFile:
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
        self._engine_id = engine_id
        self._service_name = service_name
        self._max_steps = max_steps
        self._max_spans = max_spans
        self._steps: deque[JoinedStep] = deque()
        self._records = 0
        self.left_out = 0  # steps

    def add(self, joined: JoinedStep) -> None:
        self._steps.append(joined)
        self._records += _size(joined)
        while len(self._steps) > self._max_steps or (
            self._records > self._max_spans and len(self._steps) > 1
        ):
            self._records -= _size(self._steps.popleft())
            self.left_out += 1

    def write(self, build: Callable[[JoinedStep], list[Span]]) -> None:
        """Write the file whole or not at all. Raises OSError."""
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(unfinished, "w", encoding="ascii") as file:
                self._write(file, build)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _write(self, file: TextIO, build: Callable[[JoinedStep], list[Span]]) -> None:
        # Built twice, once per format, rather than held: the spans weigh ten times the records.
        epoch_ns = build(self._steps[0])[0].start_ns if self._steps else 0
        ranks = sorted({rank for joined in self._steps for rank in _ranks(joined)})
        events = _Events(self._service_name, epoch_ns)
        file.write('{"traceEvents":[\n')
        _write_list(
            file,
            (
                event
                for joined in self._steps
                for span in build(joined)
                for event in events.of(span)
            ),
        )
        file.write('],\n"displayTimeUnit":"ns",\n"data":[\n')
        processes = self._processes(ranks)
        _write_list(file, (_jaeger(build(joined), processes) for joined in self._steps))
        other = {
            "engine_id": self._engine_id,
            "epoch_ns": str(epoch_ns),
            "steps": str(len(self._steps)),
            "steps_left_out": str(self.left_out),
        }
        file.write(f'],\n"otherData":{json.dumps(other)}}}\n')

    def _processes(self, ranks: Iterable[int]) -> dict[str, Any]:
        processes = {
            _process_id(None): {
                "serviceName": self._service_name,
                "tags": [_tag("service.instance.id", self._engine_id)],
            }
        }
        for rank in ranks:
            instance = f"{self._engine_id}/rank-{rank}"
            processes[_process_id(rank)] = {
                "serviceName": self._service_name,
                "tags": [_tag("service.instance.id", instance), _tag("onecast.rank", rank)],
            }
        return processes


def _size(joined: JoinedStep) -> int:
    return sum(map(len, joined.rows.values())) + sum(map(len, joined.unfinished.values()))


def _ranks(joined: JoinedStep) -> set[int]:
    return joined.rows.keys() | joined.unfinished.keys()


def _write_list(file: TextIO, items: Iterable[Any]) -> None:
    separator = ""
    for item in items:
        file.write(separator)
        file.write(json.dumps(item, separators=(",", ":")))
        separator = ",\n"


class _Events:
    """Chrome trace events of spans, in order.

    On one thread of that format, events must nest. Phases and waited-for collectives do, on the
    thread of their rank; operations that overlap each other get threads of their own, and engine
    steps, which overlap where a rank runs ahead, are asynchronous events.
    """

    def __init__(self, service_name: str, epoch_ns: int) -> None:
        self._service_name = service_name
        self._epoch_ns = epoch_ns
        self._lanes: dict[int, list[int]] = {}  # by pid: when the last collective of each ended

    def of(self, span: Span) -> Iterator[dict[str, Any]]:
        pid = _ENGINE_PID if span.rank is None else span.rank + 1
        if pid not in self._lanes:
            self._lanes[pid] = [0]
            yield from self._names(pid, "engine" if span.rank is None else f"rank {span.rank}")
        args: dict[str, Any] = dict(span.attributes)
        if span.error is not None:
            args["error"] = span.error
        # "ts" stands before "args": some readers look for it and stop at the first object.
        start = (span.start_ns - self._epoch_ns) / 1000
        if span.rank is None:
            common = {"name": span.name, "cat": "step", "id": f"{span.span_id:x}", "pid": pid}
            end = (span.end_ns - self._epoch_ns) / 1000
            yield {**common, "ph": "b", "ts": start, "tid": pid, "args": args}
            yield {**common, "ph": "e", "ts": end, "tid": pid}
            return
        lane = 0
        if "onecast.collective.op" in span.attributes:
            lanes = self._lanes[pid]
            free = (n for n, end_ns in enumerate(lanes) if end_ns <= span.start_ns)
            lane = next(free, len(lanes))
            if lane == len(lanes):
                lanes.append(0)
                yield _metadata("thread_name", pid, _thread(pid, lane), name=f"overlapping {lane}")
            lanes[lane] = span.end_ns
        yield {
            "name": span.name,
            "ph": "X",
            "ts": start,
            "dur": (span.end_ns - span.start_ns) / 1000,
            "pid": pid,
            "tid": _thread(pid, lane),
            "cat": "collective" if "onecast.collective.op" in span.attributes else "step",
            "args": args,
        }

    def _names(self, pid: int, name: str) -> Iterator[dict[str, Any]]:
        yield _metadata("process_name", pid, pid, name=f"{self._service_name} {name}")
        yield _metadata("thread_name", pid, pid, name=name)
        order = 0 if pid == _ENGINE_PID else pid
        yield _metadata("process_sort_index", pid, pid, sort_index=order)


def _thread(pid: int, lane: int) -> int:
    return pid if lane == 0 else pid * 1000 + lane


def _metadata(name: str, pid: int, tid: int, /, **args: object) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _jaeger(spans: list[Span], processes: dict[str, Any]) -> dict[str, Any]:
    used = {_process_id(span.rank) for span in spans}
    return {
        "traceID": f"{spans[0].trace_id:032x}",
        "spans": [_jaeger_span(span) for span in spans],
        "processes": {key: process for key, process in processes.items() if key in used},
        "warnings": None,
    }


def _jaeger_span(span: Span) -> dict[str, Any]:
    trace = f"{span.trace_id:032x}"
    references = []
    if span.parent_id is not None:
        references.append(
            {"refType": "CHILD_OF", "traceID": trace, "spanID": f"{span.parent_id:016x}"}
        )
    tags = [_tag(key, value) for key, value in span.attributes.items()]
    if span.error is not None:
        tags += [_tag("error", True), _tag("error.type", span.error)]
    return {
        "traceID": trace,
        "spanID": f"{span.span_id:016x}",
        "flags": 1,
        "operationName": span.name,
        "references": references,
        "startTime": span.start_ns // 1000,
        "duration": span.end_ns // 1000 - span.start_ns // 1000,
        "tags": tags,
        "logs": [],
        "processID": _process_id(span.rank),
        "warnings": None,
    }


def _process_id(rank: int | None) -> str:
    return "engine" if rank is None else f"rank{rank}"


def _tag(key: str, value: str | int | bool) -> dict[str, Any]:
    kind = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "string"
    return {"key": key, "type": kind, "value": value}
