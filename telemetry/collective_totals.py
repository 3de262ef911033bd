"""What the collectives of one node's ranks add up to.

Owns their series and how a batch of records is spread over them. Failed operations count as
errors and as nothing else; those that nobody waited for have no end that says how long they took,
so they count as arrivals and not as transfers. Knows neither Prometheus nor traces.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrivals import ArrivalJoiner, Arriving
from .histograms import DURATIONS, HistogramTable, Integers
from .labels import (
    SIZE_CLASSES,
    CollectiveKey,
    GroupKey,
    Part,
    bus_factor,
    group_label,
    name_at,
    size_classes,
)
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    END,
    ERROR,
    META,
    NBYTES,
    NUM_NAMES,
    OK,
    SEQUENCE,
    is_point_to_point,
    meta_group,
    meta_group_size,
    meta_name,
)
from .ring_reader import Rows
from .steps import JoinedStep

_CLASSES = len(SIZE_CLASSES)
_NAME_BITS = (NUM_NAMES - 1).bit_length()
SpanIds = Callable[[int, Rows], npt.NDArray[Any]]  # rank, records: their span ids


class _Source(NamedTuple):
    """One operation of one group on one rank, as its meta words name it."""

    op: str
    group: str
    rank: int
    group_size: int
    op_number: int
    group_number: int  # of the unique name, the same for all ranks


class _Table:
    """The sources' facts as columns, so that a batch looks them up at once."""

    def __init__(self) -> None:
        self.sources: list[_Source] = []
        self.size = np.zeros(64, np.int64)
        self.kind = np.zeros(64, np.int64)  # number of the operation << 16 | size
        self.group = np.zeros(64, np.int64)
        self.factor = np.zeros(64, np.float64)
        self.point_to_point = np.zeros(64, np.bool_)
        self.by_group = np.zeros(64, np.int64)  # row of its GroupKey
        self.series = np.full((64, _CLASSES), -1, np.int64)

    def add(self, source: _Source, by_group: int) -> int:
        number = len(self.sources)
        if number == len(self.size):
            for name in ("size", "kind", "group", "factor", "point_to_point", "by_group", "series"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.full_like(column, -1)]))
        self.sources.append(source)
        self.size[number] = source.group_size
        self.kind[number] = source.op_number << 16 | source.group_size
        self.group[number] = source.group_number
        self.factor[number] = bus_factor(source.op, source.group_size)
        self.point_to_point[number] = is_point_to_point(source.op)
        self.by_group[number] = by_group
        return number


class CollectiveTotals:
    """Totals since the start."""

    def __init__(self, local_ranks: int | None = None) -> None:
        self.durations: HistogramTable[CollectiveKey] = HistogramTable(DURATIONS)
        self.device: HistogramTable[CollectiveKey] = HistogramTable(DURATIONS)
        self.waits: HistogramTable[CollectiveKey] = HistogramTable(DURATIONS)
        self.transfers: HistogramTable[CollectiveKey] = HistogramTable(DURATIONS)
        self.errors: dict[tuple[GroupKey, str], int] = defaultdict(int)  # with the error's type
        self.joiner = ArrivalJoiner(local_ranks)
        self._table = _Table()
        self._by_names: dict[int, Integers] = {}  # by rank: source of a name and a group entry
        self._ops: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._keys: list[CollectiveKey] = []  # by series
        self._payload: Integers = np.zeros(64, np.int64)  # by series, as the next
        self._bus = np.zeros(64, np.float64)
        self._group_keys: dict[GroupKey, int] = {}  # rows of the next two
        self._sequence: Integers = np.zeros(64, np.int64)
        self._last: Integers = np.zeros(64, np.int64)
        self._group_of_series: Integers = np.zeros(64, np.int64)

    @property
    def payload_bytes(self) -> dict[CollectiveKey, int]:
        counted = self._counted()
        return {self._keys[row]: int(self._payload[row]) for row in counted}

    @property
    def bus_bytes(self) -> dict[CollectiveKey, float]:
        return {self._keys[row]: float(self._bus[row]) for row in self._counted()}

    @property
    def last_arrivals(self) -> dict[GroupKey, int]:
        """How often a rank came last; ranks that others were seen to wait with have their 0."""
        joined = {self._group_of_series[row] for row in self._counted(self.waits)}
        return {key: int(self._last[row]) for key, row in self._group_keys.items() if row in joined}

    @property
    def sequence(self) -> dict[GroupKey, int]:
        return {
            key: int(self._sequence[row])
            for key, row in self._group_keys.items()
            if self._sequence[row]
        }

    def _counted(self, table: HistogramTable[CollectiveKey] | None = None) -> list[int]:
        counts = (self.durations if table is None else table).counts[: len(self._keys)]
        rows: list[int] = np.flatnonzero(counts.max(axis=1, initial=0)).tolist()
        return rows

    def add(self, rows: Rows, parts: Sequence[Part]) -> None:
        """Count COLLECTIVE records of several ranks; `parts` are those of each, in this order."""
        sources = np.concatenate([self._sources(*part) for part in parts])
        nbytes, status = rows[:, NBYTES], rows[:, AUX] & 0xFF
        begins, ends = rows[:, BEGIN], rows[:, END]
        series = self._series(sources, nbytes)
        table = self._table
        np.maximum.at(self._sequence, table.by_group[sources], rows[:, SEQUENCE])
        good = status != ERROR
        if good.all():
            self._count(series, sources, nbytes, ends - begins)
        else:
            self._count(series[good], sources[good], nbytes[good], (ends - begins)[good])
            self._count_errors(parts)
        arriving = Arriving(
            table.group[sources],
            rows[:, SEQUENCE],
            table.kind[sources],
            begins,
            ends,
            series,
            status,
        )
        together = ~table.point_to_point[sources]
        self._join(arriving if together.all() else arriving.take(together))

    def add_device(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        """Count DEVICE records of one rank."""
        if len(rows):
            series = self._series(self._sources(rank, rows, names), rows[:, NBYTES])
            self.device.add(series, rows[:, END] - rows[:, BEGIN])

    def exemplify(
        self,
        joined: JoinedStep,
        names_by_rank: Mapping[int, Sequence[str]],
        trace_id: int,
        clock_offset_ns: int,
        span_ids: SpanIds | None,
    ) -> None:
        """Let the collectives of a kept step stand for the buckets that they were counted in."""
        for rank, everything in joined.rows.items():
            good = (everything[:, META] & 0xF == COLLECTIVE) & (everything[:, AUX] & 0xFF != ERROR)
            rows = everything[good]
            if not len(rows):
                continue
            series = self._series(self._sources(rank, rows, names_by_rank[rank]), rows[:, NBYTES])
            spans = np.zeros(len(rows), np.int64) if span_ids is None else span_ids(rank, rows)
            self.durations.exemplify(
                series,
                rows[:, END] - rows[:, BEGIN],
                rows[:, END] + clock_offset_ns,
                trace_id,
                spans.astype(np.uint64).view(np.int64),
            )

    def _count(
        self, series: Integers, sources: Integers, nbytes: Integers, durations: Integers
    ) -> None:
        self.durations.add(series, durations)
        np.add.at(self._payload, series, nbytes)
        np.add.at(self._bus, series, nbytes * self._table.factor[sources])

    def _count_errors(self, parts: Sequence[Part]) -> None:
        for rank, rows, names in parts:
            failed = rows[rows[:, AUX] & 0xFF == ERROR]
            for meta, aux in failed[:, [META, AUX]].tolist():
                key = GroupKey(
                    name_at(names, meta_name(meta)),
                    group_label(name_at(names, meta_group(meta))),
                    rank,
                )
                self.errors[key, name_at(names, aux >> 8)] += 1

    def _join(self, arriving: Arriving) -> None:
        joined = self.joiner.join(arriving)
        if joined is None:
            return
        for table, values, counted in (
            (self.waits, joined.wait_ns, joined.status != ERROR),
            (self.transfers, joined.transfer_ns, joined.status == OK),
        ):
            if counted.all():
                table.add(joined.series, values)
            else:
                table.add(joined.series[counted], values[counted])
        last = joined.series[joined.is_last & (joined.status != ERROR)]
        np.add.at(self._last, self._group_of_series[last], 1)

    def _sources(self, rank: int, rows: Rows, names: Sequence[str]) -> Integers:
        """The source of each record; new ones are made."""
        by_names = self._by_names.get(rank)
        if by_names is None:
            # Mostly untouched, so mostly not there: the system gives zero pages on demand.
            by_names = self._by_names[rank] = np.zeros(1 << 2 * _NAME_BITS, np.int64)
        meta = rows[:, META]
        mask = NUM_NAMES - 1
        entries = (meta >> 4 & mask) | (meta >> 16 & mask) << _NAME_BITS
        sources: Integers = by_names[entries] - 1
        # A group's name could come back with another size, after destroy_process_group.
        unknown = (sources < 0) | (self._table.size[sources] != meta >> 40 & 0xFFFF)
        if unknown.any():
            for word in np.unique(meta[unknown] & ~(0xFFF << 28)).tolist():
                entry = meta_name(word) & mask | (meta_group(word) & mask) << _NAME_BITS
                by_names[entry] = self._new_source(rank, word, names) + 1
            sources = by_names[entries] - 1
        return sources

    def _new_source(self, rank: int, meta: int, names: Sequence[str]) -> int:
        op, entry = name_at(names, meta_name(meta)), name_at(names, meta_group(meta))
        group_number = self._groups.setdefault(entry, len(self._groups))
        key = GroupKey(op, group_label(entry), rank)
        by_group = self._group_keys.setdefault(key, len(self._group_keys))
        if by_group >= len(self._last):
            self._last = _doubled(self._last)
            self._sequence = _doubled(self._sequence)
        self.joiner.member(group_number, rank)
        source = _Source(
            op,
            key.group,
            rank,
            meta_group_size(meta),
            self._ops.setdefault(op, len(self._ops)),
            group_number,
        )
        return self._table.add(source, by_group)

    def _series(self, sources: Integers, nbytes: Integers) -> Integers:
        """The series of each record: its source's labels and its size class."""
        classes = size_classes(nbytes)
        series = self._table.series[sources, classes]
        unknown = series < 0
        if unknown.any():
            for pair in np.unique(sources[unknown] * _CLASSES + classes[unknown]).tolist():
                source, size_class = divmod(pair, _CLASSES)
                self._table.series[source, size_class] = self._new_series(source, size_class)
            series = self._table.series[sources, classes]
        return series

    def _new_series(self, source: int, size_class: int) -> int:
        """Sources with the same labels share a series."""
        found = self._table.sources[source]
        key = CollectiveKey(found.op, found.group, SIZE_CLASSES[size_class], found.rank)
        row = self.durations.row(key)
        for table in (self.device, self.waits, self.transfers):
            assert table.row(key) == row
        if row == len(self._keys):
            self._keys.append(key)
        if row >= len(self._payload):
            self._payload, self._bus = _doubled(self._payload), _doubled(self._bus)
            self._group_of_series = _doubled(self._group_of_series)
        self._group_of_series[row] = self._table.by_group[source]
        return row


def _doubled(column: Any) -> Any:
    return np.concatenate([column, np.zeros_like(column)])
