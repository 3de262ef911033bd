"""Spans as the two pages read them: Chrome trace events for Perfetto's, JSON for Jaeger's.

Owns both formats. Knows nothing of files.

Chrome's times are microseconds since an epoch of ours, not since 1970: those would not keep
their nanoseconds in a double. Jaeger's are whole microseconds since 1970, each end cut down like
each start, so children stay inside their parents.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .spans import Attribute, Link, Span

_ENGINE_PID = 1_000_000  # Perfetto's process number of the engine; a rank's is rank + 1
_REQUESTS_PID = _ENGINE_PID + 1


class ChromeEvents:
    """Chrome trace events of spans, in order.

    On one thread of that format, events must nest. Phases and waited-for collectives do, on the
    thread of their rank; operations that overlap each other get threads of their own. Engine
    steps, which overlap where a rank runs ahead, and requests are asynchronous events.
    """

    def __init__(self, service_name: str, epoch_ns: int) -> None:
        self._service_name = service_name
        self._epoch_ns = epoch_ns
        self._lanes: dict[int, list[int]] = {}  # by pid: when the last collective of each ended

    def of(self, span: Span) -> Iterator[dict[str, Any]]:
        pid, process = _process(span)
        if pid not in self._lanes:
            self._lanes[pid] = [0]
            yield from self._names(pid, process)
        args: dict[str, Any] = dict(span.attributes)
        if span.error is not None:
            args["error"] = span.error
        if span.links:
            args["links"] = [f"{link.trace_id:032x}/{link.span_id:016x}" for link in span.links]
        # "ts" stands before "args": some readers look for it and stop at the first object.
        start = (span.start_ns - self._epoch_ns) / 1000
        if span.rank is None:
            args["trace/span"] = f"{span.trace_id:032x}/{span.span_id:016x}"
            category = "request" if span.serves else "step"
            common = {"name": span.name, "cat": category, "id": f"{span.span_id:x}", "pid": pid}
            end = (span.end_ns - self._epoch_ns) / 1000
            yield {**common, "ph": "b", "ts": start, "tid": pid, "args": args}
            yield {**common, "ph": "e", "ts": end, "tid": pid}
            return
        is_collective = "onecast.collective.op" in span.attributes
        lane = 0
        if is_collective:
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
            "cat": "collective" if is_collective else "step",
            "args": args,
        }

    def _names(self, pid: int, name: str) -> Iterator[dict[str, Any]]:
        yield _metadata("process_name", pid, pid, name=f"{self._service_name} {name}")
        yield _metadata("thread_name", pid, pid, name=name)
        order = pid - _REQUESTS_PID if pid >= _ENGINE_PID else pid  # requests and engine at the top
        yield _metadata("process_sort_index", pid, pid, sort_index=order)


def _process(span: Span) -> tuple[int, str]:
    if span.rank is not None:
        return span.rank + 1, f"rank {span.rank}"
    return (_REQUESTS_PID, "requests") if span.serves else (_ENGINE_PID, "engine")


def _thread(pid: int, lane: int) -> int:
    return pid if lane == 0 else pid * 1000 + lane


def _metadata(name: str, pid: int, tid: int, /, **args: object) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def jaeger_trace(spans: Sequence[Span], service_name: str, engine_id: str) -> dict[str, Any]:
    """Spans of one trace, at least one, as Jaeger has them; links are references, too."""
    processes = {}
    for rank in {span.rank: None for span in spans}:
        instance = engine_id if rank is None else f"{engine_id}/rank-{rank}"
        tags = [_tag("service.instance.id", instance)]
        if rank is not None:
            tags.append(_tag("onecast.rank", rank))
        processes[_process_id(rank)] = {"serviceName": service_name, "tags": tags}
    return {
        "traceID": f"{spans[0].trace_id:032x}",
        "spans": [_jaeger_span(span) for span in spans],
        "processes": processes,
        "warnings": None,
    }


def _jaeger_span(span: Span) -> dict[str, Any]:
    references = [_reference("FOLLOWS_FROM", link) for link in span.links]
    if span.parent_id is not None:
        references.insert(0, _reference("CHILD_OF", Link(span.trace_id, span.parent_id)))
    tags = [_tag(key, value) for key, value in span.attributes.items()]
    if span.serves:
        tags.append(_tag("span.kind", "server"))
    if span.error is not None:
        tags.append(_tag("error", True))
    return {
        "traceID": f"{span.trace_id:032x}",
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


def _reference(kind: str, to: Link) -> dict[str, str]:
    return {"refType": kind, "traceID": f"{to.trace_id:032x}", "spanID": f"{to.span_id:016x}"}


def _process_id(rank: int | None) -> str:
    return "engine" if rank is None else f"rank{rank}"


def _tag(key: str, value: Attribute) -> dict[str, Any]:
    kind = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "string"
    return {"key": key, "type": kind, "value": value}


def by_trace(spans: Iterable[Span]) -> list[list[Span]]:
    found: dict[int, list[Span]] = {}
    for span in spans:
        found.setdefault(span.trace_id, []).append(span)
    return list(found.values())
