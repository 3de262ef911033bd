"""Spans become the bytes of OTLP's ExportTraceServiceRequest.

Owns which field holds what, and how large a request may be. Knows nothing of sending it. What the
SDK's encoder would write for the same spans, a parser finds in these bytes too.

    ExportTraceServiceRequest
      1 ResourceSpans              one per rank
        1 Resource
          1 KeyValue ...
        2 ScopeSpans
          1 InstrumentationScope   1 name | 2 version
          2 Span ...
    Span
      1 trace id | 2 span id | 3 trace state | 4 parent's span id | 5 name | 6 kind
      7 start, 8 end: fixed64 | 9 KeyValue ... | 13 Link ... | 14 links left out
      15 Status: 2 message | 3 code | 16 flags: fixed32
    Link   1 trace id | 2 span id | 6 flags
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .otlp_wire import (
    PADDED_BYTES,
    Piece,
    Template,
    any_value,
    block,
    block_head,
    fixed32,
    fixed64,
    hole,
    key_value,
    padded_varints,
    piece_block,
    tag,
    varint,
)
from .span_shapes import Column, Shape, shape_of
from .span_table import RankSpans, SpanTable
from .spans import Attribute, Link, Span

MAX_REQUEST_BYTES = 3 << 20  # grpc servers take 4 MiB unless told otherwise
_BLOB_BYTES = MAX_REQUEST_BYTES // 4
_SCOPE = "onecast.telemetry"
_INTERNAL, _SERVER = 1, 2  # span kinds
_IS_REMOTE_KNOWN, _IS_REMOTE = 0x100, 0x200  # span flags: whether the parent is another program's
_ERROR = 2  # status code
_MAX_CACHED_LINKS = 1 << 16


class Encoded(NamedTuple):
    """One request, ready to be sent."""

    body: bytes
    num_spans: int


class _Blob(NamedTuple):
    """Spans of one rank, encoded."""

    rank: int | None
    body: bytes | bytearray
    num_spans: int


class OtlpEncoder:
    """Encodes tables and single spans. `resources`: attributes by rank, None for the engine."""

    def __init__(
        self, resources: Mapping[int | None, Mapping[str, Attribute]], scope_version: str
    ) -> None:
        self._resources = resources
        scope = block(1, _SCOPE.encode()) + block(2, scope_version.encode())
        self._scope = block(1, scope)
        self._templates: dict[tuple[int, int, str | None], Template] = {}
        self._links: dict[Link, bytes] = {}

    def encode(self, table: SpanTable, spans: Sequence[Span] = ()) -> list[Encoded]:
        """As many requests as it takes; spans of one rank stand together."""
        singles = self._singles([*table.engines, *spans])
        blobs = [*singles, *(blob for part in table.ranks for blob in self._rank(part))]
        return list(self._pack(blobs))

    # -- requests ------------------------------------------------------------------------------

    def _pack(self, blobs: Iterable[_Blob]) -> Iterator[Encoded]:
        group: list[_Blob] = []
        size = 0
        for blob in blobs:
            if group and size + len(blob.body) > MAX_REQUEST_BYTES:
                yield self._request(group)
                group, size = [], 0
            group.append(blob)
            size += len(blob.body)
        if group:
            yield self._request(group)

    def _request(self, blobs: Sequence[_Blob]) -> Encoded:
        by_rank: dict[int | None, list[bytes | bytearray]] = {}
        for blob in blobs:
            by_rank.setdefault(blob.rank, []).append(blob.body)
        out: list[bytes | bytearray] = []
        for rank, bodies in by_rank.items():
            resource = block(1, self._resource(rank))
            length = len(self._scope) + sum(map(len, bodies))
            scope_head = block_head(2, length)
            out.append(block_head(1, len(resource) + len(scope_head) + length))
            out += [resource, scope_head, self._scope, *bodies]
        return Encoded(b"".join(out), sum(blob.num_spans for blob in blobs))

    def _resource(self, rank: int | None) -> bytes:
        attributes = self._resources[rank].items()
        return b"".join(_constant(1, key, value).body for key, value in attributes)

    # -- spans as columns ----------------------------------------------------------------------

    def _rank(self, part: RankSpans) -> Iterator[_Blob]:
        # Spans of one shape stand together: one template each.
        order = np.lexsort((part.shape, part.error))
        shapes, errors = part.shape[order], part.error[order]
        edges = np.flatnonzero((np.diff(shapes) != 0) | (np.diff(errors) != 0)) + 1
        bounds = [0, *edges.tolist(), len(order)]
        plain = {
            "trace_high": part.trace[order, 0],
            "trace_low": part.trace[order, 1],
            "span": part.span_id[order],
            "parent": part.parent_id[order],
            "start": part.start_ns[order],
            "end": part.end_ns[order],
        }
        padded: dict[str, np.ndarray[tuple[int], np.dtype[np.uint64]]] = {}
        for first, last in pairwise(bounds):
            error = part.error_text(int(errors[first]))
            shape = int(shapes[first])
            template = self._template(part, shape, error)
            varying = [Column[name] for name in template.names if name not in plain]
            frame_values = {}
            for column in varying:
                if column.name.startswith("FRAME_"):
                    where = order[first:last]
                    frame_values[column.name] = padded_varints(part.values(column, where))
                elif column.name not in padded:
                    values = part.values(column, order)
                    padded[column.name] = (
                        values.astype(np.uint64)
                        if column is Column.IS_LAST
                        else padded_varints(values)
                    )
            most = max(1, _BLOB_BYTES // template.nbytes)
            for start in range(first, last, most):
                cut = slice(start, min(start + most, last))
                columns = {name: values[cut] for name, values in plain.items()}
                columns |= {name: values[cut] for name, values in padded.items()}
                in_shape = slice(cut.start - first, cut.stop - first)
                columns |= {name: values[in_shape] for name, values in frame_values.items()}
                number = cut.stop - cut.start
                yield _Blob(part.rank, template.fill(columns, number), number)

    def _template(self, part: RankSpans, shape: int, error: str | None) -> Template:
        key = part.rank, shape, error
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = _template(shape_of(shape, part.names, error))
        return template

    # -- spans one by one ----------------------------------------------------------------------

    def _singles(self, spans: Sequence[Span]) -> Iterator[_Blob]:
        for span in spans:
            yield _Blob(span.rank, block(2, self._span(span)), 1)

    def _span(self, span: Span) -> bytes:
        flags = _IS_REMOTE_KNOWN
        if span.serves and span.parent_id is not None:
            flags |= _IS_REMOTE
        parts = [
            block(1, span.trace_id.to_bytes(16)),
            block(2, span.span_id.to_bytes(8)),
            block(3, span.trace_state.encode()) if span.trace_state else b"",
            block(4, span.parent_id.to_bytes(8)) if span.parent_id is not None else b"",
            block(5, _text(span.name)),
            tag(6, 0) + varint(_SERVER if span.serves else _INTERNAL),
            fixed64(7, span.start_ns),
            fixed64(8, span.end_ns),
            *(_constant(9, key, value).body for key, value in span.attributes.items()),
            *map(self._link, span.links),
            tag(14, 0) + varint(span.dropped_links) if span.dropped_links else b"",
            _status(span.error),
            fixed32(16, flags),
        ]
        return b"".join(parts)

    def _link(self, link: Link) -> bytes:
        known = self._links.get(link)
        if known is None:
            if len(self._links) >= _MAX_CACHED_LINKS:
                self._links.clear()
            ids = block(1, link.trace_id.to_bytes(16)) + block(2, link.span_id.to_bytes(8))
            known = self._links[link] = block(13, ids + fixed32(6, _IS_REMOTE_KNOWN))
        return known


def _template(shape: Shape) -> Template:
    ids = Piece(block_head(1, 16)) + hole("trace_high", ">u8", 8) + hole("trace_low", ">u8", 8)
    ids += Piece(block_head(2, 8)) + hole("span", ">u8", 8)
    ids += Piece(block_head(4, 8)) + hole("parent", ">u8", 8)
    span = ids + Piece(block(5, _text(shape.name)) + tag(6, 0) + varint(_INTERNAL))
    span += Piece(tag(7, 1)) + hole("start", "<u8", 8) + Piece(tag(8, 1)) + hole("end", "<u8", 8)
    for key, value in shape.attributes:
        span += _attribute(key, value)
    span += Piece(_status(shape.error) + fixed32(16, _IS_REMOTE_KNOWN))
    return Template(piece_block(2, span))


def _attribute(key: str, value: Attribute | Column) -> Piece:
    if not isinstance(value, Column):
        return _constant(9, key, value)
    if value is Column.IS_LAST:
        return key_value(9, key, Piece(tag(2, 0)) + hole(value.name, "u1", 1))
    return key_value(9, key, Piece(tag(3, 0)) + hole(value.name, "<u8", PADDED_BYTES))


def _constant(number: int, key: str, value: Attribute) -> Piece:
    return key_value(number, key, Piece(any_value(value)))


def _status(error: str | None) -> bytes:
    if error is None:
        return block(15, b"")
    return block(15, block(2, _text(error)) + tag(3, 0) + varint(_ERROR))


def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")
