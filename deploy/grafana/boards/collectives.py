"""Collectives: how long, how fast, who was late, and what waiting for them costs."""

from typing import Any

from grafana_foundation_sdk.builders import dashboard as dashboards

from . import arrivals
from .board import board, put, row
from .panels import Limits, Query, bars, figure, heat, lines
from .promql import buckets, in_range, quantile, rate, ratio, select, sum_rate

_CHOSEN = ("rank", "op", "group", "size")
_DURATION = "onecast_collective_duration_seconds"
_WAIT = "onecast_collective_arrival_wait_seconds"
_TRANSFER = "onecast_collective_transfer_seconds"


def build() -> dashboards.Dashboard:
    return put(
        board(
            "collectives",
            "Collectives",
            """Latency, bus bandwidth, arrival skew and exposed communication of every collective.
            Waiting for the last rank and transferring are told apart: the first is a late
            rank's, the second the network's.""",
            "op",
            "group",
            "size",
        ),
        row("Now"),
        *_now(),
        row("Latency"),
        *_latency(),
        row("Heat maps, one per operation"),
        _heat_map(),
        row("Who is late"),
        *arrivals.panels(_CHOSEN),
        row("Bandwidth and volume"),
        *_volume(),
        row("Trouble"),
        *_trouble(),
    )


def _now() -> list[object]:
    host: dict[str, Any] = {"chosen": _CHOSEN, "clock": "host"}
    return [
        figure(
            "Collectives",
            sum_rate("onecast_collective_calls_total", chosen=_CHOSEN),
            "suffix: /s",
            """Calls of all ranks. Zero while sequences run: something hangs; see "Oldest in
            flight".""",
            decimals=0,
        ),
        figure(
            "Latency, p50",
            quantile(0.5, _DURATION, **host),
            "s",
            """From the call to the end of its wait. Compare with the transfer below: the rest is
            waiting for the last rank.""",
        ),
        figure(
            "Latency, p99",
            quantile(0.99, _DURATION, **host),
            "s",
            """Ten times the median or more: a rank is now and then late, or cores are short.
            Follow an exemplar of the quantiles below to a trace.""",
        ),
        figure(
            "Bus bandwidth",
            _bus_bandwidth(()),
            "Bps",
            """As nccl-tests has it, waiting left out. Compare with nccl-tests on the same
            machines; far below: wrong interface or transport (NCCL_DEBUG=INFO,
            GLOO_SOCKET_IFNAME), or messages too small.""",
        ),
        figure(
            "Waiting for the last rank",
            ratio(
                sum_rate(f"{_WAIT}_sum", chosen=_CHOSEN),
                sum_rate(f"{_DURATION}_sum", **host),
            ),
            "percentunit",
            """Share of the time in collectives. Above a quarter: one rank holds the others up; see
            "Who is late".""",
            limits=Limits(0.25, 0.5),
            decimals=0,
        ),
        figure(
            "Not recorded",
            in_range("onecast_collective_unrecorded_total"),
            "short",
            """Collectives that a group issued and telemetry did not see, in the time shown. Above
            0: C++ code calls them (DDP's reducer: ONECAST_DDP_HOOK=1); the manual of telemetry
            lists what cannot be seen.""",
            limits=Limits(1, 1),
            instant=True,
        ),
    ]


def _latency() -> list[object]:
    by = ("op", "size")
    host: dict[str, Any] = {"chosen": _CHOSEN, "clock": "host"}
    return [
        lines(
            "Latency p50, by operation and size",
            [Query(quantile(0.5, _DURATION, by, **host), "{{op}} {{size}}")],
            "s",
            """Should grow with size, and not with time. One size far above a smaller one: it goes
            another way (above 4 MiB all-reduces leave shared memory).""",
            logarithmic=True,
        ),
        lines(
            "Latency p99, by operation and size",
            [Query(quantile(0.99, _DURATION, by, **host), "{{op}} {{size}}")],
            "s",
            """Rises for all sizes at once: the machine is short of cores, or a rank is late. Click
            the highest point: its trace has all ranks of that step.""",
            exemplars=True,
            logarithmic=True,
        ),
        lines(
            "Share of a step spent waiting for collectives (exposed communication)",
            [
                Query(
                    ratio(
                        sum_rate("onecast_step_exposed_communication_seconds_sum", ("rank",)),
                        sum_rate("onecast_step_duration_seconds_sum", ("rank",)),
                    ),
                    "rank {{rank}}",
                )
            ],
            "percentunit",
            """Time of a step in which a rank computed nothing. High on all ranks: fewer ranks,
            larger batches or a faster transport. High on all but one: that one is the
            straggler.""",
            maximum=1,
        ),
        bars(
            "Latency p99 now, by operation and size",
            Query(quantile(0.99, _DURATION, by, **host), "{{op}} {{size}}"),
            "s",
            """The slowest kinds of collectives at one look. What is long and small is late, not
            slow: see arrival skew.""",
        ),
    ]


def _heat_map() -> object:
    return heat(
        "Latency of $op",
        buckets(_DURATION, chosen=_CHOSEN, clock="host"),
        "s",
        """Two bands: two kinds of calls; narrow them by size and group. A band that widens
        upwards: a rank begins to be late. The points are calls with a trace; click one far from
        its band.""",
        exemplars=True,
        repeat="op",
    )


def _volume() -> list[object]:
    by = ("op", "size")
    return [
        lines(
            "Bus bandwidth, by operation and size",
            [Query(_bus_bandwidth(by), "{{op}} {{size}}")],
            "Bps",
            """What the wires carry while a collective transfers; small messages never reach the
            link's. Large ones far below nccl-tests: wrong interface, or other traffic.""",
            logarithmic=True,
            width=8,
        ),
        lines(
            "Payload, by operation",
            [
                Query(
                    sum_rate("onecast_collective_payload_bytes_total", ("op",), chosen=_CHOSEN),
                    "{{op}}",
                )
            ],
            "Bps",
            """Of all ranks. Grows with tokens per step. Large for little throughput: padding, or
            logits gathered for tokens that nobody samples.""",
            width=8,
        ),
        lines(
            "Calls, by operation and group",
            [
                Query(
                    sum_rate("onecast_collective_calls_total", ("op", "group"), chosen=_CHOSEN),
                    "{{op}} ({{group}})",
                )
            ],
            "ops",
            """Of all ranks. The group `control` should be nearly silent over shared memory, and
            one broadcast a step elsewhere.""",
            logarithmic=True,
            width=8,
        ),
    ]


def _bus_bandwidth(by: tuple[str, ...]) -> str:
    return ratio(
        sum_rate("onecast_collective_bus_bytes_total", by, chosen=_CHOSEN),
        sum_rate(f"{_TRANSFER}_sum", by, chosen=_CHOSEN),
    )


def _trouble() -> list[object]:
    return [
        lines(
            "Not joined, by reason",
            [
                Query(
                    f"sum by (reason) ({rate('onecast_collective_unjoined_total')})",
                    "{{reason}}",
                )
            ],
            "ops",
            """other_nodes is normal for groups across nodes: no wait is known for them. lost: the
            sidecar is too slow for the rings. desync: ranks call different operations; see
            /hangs.json.""",
        ),
        lines(
            "Hangs, desyncs and errors found so far",
            [
                Query(f"sum({select(f'onecast_{kind}_total')}) or vector(0)", name)
                for kind, name in (
                    ("hangs", "hangs"),
                    ("desyncs", "desyncs"),
                    ("collective_errors", "errors"),
                )
            ],
            "none",
            """Any rise wants a look: the sidecar's log names ranks and operations, `onecast flight
            RUN_DIR` shows what each rank did last, side by side.""",
        ),
    ]
