"""What Prometheus reads: a collector that renders the node's totals when it is asked.

Owns metric names, helps and label order. Counts nothing itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .aggregate import Aggregate, GroupKey
from .histograms import Histogram
from .values import METRIC_HELP, VALUES

_GROUP_LABELS = ["op", "group", "rank"]
_SERIES_LABELS = ["op", "group", "size", "rank"]


@dataclass
class RankState:
    """What is asked of a rank's ring at the moment of a scrape."""

    rank: int
    up: bool
    values: dict[int, int] = field(default_factory=dict)  # index in VALUES: number
    unrecorded: dict[str, int] = field(default_factory=dict)  # group label: collectives
    in_flight: dict[GroupKey, float] = field(default_factory=dict)  # seconds


@dataclass
class Snapshot:
    engine_id: str
    aggregate: Aggregate
    ranks: list[RankState]
    dropped: Mapping[tuple[str, str], int]  # (signal, reason)


def package_version() -> str:
    try:
        return version("onecast")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


class TelemetryCollector(Collector):
    """Calls `snapshot` for every scrape; the context it gives keeps the totals still."""

    def __init__(self, snapshot: Callable[[], AbstractContextManager[Snapshot]]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        with self._snapshot() as snapshot:
            yield from list(_families(snapshot))


def _families(snapshot: Snapshot) -> Iterator[Metric]:
    build = GaugeMetricFamily(
        "onecast_build_info",
        "Version of onecast and id of the engine",
        labels=["version", "engine"],
    )
    build.add_metric([package_version(), snapshot.engine_id], 1)
    yield build
    yield from _collectives(snapshot.aggregate)
    yield from _steps_and_frames(snapshot.aggregate)
    yield from _ranks(snapshot.ranks)
    dropped = CounterMetricFamily(
        "onecast_telemetry_dropped",
        "Records, steps and spans that telemetry lost or left out",
        labels=["signal", "reason"],
    )
    for (signal, reason), count in sorted(snapshot.dropped.items()):
        dropped.add_metric([signal, reason], count)
    yield dropped


def _collectives(totals: Aggregate) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        "onecast_collective_duration_seconds",
        "Time from a collective's call to the end of its wait, without failed ones",
        labels=[*_SERIES_LABELS, "clock", "mode"],
    )
    payload = CounterMetricFamily(
        "onecast_collective_payload_bytes",
        "Payload of collectives, in the sense of nccl-tests",
        labels=_SERIES_LABELS,
    )
    bus = CounterMetricFamily(
        "onecast_collective_bus_bytes",
        "Payload times nccl-tests' bus factor of the operation",
        labels=_SERIES_LABELS,
    )
    for key, histogram in totals.collectives.items():
        labels = [key.op, key.group, key.size, str(key.rank)]
        durations.add_metric([*labels, "host", "eager"], histogram.buckets(), histogram.sum)
        payload.add_metric(labels, totals.payload_bytes[key])
        bus.add_metric(labels, totals.bus_bytes[key])
    yield from (durations, payload, bus)
    errors = CounterMetricFamily(
        "onecast_collective_errors",
        "Collectives that raised",
        labels=[*_GROUP_LABELS, "error_type"],
    )
    for (group_key, error_type), count in totals.errors.items():
        errors.add_metric([*_labels(group_key), error_type], count)
    yield errors
    sequence = GaugeMetricFamily(
        "onecast_collective_sequence",
        "Sequence number of the last finished collective of this operation and group",
        labels=_GROUP_LABELS,
    )
    for group_key, number in totals.sequence.items():
        sequence.add_metric(_labels(group_key), number)
    yield sequence


def _steps_and_frames(totals: Aggregate) -> Iterator[Metric]:
    yield _histograms(
        "onecast_step_duration_seconds",
        "Time of one engine step on one rank",
        ["rank"],
        {(str(rank),): histogram for rank, histogram in totals.steps.items()},
    )
    yield _histograms(
        "onecast_step_phase_seconds",
        "Time of one phase of a step",
        ["phase", "rank"],
        totals.phases,
    )
    labels = ["channel", "direction", "rank"]
    yield _histograms("onecast_frame_bytes", "Size of a frame", labels, totals.frame_bytes)
    yield _histograms(
        "onecast_frame_metadata_bytes",
        "Part of a frame that is neither tensor content nor padding",
        labels,
        totals.frame_metadata_bytes,
    )
    yield _histograms(
        "onecast_frame_seconds",
        "Time of the parts of sending a frame (encode, publish) and of getting one (wait, decode)",
        ["channel", "part", "rank"],
        totals.frame_parts,
    )
    broadcasts = CounterMetricFamily(
        "onecast_frame_broadcasts", "Broadcasts that carried the frames", labels=labels
    )
    for key, count in totals.frame_broadcasts.items():
        broadcasts.add_metric([str(part) for part in key], count)
    yield broadcasts


def _ranks(ranks: list[RankState]) -> Iterator[Metric]:
    up = GaugeMetricFamily("onecast_up", "Whether the process of this rank runs", labels=["rank"])
    ages = GaugeMetricFamily(
        "onecast_collective_in_flight_age_seconds",
        "Age of the oldest collective that has begun and not ended",
        labels=_GROUP_LABELS,
    )
    unrecorded = CounterMetricFamily(
        "onecast_collective_unrecorded",
        "Collectives the group issued that were not recorded",
        labels=["group", "rank"],
    )
    families: dict[str, Any] = {}
    for value in VALUES:
        if value.metric not in families:
            family = CounterMetricFamily if value.counter else GaugeMetricFamily
            families[value.metric] = family(
                f"onecast_{value.metric}",
                METRIC_HELP[value.metric],
                labels=[*value.labels, "rank"],
            )
    for state in ranks:
        rank = str(state.rank)
        up.add_metric([rank], float(state.up))
        for key, age in state.in_flight.items():
            ages.add_metric(_labels(key), age)
        for group, count in state.unrecorded.items():
            unrecorded.add_metric([group, rank], count)
        for index, number in state.values.items():
            value = VALUES[index]
            families[value.metric].add_metric([*value.labels.values(), rank], number)
    yield from (up, ages, unrecorded, *families.values())


def _labels(key: GroupKey) -> list[str]:
    return [key.op, key.group, str(key.rank)]


def _histograms(
    name: str, text: str, labels: list[str], series: Mapping[tuple[Any, ...], Histogram]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, histogram in series.items():
        family.add_metric([str(part) for part in key], histogram.buckets(), histogram.sum)
    return family
