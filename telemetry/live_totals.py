"""The node's totals for people's eyes: steps, latency and stragglers as plain data.

Owns what of them is shown and how it is summed over ranks; `live` draws the shape. Everything only
ever grows, histograms too, so that who reads twice can tell what happened in between.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from .aggregate import Aggregate
from .histograms import Histogram, merged_quantile
from .labels import CollectiveKey

_MAX_LATENCY_ROWS = 120  # those that took the most time
_MAX_HISTOGRAMS = 60


def steps_view(totals: Aggregate) -> dict[str, Any]:
    """Steps: how many on one rank; durations and exposed communication over all ranks."""
    histograms = list(totals.steps.values())
    return {
        "count": max((histogram.count for histogram in histograms), default=0),
        **_quantiles(histograms),
        "exposed_s": sum(histogram.sum for histogram in totals.exposed.values()),
        "hist": _counts(histograms),
    }


def latency_view(totals: Aggregate) -> dict[str, Any]:
    """By operation, group, size and clock, all ranks together: what took the most time first."""
    transfers = dict(totals.transfers)
    bus_bytes = dict(totals.bus_bytes)
    merged: dict[tuple[str, str, str, str], list[tuple[CollectiveKey, Histogram]]] = defaultdict(
        list
    )
    for clock, series in (("host", totals.collectives), ("device", totals.device_durations)):
        for key, histogram in series.items():
            merged[key.op, key.group, key.size, clock].append((key, histogram))
    by_time = sorted(merged.items(), key=lambda one: -sum(found.sum for _, found in one[1]))
    rows = []
    for place, ((op, group, size, clock), series_of) in enumerate(by_time[:_MAX_LATENCY_ROWS]):
        histograms = [histogram for _, histogram in series_of]
        keys = [key for key, _ in series_of]
        rows.append(
            {
                "op": op,
                "group": group,
                "size": size,
                "clock": clock,
                "count": sum(histogram.count for histogram in histograms),
                **_quantiles(histograms),
                "bus_bytes": round(sum(bus_bytes.get(key, 0) for key in keys)),
                "transfer_s": sum(transfers[key].sum for key in keys if key in transfers),
                "hist": _counts(histograms) if place < _MAX_HISTOGRAMS else None,
            }
        )
    return {"latency": rows, "latency_left_out": max(0, len(by_time) - _MAX_LATENCY_ROWS)}


def _quantiles(histograms: list[Histogram]) -> dict[str, Any]:
    return {
        "p50_s": merged_quantile(histograms, 0.5) if histograms else None,
        "p99_s": merged_quantile(histograms, 0.99) if histograms else None,
        "seconds": sum(histogram.sum for histogram in histograms),
    }


def _counts(histograms: Iterable[Histogram]) -> list[int]:
    """The counts of all from the first bucket that is not empty to the last, after its number."""
    counts = sum((histogram.counts for histogram in histograms), np.zeros(1, np.int64))
    used = np.flatnonzero(counts)
    return [int(used[0]), *counts[used[0] : used[-1] + 1].tolist()] if len(used) else [0]


def stragglers_view(totals: Aggregate) -> list[dict[str, Any]]:
    """Of each rank: how often it came last, and how long it waited for others."""
    joined: dict[int, int] = defaultdict(int)
    waited: dict[int, float] = defaultdict(float)
    last: dict[int, int] = defaultdict(int)
    for key, histogram in totals.arrival_waits.items():
        joined[key.rank] += histogram.count
        waited[key.rank] += histogram.sum
    for by_group, count in totals.last_arrivals.items():
        last[by_group.rank] += count
    return [
        {"rank": rank, "joined": joined[rank], "last": last[rank], "waited_s": waited[rank]}
        for rank in sorted(joined)
    ]
