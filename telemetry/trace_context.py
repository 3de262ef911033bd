"""The trace context that a request comes with, as W3C Trace Context writes it.

Owns the syntax of both values. Knows nothing of requests or spans.

    traceparent   00-<trace id: 32 hex digits>-<parent span id: 16>-<flags: 2>; a version above 00
                  may go on after another `-`
    tracestate    key=value,key=value: up to 32 members, handed on as they are
"""

import re
from typing import NamedTuple

MAX_STATE_BYTES = 512  # W3C asks to hand on at least so many

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z0-9][a-z0-9_\-*/]{0,240}(?:@[a-z][a-z0-9_\-*/]{0,13})?"
_MEMBER = re.compile(_KEY + r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
_MAX_MEMBERS = 32
_SAMPLED = 1


class TraceContext(NamedTuple):
    trace_id: int  # 128 bits
    span_id: int  # 64 bits; the caller's span, parent of ours
    flags: int  # 8 bits

    @property
    def sampled(self) -> bool:
        return bool(self.flags & _SAMPLED)


def parse_traceparent(text: str) -> TraceContext:
    """ValueError says what is wrong with it."""
    found = _PARENT.fullmatch(text.strip())
    if found is None:
        raise ValueError("it is not of the form 00-<32 hex digits>-<16 hex digits>-<2 hex digits>")
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        raise ValueError(f"version {version} does not look like this")
    if not int(trace_id, 16) or not int(span_id, 16):
        raise ValueError("its ids must not be zero")
    return TraceContext(int(trace_id, 16), int(span_id, 16), int(flags, 16))


def parse_tracestate(text: str) -> str:
    """The state without its empty members and blanks. ValueError says what is wrong with it."""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    if len(members) > _MAX_MEMBERS:
        raise ValueError(f"it has {len(members)} members; at most {_MAX_MEMBERS} are allowed")
    for member in members:
        if _MEMBER.fullmatch(member) is None:
            raise ValueError(f"{member[:60]!r} is not a member key=value")
    keys = [member.partition("=")[0] for member in members]
    if len(set(keys)) < len(keys):
        raise ValueError("a key comes twice")
    state = ",".join(members)
    if len(state) > MAX_STATE_BYTES:
        raise ValueError(f"it has {len(state)} characters; at most {MAX_STATE_BYTES} are kept")
    return state
