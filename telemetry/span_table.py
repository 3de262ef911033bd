"""The spans of steps as columns: what is built, encoded and written without an object a span.

Owns the columns, and how a span of them is read as one object. Knows neither how they came about
(`span_builder`) nor any format.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .span_shapes import Column, name_at, shape_of
from .spans import Attribute, Span, UnsignedWords, Words

NO_ERROR, NEVER_ENDED = -1, -2  # where no entry of the names stands


@dataclass(slots=True)
class RankSpans:
    """Spans of one rank, each worker.step before what is inside it. All int64 [n] but as noted."""

    rank: int
    names: Sequence[str]
    shape: Words  # see `span_shapes`
    error: Words  # entry of the names, NO_ERROR or NEVER_ENDED
    trace: UnsignedWords  # uint64 [n, 2]: high, low
    span_id: UnsignedWords  # uint64
    parent_id: UnsignedWords  # uint64
    start_ns: Words  # time_ns
    end_ns: Words
    step: Words
    nbytes: Words
    number: Words
    wait_ns: Words
    is_last: Words  # 0 or 1
    cut_ns: Words
    frame: Words  # row of `frames`, or -1
    frames: Words  # [f, 6]: sequence, bytes, metadata bytes, broadcasts, first ns, last ns

    def __len__(self) -> int:
        return len(self.shape)

    def values(self, column: Column, where: Any) -> Words:
        """A column at these places."""
        place = _FRAME_COLUMNS.get(column)
        if place is not None:
            found: Words = self.frames[self.frame[where], place]
        else:
            found = getattr(self, column.value)[where]
        return found

    def error_text(self, error: int) -> str | None:
        if error == NO_ERROR:
            return None
        return "never ended" if error == NEVER_ENDED else name_at(self.names, error)


_FRAME_COLUMNS = {
    column: place
    for place, column in enumerate(
        (
            Column.FRAME_SEQUENCE,
            Column.FRAME_BYTES,
            Column.FRAME_METADATA,
            Column.FRAME_BROADCASTS,
            Column.FRAME_FIRST,
            Column.FRAME_LAST,
        )
    )
}


@dataclass(slots=True)
class SpanTable:
    engines: list[Span]  # one per step, on the node of rank 0
    ranks: list[RankSpans]

    def __len__(self) -> int:
        return len(self.engines) + sum(map(len, self.ranks))

    def spans(self) -> Iterator[Span]:
        """One by one, parents before children."""
        yield from self.engines
        for part in self.ranks:
            for place in range(len(part)):
                yield _span(part, place)


def _span(part: RankSpans, place: int) -> Span:
    error = part.error_text(int(part.error[place]))
    shape = shape_of(int(part.shape[place]), part.names, error)
    attributes: dict[str, Attribute] = {}
    for key, value in shape.attributes:
        if isinstance(value, Column):
            number = int(part.values(value, place))
            value = bool(number) if value is Column.IS_LAST else number
        attributes[key] = value
    high, low = part.trace[place].tolist()
    return Span(
        high << 64 | low,
        int(part.span_id[place]),
        int(part.parent_id[place]),
        shape.name,
        part.rank,
        int(part.start_ns[place]),
        int(part.end_ns[place]),
        attributes,
        error,
    )
