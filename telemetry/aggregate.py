"""What the records add up to: histograms and totals of one node's ranks.

Owns the series and their labels. Knows neither Prometheus nor traces.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .histograms import DURATIONS, SIZES, Histogram, merged_quantile
from .probe import unpack_frame
from .ring import (
    AUX,
    BEGIN,
    COLLECTIVE,
    END,
    ERROR,
    FRAME,
    META,
    NBYTES,
    OK,
    PHASE,
    SEQUENCE,
    STEP_KIND,
    meta_group,
    meta_group_size,
    meta_kind,
    meta_name,
)
from .ring_reader import Rows

# Payloads by size, at most eight classes, powers of four: label and inclusive upper bound.
SIZE_CLASSES = ("1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "inf")
_SIZE_BOUNDS = 1024 * 4 ** np.arange(7, dtype=np.int64)


class CollectiveKey(NamedTuple):
    op: str
    group: str
    size: str  # of SIZE_CLASSES
    rank: int


class GroupKey(NamedTuple):
    op: str
    group: str
    rank: int


def bus_factor(op: str, group_size: int) -> float:
    """nccl-tests' factor from payload to bytes on the bus."""
    if group_size < 2 or op in ("barrier", "monitored_barrier"):
        return 0.0
    if op.startswith("all_reduce"):
        return 2 * (group_size - 1) / group_size
    if op.startswith(("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")):
        return (group_size - 1) / group_size
    return 1.0  # broadcast, reduce, send, recv


def group_label(entry: str) -> str:
    """The label of a group's name entry; its second half is unique in the cluster."""
    return entry.partition("\t")[0]


class Aggregate:
    """Totals since the start. Failed operations count as errors, not as durations."""

    def __init__(self) -> None:
        def duration() -> Histogram:
            return Histogram(DURATIONS)

        def size() -> Histogram:
            return Histogram(SIZES)

        self.collectives: dict[CollectiveKey, Histogram] = defaultdict(duration)
        self.payload_bytes: dict[CollectiveKey, int] = defaultdict(int)
        self.bus_bytes: dict[CollectiveKey, float] = defaultdict(float)
        self.errors: dict[tuple[GroupKey, str], int] = defaultdict(int)  # with the error's type
        self.sequence: dict[GroupKey, int] = {}
        self.phases: dict[tuple[str, int], Histogram] = defaultdict(duration)  # (phase, rank)
        self.steps: dict[int, Histogram] = defaultdict(duration)  # by rank
        # (channel, direction, rank)
        self.frame_bytes: dict[tuple[str, str, int], Histogram] = defaultdict(size)
        self.frame_metadata_bytes: dict[tuple[str, str, int], Histogram] = defaultdict(size)
        self.frame_broadcasts: dict[tuple[str, str, int], int] = defaultdict(int)
        # (channel, encode | publish | wait | decode, rank)
        self.frame_parts: dict[tuple[str, str, int], Histogram] = defaultdict(duration)

    def add(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        """Count finished records of one rank."""
        if not len(rows):
            return
        kinds = meta_kinds(rows)
        failed = (rows[:, AUX] & 0xFF) == ERROR
        self._add_collectives(rank, rows[kinds == COLLECTIVE], names)
        good = rows[(kinds == PHASE) & ~failed]
        for meta in np.unique(good[:, META]):
            chosen = good[good[:, META] == meta]
            self.phases[names[meta_name(int(meta))], rank].add(chosen[:, END] - chosen[:, BEGIN])
        steps = rows[(kinds == STEP_KIND) & ((rows[:, AUX] & 0xFF) == OK)]
        if len(steps):
            self.steps[rank].add(steps[:, END] - steps[:, BEGIN])
        self._add_frames(rank, rows[kinds == FRAME], names)

    def _add_collectives(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        classes = np.searchsorted(_SIZE_BOUNDS, rows[:, NBYTES], side="left")
        failed = (rows[:, AUX] & 0xFF) == ERROR
        # The dtype is no label: mask it out. The class and the outcome take its place.
        without_dtype = rows[:, META] & ~(0xFFF << 28)
        keys = without_dtype | classes << 28 | failed.astype(np.int64) << 36
        for key in np.unique(keys):
            chosen = rows[keys == key]
            meta = int(chosen[0, META])
            op, group = names[meta_name(meta)], group_label(names[meta_group(meta)])
            by_group = GroupKey(op, group, rank)
            self.sequence[by_group] = max(
                self.sequence.get(by_group, 0), int(chosen[:, SEQUENCE].max())
            )
            if int(key) >> 36 & 1:
                for error, count in zip(
                    *np.unique(chosen[:, AUX] >> 8, return_counts=True), strict=True
                ):
                    self.errors[by_group, names[int(error)]] += int(count)
                continue
            series = CollectiveKey(op, group, SIZE_CLASSES[int(key) >> 28 & 0xF], rank)
            self.collectives[series].add(chosen[:, END] - chosen[:, BEGIN])
            nbytes = int(chosen[:, NBYTES].sum())
            self.payload_bytes[series] += nbytes
            self.bus_bytes[series] += nbytes * bus_factor(op, meta_group_size(meta))

    def _add_frames(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        for meta in np.unique(rows[:, META]):
            chosen = rows[rows[:, META] == meta]
            channel, direction = names[meta_group(int(meta))], names[meta_name(int(meta))]
            series = channel, direction, rank
            nbytes, metadata, broadcasts, last = unpack_frames(chosen)
            self.frame_bytes[series].add(nbytes)
            self.frame_metadata_bytes[series].add(metadata)
            self.frame_broadcasts[series] += int(broadcasts.sum())
            first = chosen[:, END] - chosen[:, BEGIN] - last
            parts = ("encode", "publish") if direction == "published" else ("wait", "decode")
            for part, durations in zip(parts, (first, last), strict=True):
                self.frame_parts[channel, part, rank].add(durations)

    def report(self) -> dict[str, Any]:
        """Counts and quantiles by operation, group and rank, sizes together."""
        merged: dict[GroupKey, list[CollectiveKey]] = defaultdict(list)
        for key in self.collectives:
            merged[GroupKey(key.op, key.group, key.rank)].append(key)
        collectives = []
        for by_group, keys in sorted(merged.items()):
            histograms = [self.collectives[key] for key in keys]
            collectives.append(
                {
                    "op": by_group.op,
                    "group": by_group.group,
                    "rank": by_group.rank,
                    "count": sum(histogram.count for histogram in histograms),
                    "p50_s": merged_quantile(histograms, 0.5),
                    "p99_s": merged_quantile(histograms, 0.99),
                    "bytes": sum(self.payload_bytes[key] for key in keys),
                }
            )
        phases = [
            {
                "phase": phase,
                "rank": rank,
                "count": histogram.count,
                "p50_s": histogram.quantile(0.5),
                "p99_s": histogram.quantile(0.99),
            }
            for (phase, rank), histogram in sorted(self.phases.items())
        ]
        return {
            "collectives": collectives,
            "phases": phases,
            "steps": max((histogram.count for histogram in self.steps.values()), default=0),
            "errors": sum(self.errors.values()),
        }


def meta_kinds(rows: Rows) -> Any:
    return rows[:, META] & 0xF


def unpack_frames(rows: Rows) -> tuple[Any, Any, Any, Any]:
    """`unpack_frame` on whole columns."""
    return unpack_frame(rows[:, NBYTES], rows[:, AUX])  # type: ignore[arg-type]


def oldest_in_flight(
    rank: int, rows: Rows, names: Sequence[str], now_ns: int
) -> dict[GroupKey, float]:
    """Age in seconds of the oldest unfinished collective of each operation and group."""
    ages: dict[GroupKey, float] = {}
    for row in rows.tolist():
        meta = row[META]
        if meta_kind(meta) == COLLECTIVE and not row[END]:
            key = GroupKey(names[meta_name(meta)], group_label(names[meta_group(meta)]), rank)
            ages[key] = max(ages.get(key, 0.0), (now_ns - row[BEGIN]) * 1e-9)
    return ages
