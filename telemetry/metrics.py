"""What Prometheus reads: the node's totals as families, and the page made of them.

Owns which total goes into which series of the `catalogue`. Counts nothing itself.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .aggregate import Aggregate, GroupKey
from .arrivals import UNJOINED
from .catalogue import CATALOGUE
from .exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    Exposition,
    Family,
    Histograms,
    Numbers,
    Sample,
    prefers_openmetrics,
)
from .histograms import HistogramTable
from .values import VALUES


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
    # ("hang" | "desync", op, group label): how often one was found
    found: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    sidecar_restarts: int = 0
    worker_restarts: int = 0


def package_version() -> str:
    try:
        return version("onecast")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


class MetricsPage:
    """`/metrics`. `snapshot` gives what there is and holds it still while it is copied.

    Copying takes a millisecond or two; the text is made when the snapshot has been let go.
    """

    def __init__(self, snapshot: Callable[[], AbstractContextManager[Snapshot]]) -> None:
        self._snapshot = snapshot
        self._exposition = Exposition()
        self._lock = threading.Lock()

    @staticmethod
    def content_type(accept: str | None) -> str:
        """The one of the two formats that an Accept header asks for."""
        return OPENMETRICS_TYPE if prefers_openmetrics(accept) else TEXT_TYPE

    def render(self, content_type: str) -> bytes:
        """The page as of now. Any thread may call it; one at a time renders."""
        with self._lock:
            with self._snapshot() as snapshot:
                families = families_of(snapshot)
            return self._exposition.render(families, openmetrics=content_type == OPENMETRICS_TYPE)


def families_of(snapshot: Snapshot) -> list[Family]:
    """Everything as copies: the snapshot may change afterwards."""
    return [
        *_collectives(snapshot),
        *_steps_and_frames(snapshot.aggregate),
        *_requests(snapshot.aggregate),
        *_ranks(snapshot.ranks),
        # One series from the start: the first loss is an increase, too.
        _numbers(
            "onecast_telemetry_dropped_total",
            sorted({("records", "overrun"): 0, **snapshot.dropped}.items()),
        ),
        _numbers("onecast_sidecar_restarts_total", [((), snapshot.sidecar_restarts)]),
        _numbers("onecast_worker_restarts_total", [((), snapshot.worker_restarts)]),
        _numbers("onecast_build_info", [((package_version(), snapshot.engine_id), 1)]),
    ]


def _numbers(name: str, samples: Iterable[Sample]) -> Numbers:
    return Numbers(CATALOGUE[name], list(samples))


def _histograms(name: str, *parts: tuple[HistogramTable[Any], tuple[str, ...]]) -> Histograms:
    return Histograms(CATALOGUE[name], [(table.freeze(), further) for table, further in parts])


def _collectives(snapshot: Snapshot) -> list[Family]:
    aggregate = snapshot.aggregate
    totals, graphs = aggregate.totals, aggregate.graphs
    durations = totals.durations.freeze()
    calls: list[Sample] = [
        ((*key, "eager"), count)
        for key, count in zip(durations.keys, durations.cumulative[:, -1].tolist(), strict=True)
    ]
    calls += [((*key, "graph"), count) for key, count in graphs.collectives.items()]
    return [
        Histograms(
            CATALOGUE["onecast_collective_duration_seconds"],
            [
                (durations, ("host", "eager")),
                (totals.device.freeze(), ("device", "eager")),
            ],
        ),
        _histograms("onecast_collective_arrival_wait_seconds", (totals.waits, ())),
        _histograms("onecast_collective_transfer_seconds", (totals.transfers, ())),
        _numbers("onecast_collective_last_arrivals_total", totals.last_arrivals.items()),
        _numbers(
            "onecast_collective_unjoined_total",
            [((reason,), totals.joiner.unjoined[reason]) for reason in UNJOINED],
        ),
        _numbers("onecast_collective_payload_bytes_total", totals.payload_bytes.items()),
        _numbers("onecast_collective_bus_bytes_total", totals.bus_bytes.items()),
        _numbers("onecast_collective_calls_total", calls),
        _numbers("onecast_collective_graph_payload_bytes_total", graphs.payload_bytes.items()),
        _numbers("onecast_collective_graph_bus_bytes_total", graphs.bus_bytes.items()),
        _histograms("onecast_graph_launch_seconds", (graphs.launches, ())),
        _numbers(
            "onecast_collective_errors_total",
            [((*key, error), count) for (key, error), count in totals.errors.items()],
        ),
        _numbers("onecast_collective_sequence", totals.sequence.items()),
        *(
            _numbers(
                f"onecast_{kind}s_total",
                [
                    ((op, group), n)
                    for (what, op, group), n in snapshot.found.items()
                    if what == kind
                ],
            )
            for kind in ("hang", "desync")
        ),
    ]


def _steps_and_frames(aggregate: Aggregate) -> list[Family]:
    steps = aggregate.of_steps
    return [
        _histograms("onecast_step_duration_seconds", (steps.durations, ())),
        _histograms("onecast_step_phase_seconds", (steps.phases, ())),
        _histograms("onecast_step_exposed_communication_seconds", (steps.exposed, ())),
        _histograms("onecast_frame_bytes", (steps.frame_bytes, ())),
        _histograms("onecast_frame_metadata_bytes", (steps.frame_metadata_bytes, ())),
        _histograms("onecast_frame_seconds", (steps.frame_parts, ())),
        _numbers("onecast_frame_broadcasts_total", steps.frame_broadcasts.items()),
    ]


def _requests(aggregate: Aggregate) -> list[Family]:
    requests = aggregate.requests
    return [
        _numbers("onecast_requests_total", requests.finished.items()),
        _histograms("onecast_request_duration_seconds", (requests.durations, ())),
        _histograms("onecast_request_queue_seconds", (requests.queued, ())),
        _histograms("onecast_request_time_to_first_token_seconds", (requests.first_token, ())),
        _histograms("onecast_request_time_per_output_token_seconds", (requests.per_token, ())),
    ]


def _ranks(ranks: list[RankState]) -> list[Family]:
    up: list[Sample] = []
    ages: list[Sample] = []
    unrecorded: list[Sample] = []
    values: dict[str, list[Sample]] = {
        f"onecast_{value.metric}{'_total' if value.counter else ''}": [] for value in VALUES
    }
    for state in ranks:
        up.append(((state.rank,), int(state.up)))
        ages += [(tuple(key), age) for key, age in state.in_flight.items()]
        unrecorded += [((group, state.rank), count) for group, count in state.unrecorded.items()]
        for index, number in state.values.items():
            value = VALUES[index]
            name = f"onecast_{value.metric}{'_total' if value.counter else ''}"
            values[name].append(((*value.labels.values(), state.rank), number))
    return [
        _numbers("onecast_up", up),
        _numbers("onecast_collective_in_flight_age_seconds", ages),
        _numbers("onecast_collective_unrecorded_total", unrecorded),
        *(_numbers(name, samples) for name, samples in values.items()),
    ]
