"""Every series of `/metrics`: name, type, labels, and what it means.

Owns the names and nothing else: `metrics` fills them, `exposition` writes them down. Units are base
units; no label is a step, a sequence number or a request.
"""

from typing import Literal, NamedTuple

from .values import METRIC_HELP, VALUES

Kind = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    name: str  # of a counter with _total
    kind: Kind
    labels: tuple[str, ...]
    help: str


_GROUP = ("op", "group", "rank")
_SERIES = ("op", "group", "size", "rank")
_FRAME = ("channel", "direction", "rank")

_COLLECTIVES = (
    Metric(
        "onecast_collective_duration_seconds",
        "histogram",
        (*_SERIES, "clock", "mode"),
        "Time from a collective's call to the end of its wait (clock host), or of its kernel "
        "(clock device), without failed ones",
    ),
    Metric(
        "onecast_collective_arrival_wait_seconds",
        "histogram",
        _SERIES,
        "Time a rank waited in a collective until the last rank of its group had come",
    ),
    Metric(
        "onecast_collective_transfer_seconds",
        "histogram",
        _SERIES,
        "Time from the moment the last rank had come to the end of a collective",
    ),
    Metric(
        "onecast_collective_last_arrivals_total",
        "counter",
        _GROUP,
        "Collectives to which this rank came last",
    ),
    Metric(
        "onecast_collective_unjoined_total",
        "counter",
        ("reason",),
        "Collectives of a rank that could not be joined with those of its group: it has ranks on "
        "other nodes, a record was lost, or the ranks called different operations",
    ),
    Metric(
        "onecast_collective_payload_bytes_total",
        "counter",
        _SERIES,
        "Payload of collectives, in the sense of nccl-tests",
    ),
    Metric(
        "onecast_collective_bus_bytes_total",
        "counter",
        _SERIES,
        "Payload times nccl-tests' bus factor of the operation",
    ),
    Metric(
        "onecast_collective_calls_total",
        "counter",
        (*_SERIES, "mode"),
        "Collectives that ended: called one by one (mode eager) or in replays of CUDA graphs "
        "(mode graph)",
    ),
    Metric(
        "onecast_collective_graph_payload_bytes_total",
        "counter",
        _SERIES,
        "Payload of collectives in replays of CUDA graphs",
    ),
    Metric(
        "onecast_collective_graph_bus_bytes_total",
        "counter",
        _SERIES,
        "Bus bytes of collectives in replays of CUDA graphs",
    ),
    Metric(
        "onecast_graph_launch_seconds",
        "histogram",
        ("rank",),
        "Time the host took to launch a CUDA graph",
    ),
    Metric(
        "onecast_collective_errors_total",
        "counter",
        (*_GROUP, "error_type"),
        "Collectives that raised",
    ),
    Metric(
        "onecast_collective_sequence",
        "gauge",
        _GROUP,
        "Number in its group of the last collective of this operation that ended",
    ),
    Metric(
        "onecast_collective_in_flight_age_seconds",
        "gauge",
        _GROUP,
        "Age of the oldest collective that has begun and not ended",
    ),
    Metric(
        "onecast_collective_unrecorded_total",
        "counter",
        ("group", "rank"),
        "Collectives the group issued that were not recorded",
    ),
    Metric(
        "onecast_hangs_total",
        "counter",
        ("op", "group"),
        "Collectives found in flight for longer than the limit",
    ),
    Metric(
        "onecast_desyncs_total",
        "counter",
        ("op", "group"),
        "Disagreements found between ranks about which collective comes next",
    ),
)

_STEPS = (
    Metric("onecast_step_duration_seconds", "histogram", ("rank",), "Time of one step on one rank"),
    Metric(
        "onecast_step_phase_seconds", "histogram", ("phase", "rank"), "Time of one phase of a step"
    ),
    Metric(
        "onecast_step_exposed_communication_seconds",
        "histogram",
        ("rank",),
        "Time of a step in which the rank did nothing but wait for collectives",
    ),
    Metric("onecast_frame_bytes", "histogram", _FRAME, "Size of a frame"),
    Metric(
        "onecast_frame_metadata_bytes",
        "histogram",
        _FRAME,
        "Part of a frame that is neither tensor content nor padding",
    ),
    Metric(
        "onecast_frame_seconds",
        "histogram",
        ("channel", "part", "rank"),
        "Time of the parts of sending a frame (encode, publish) and of getting one (wait, decode)",
    ),
    Metric(
        "onecast_frame_broadcasts_total", "counter", _FRAME, "Broadcasts that carried the frames"
    ),
)

_REQUESTS = (
    Metric(
        "onecast_requests_total",
        "counter",
        ("finish_reason", "rank"),
        "Requests that are over, by why they ended",
    ),
    Metric(
        "onecast_request_duration_seconds",
        "histogram",
        ("rank",),
        "Time from a request's arrival to its end",
    ),
    Metric(
        "onecast_request_queue_seconds",
        "histogram",
        ("rank",),
        "Time from a request's arrival to its first step",
    ),
    Metric(
        "onecast_request_time_to_first_token_seconds",
        "histogram",
        ("rank",),
        "Time from a request's arrival to its first token",
    ),
    Metric(
        "onecast_request_time_per_output_token_seconds",
        "histogram",
        ("rank",),
        "Time from a request's first token to its end, by further token; of all its choices",
    ),
)

_VALUES = tuple(
    dict.fromkeys(
        Metric(
            f"onecast_{value.metric}{'_total' if value.counter else ''}",
            "counter" if value.counter else "gauge",
            (*value.labels, "rank"),
            METRIC_HELP[value.metric],
        )
        for value in VALUES
    )
)

_TELEMETRY = (
    Metric(
        "onecast_telemetry_dropped_total",
        "counter",
        ("signal", "reason"),
        "Records, steps and spans that telemetry lost or left out",
    ),
    Metric(
        "onecast_sidecar_restarts_total", "counter", (), "Times the sidecar had to be restarted"
    ),
    Metric(
        "onecast_worker_restarts_total",
        "counter",
        (),
        "Times the launcher of this node has started its ranks again",
    ),
    Metric("onecast_up", "gauge", ("rank",), "Whether the process of this rank runs"),
    Metric(
        "onecast_build_info",
        "gauge",
        ("version", "engine"),
        "Version of onecast and id of the engine",
    ),
)

CATALOGUE: dict[str, Metric] = {
    metric.name: metric for metric in (*_COLLECTIVES, *_STEPS, *_REQUESTS, *_VALUES, *_TELEMETRY)
}


def markdown_table() -> str:
    """The catalogue as the README shows it."""
    lines = ["| series | type | labels | what |", "|---|---|---|---|"]
    for metric in CATALOGUE.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"
