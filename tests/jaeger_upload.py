"""What Jaeger's pages and API call a trace, as types; and what its page makes of one. No test.

The types are those of Jaeger's own JSON model (jaegertracing/jaeger, model/json/model.go), the tree
and the name what its page derives from an uploaded file (jaegertracing/jaeger-ui: readJsonFile,
transform-trace-data, selectors/trace, trace-viewer). msgspec checks types and refuses fields that
are not Jaeger's: a misspelt one would be lost without a word.
"""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

# Numbers of a page are doubles; times are uint64 in Jaeger's own model.
LARGEST = 2**53 - 1


class KeyValue(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    type: Literal["string", "bool", "int64", "float64", "binary"]
    value: str | bool | int | float

    def __post_init__(self) -> None:
        kinds = {"string": str, "bool": bool, "int64": int, "float64": float, "binary": str}
        if type(self.value) is not kinds[self.type]:
            raise ValueError(f"{self.key}: {self.value!r} is no {self.type}")


class Reference(msgspec.Struct, rename={"ref_type": "refType"}, forbid_unknown_fields=True):
    ref_type: Literal["CHILD_OF", "FOLLOWS_FROM"]
    traceID: str
    spanID: str


class Log(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: int
    fields: list[KeyValue]


class Process(msgspec.Struct, forbid_unknown_fields=True):
    serviceName: str
    tags: list[KeyValue]


class Span(msgspec.Struct, forbid_unknown_fields=True):
    traceID: str
    spanID: str
    operationName: str
    startTime: int  # microseconds since 1970
    duration: int
    processID: str
    references: list[Reference] = []
    tags: list[KeyValue] = []
    logs: list[Log] = []
    flags: int = 0
    warnings: list[str] | None = None


class Trace(msgspec.Struct, forbid_unknown_fields=True):
    traceID: str
    spans: list[Span]
    processes: dict[str, Process]
    warnings: list[str] | None = None


class _Other(msgspec.Struct):
    """Keys beside `data` are no business of the page, but for one."""

    data: list[Trace]


def read_upload(text: bytes) -> list[Trace]:
    """The traces of a file, as the page finds them.

    msgspec.ValidationError where a type is not Jaeger's; ValueError where the page would take the
    file for another format.
    """
    top: dict[str, Any] = msgspec.json.decode(text)
    if "resourceSpans" in top:
        raise ValueError("the page would take this file for OTLP, and not look at `data`")
    return msgspec.json.decode(text, type=_Other).data


def problems(trace: Trace) -> Iterator[str]:
    """What the page would drop, rename, warn of, or fail at."""
    ids = [span.spanID for span in trace.spans]
    if not trace.spans:
        yield f"trace {trace.traceID} has no span"
    if len(set(ids)) < len(ids):
        yield f"{len(ids) - len(set(ids))} span ids of trace {trace.traceID} come twice"
    if not _is_hex(trace.traceID, 32):
        yield f"trace id {trace.traceID!r} is not 32 hex digits, not all 0"
    for span in trace.spans:
        name = f"span {span.operationName} {span.spanID}"
        if span.traceID != trace.traceID:
            yield f"{name} is of trace {span.traceID}, in {trace.traceID}"
        if not _is_hex(span.spanID, 16):
            yield f"{name}: its id is not 16 hex digits, not all 0"
        if not span.operationName:
            yield f"{name} has no name"
        if not 0 < span.startTime <= span.startTime + span.duration <= LARGEST:
            yield f"{name}: from {span.startTime} for {span.duration} us"
        if span.processID not in trace.processes:
            yield f"{name}: process {span.processID!r} is not there"
        if not 0 <= span.flags < 2**32:
            yield f"{name}: flags {span.flags}"
        keys = [tag.key for tag in span.tags]
        if len(set(keys)) < len(keys):
            yield f"{name} has a tag twice"
        # The first reference places a span in the tree.
        for number, one in enumerate(span.references):
            if one.ref_type == "CHILD_OF" and (number or one.traceID != trace.traceID):
                yield f"{name}: its parent {one.spanID} is of another trace, or not its first"
            if not _is_hex(one.traceID, 32) or not _is_hex(one.spanID, 16):
                yield f"{name} refers to {one.traceID}/{one.spanID}"


def orphans(trace: Trace) -> list[Span]:
    """The spans whose parent is not in the file: the page warns of them, and puts them on top."""
    ids = {span.spanID for span in trace.spans}
    children = ((span, one) for span in trace.spans for one in span.references)
    return [s for s, one in children if one.ref_type == "CHILD_OF" and one.spanID not in ids]


def roots(trace: Trace) -> list[Span]:
    """The spans at the top of the page's tree, earliest first."""
    ids = {span.spanID for span in trace.spans}
    top = [s for s in trace.spans if not s.references or s.references[0].spanID not in ids]
    return sorted(top, key=lambda span: span.startTime)


def _is_hex(text: str, digits: int) -> bool:
    return len(text) == digits and set(text) <= set("0123456789abcdef") and set(text) != {"0"}
