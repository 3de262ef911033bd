"""Histograms of durations and sizes, counted by numpy.

Owns the buckets and the tables of counts. Each histogram counts in fine buckets, sixteen
(durations) or eight (sizes) to an octave, every edge of the coarse ones among them: Prometheus gets
the coarse ones by summing, exactly; quantiles come from the fine ones, good to about 5%. The
histograms of one family are rows of one table, so that a batch of values for any of them is
counted in a few passes. Knows nothing of what is counted.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

Key = TypeVar("Key", bound=Hashable)

_MASK64 = (1 << 64) - 1
_CELL_BITS = 8  # cells of a Scale's look-up: 256 to an octave, far narrower than any bucket
_CELL_SHIFT = 52 - _CELL_BITS  # float64 has 52 bits behind the point


class Scale:
    """Bucket edges (inclusive upper bounds) from `smallest` up, `per_octave` to a doubling.

    `bounds` are the edges shown to Prometheus, those of the octaves `shown`, in base units.
    """

    def __init__(
        self, smallest: int, octaves: int, per_octave: int, shown: range, unit: float
    ) -> None:
        exponents = np.arange(octaves * per_octave + 1) / per_octave
        self.edges: Integers = np.floor(smallest * 2.0**exponents).astype(np.int64)
        self.unit = unit
        self.bounds = [float(f"{smallest * 2**octave * unit:.9g}") for octave in shown]
        self._shown = np.array([octave * per_octave for octave in shown])
        self._starts = np.append(0, self._shown + 1)
        # A value's cell is the top of its float64; no cell holds more than one edge.
        self._above = int(self.edges[-1]) + 1
        cells = np.arange(_cells(np.array([1]))[0], _cells(np.array([self._above]))[0] + 1)
        starts = (cells << _CELL_SHIFT).view(np.float64)
        self._first_cell = int(cells[0])
        self._bucket_of_cell: Integers = np.searchsorted(self.edges, starts, side="left")
        self._edge_of_bucket = np.append(self.edges, np.iinfo(np.int64).max)

    def index(self, values: Integers) -> Integers:
        """The bucket of each value: a look-up and one comparison, a tenth of a binary search."""
        clipped = np.clip(values, 1, self._above)
        buckets = self._bucket_of_cell[_cells(clipped) - self._first_cell]
        return buckets + (clipped > self._edge_of_bucket[buckets])

    def cumulative(self, counts: Integers) -> Integers:
        """Of [..., buckets] counts: those at or below each of `bounds`, then all."""
        shown: Integers = np.add.reduceat(counts, self._starts, axis=-1)
        return np.cumsum(shown, axis=-1)

    def shown_bucket(self, values: Integers) -> Integers:
        """Which of `bounds` is the smallest that holds each value; len(bounds): none."""
        buckets: Integers = np.searchsorted(self._shown, self.index(values), side="left")
        return buckets


def _cells(values: Integers) -> Integers:
    return values.astype(np.float64).view(np.int64) >> _CELL_SHIFT


# 1 µs x 2^0 .. 2^18 are shown; the fine edges start at 125 ns and end at 67 s.
# 125 ns x 2^3 = 1 µs exactly, so the shown edges are whole nanoseconds.
DURATIONS = Scale(125, 29, 16, range(3, 22), 1e-9)
# Steps and phases take longer than collectives: 1 µs x 2^0 .. 2^24, the first 19 the same.
LONG_DURATIONS = Scale(125, 29, 16, range(3, 28), 1e-9)
# Requests take longer still: 1 ms x 2^0 .. 2^18, fine edges up to 1049 s.
REQUEST_DURATIONS = Scale(125_000, 23, 16, range(3, 22), 1e-9)
# A token of one: 125 us x 2^0 .. 2^16, 8 s.
TOKEN_DURATIONS = Scale(125_000, 23, 16, range(17), 1e-9)
# 64 B x 4^0 .. 4^10 are shown.
SIZES = Scale(64, 24, 8, range(0, 21, 2), 1.0)


class Histogram:
    """Counts of one series. Sums are exact integers of the scale's unit."""

    __slots__ = ("_row", "_table", "scale")

    def __init__(
        self, scale: Scale, table: "HistogramTable[Any] | None" = None, row: int = 0
    ) -> None:
        self.scale = scale
        self._table = table if table is not None else HistogramTable(scale)
        self._row = row if table is not None else self._table.row(())

    @property
    def counts(self) -> Integers:
        """int64 [buckets]; a view, good until the next values are counted."""
        counts: Integers = self._table.counts[self._row]
        return counts

    @property
    def total(self) -> int:
        return int(self._table.totals[self._row])

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def add(self, values: Integers) -> None:
        self._table.add(np.full(len(values), self._row), values)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count), as prometheus_client takes them."""
        bounds = [*map(repr, self.scale.bounds), "+Inf"]
        return list(zip(bounds, map(float, self.scale.cumulative(self.counts)), strict=True))

    @property
    def sum(self) -> float:
        return self.total * self.scale.unit

    def quantile(self, fraction: float) -> float | None:
        """The value that `fraction` of the counted ones do not exceed; None without any."""
        return merged_quantile([self], fraction)


def merged_quantile(histograms: Sequence[Histogram], fraction: float) -> float | None:
    """A quantile of several histograms of one scale, as if they were one."""
    counts = np.sum([histogram.counts for histogram in histograms], axis=0)
    total = int(counts.sum())
    if not total:
        return None
    scale = histograms[0].scale
    target = max(1, int(np.ceil(fraction * total)))
    bucket = int(np.searchsorted(np.cumsum(counts), target))
    edges = scale.edges
    upper = edges[min(bucket, len(edges) - 1)]
    lower = edges[bucket - 1] if 0 < bucket < len(edges) else upper
    return float(np.sqrt(float(lower) * float(upper))) * scale.unit


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A value that stands for its bucket, and the trace it came from."""

    trace_id: int
    span_id: int  # 0: none
    value: float  # base units
    time_s: float  # since the epoch


@dataclass(frozen=True, slots=True)
class Frozen(Generic[Key]):
    """A table as it was at one moment: `n` series with values, `b` shown bounds."""

    scale: Scale
    keys: list[Key]
    cumulative: Integers  # [n, b + 1], the last column all
    sums: Floats  # [n], base units
    exemplars: dict[int, list[Exemplar | None]]  # by place in keys: b + 1


class HistogramTable(Mapping[Key, Histogram]):
    """The histograms of one family by key; a key's row stays the same for good.

    As a mapping it holds the series that have counted something.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._keys: list[Key] = []
        self._rows: dict[Key, int] = {}
        self.counts: Integers = np.zeros((1, len(scale.edges) + 1), np.int64)
        self.totals: Integers = np.zeros(1, np.int64)
        # by row and shown bucket: trace id (high, low), span id, value, time_ns of its end
        self._exemplars: Integers = np.zeros((0, len(scale.bounds) + 1, 5), np.int64)

    def row(self, key: Key) -> int:
        """The row of a key, made on first sight."""
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._keys)
            self._keys.append(key)
            if row >= len(self.totals):
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
                self.totals = np.concatenate([self.totals, np.zeros_like(self.totals)])
        return row

    def add(self, rows: Integers, values: Integers) -> None:
        """Count values[i] in row rows[i]."""
        width = self.counts.shape[1]
        np.add.at(self.counts.reshape(-1), rows * width + self.scale.index(values), 1)
        np.add.at(self.totals, rows, values)

    def exemplify(
        self, rows: Integers, values: Integers, ends_ns: Integers, trace_id: int, span_ids: Integers
    ) -> None:
        """Let the last value in each bucket that these fall in stand for it; ends are time_ns."""
        number = len(self.totals)
        if len(self._exemplars) < number:
            grown = np.zeros((number, len(self.scale.bounds) + 1, 5), np.int64)
            grown[: len(self._exemplars)] = self._exemplars
            self._exemplars = grown
        high, low = np.array([trace_id >> 64, trace_id & _MASK64], np.uint64).view(np.int64)
        stored = np.empty((len(rows), 5), np.int64)
        stored[:, 0], stored[:, 1] = high, low
        stored[:, 2], stored[:, 3], stored[:, 4] = span_ids, values, ends_ns
        self._exemplars[rows, self.scale.shown_bucket(values)] = stored

    def freeze(self) -> Frozen[Key]:
        """A copy that later values do not change."""
        number = len(self._keys)
        cumulative = self.scale.cumulative(self.counts[:number])
        used = np.flatnonzero(cumulative[:, -1])
        return Frozen(
            self.scale,
            [self._keys[row] for row in used.tolist()],
            cumulative[used],
            self.totals[used].astype(np.float64) * self.scale.unit,
            self._frozen_exemplars(used),
        )

    def _frozen_exemplars(self, used: Integers) -> dict[int, list[Exemplar | None]]:
        newest: Integers = self._exemplars[:, :, 4].max(axis=1, initial=0)  # no time is 0
        found: dict[int, list[Exemplar | None]] = {}
        for place, row in enumerate(used.tolist()):
            if row < len(newest) and newest[row]:
                found[place] = [
                    Exemplar(
                        (high & _MASK64) << 64 | low & _MASK64,
                        span & _MASK64,
                        value * self.scale.unit,
                        end_ns * 1e-9,
                    )
                    if end_ns
                    else None
                    for high, low, span, value, end_ns in self._exemplars[row].tolist()
                ]
        return found

    def __getitem__(self, key: Key) -> Histogram:
        histogram = Histogram(self.scale, self, self._rows[key])
        if not histogram.count:
            raise KeyError(key)
        return histogram

    def __iter__(self) -> Iterator[Key]:
        return iter([self._keys[row] for row in self._used()])

    def __len__(self) -> int:
        return len(self._used())

    def _used(self) -> list[int]:
        rows: list[int] = np.flatnonzero(self.counts[: len(self._keys)].any(axis=1)).tolist()
        return rows
