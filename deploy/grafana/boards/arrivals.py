"""Who is late to collectives, and what the others lose by it: a part of the board Collectives."""

from .panels import Limits, Query, lines
from .promql import quantile, ratio, select, sum_rate

_WAIT = "onecast_collective_arrival_wait_seconds"
_TRANSFER = "onecast_collective_transfer_seconds"


def panels(chosen: tuple[str, ...]) -> list[object]:
    """The panels, narrowed by the variables `chosen`."""
    last = "onecast_collective_last_arrivals_total"
    age = "onecast_collective_in_flight_age_seconds"
    return [
        lines(
            "Who came last",
            [
                Query(
                    ratio(
                        sum_rate(last, ("rank",), chosen=chosen),
                        sum_rate(last, chosen=("op", "group")),
                        "ignoring (rank) group_left ()",
                    ),
                    "rank {{rank}}",
                )
            ],
            "percentunit",
            """Share of collectives to which each rank came last; 1 / ranks each is fair. One rank
            far above: it is the straggler. The driver (rank 0) schedules and samples, and may
            lead by a little. Otherwise compare its clock, cores, other processes and GPU
            throttling.""",
            stacked=True,
            maximum=1,
            width=8,
        ),
        lines(
            "Mean wait for the last rank, by rank",
            [
                Query(
                    ratio(
                        sum_rate(f"{_WAIT}_sum", ("rank",), chosen=chosen),
                        sum_rate(f"{_WAIT}_count", ("rank",), chosen=chosen),
                    ),
                    "rank {{rank}}",
                )
            ],
            "s",
            """The rank that waits least is the late one. If it is always the same: pin it to cores
            of its own, look at its node. If it changes: jitter; look for what else runs.""",
            width=8,
        ),
        lines(
            "Arrival skew, p99",
            [Query(quantile(0.99, _WAIT, ("rank",), chosen=chosen), "rank {{rank}}")],
            "s",
            """The longest waits. Steps in which a rank waited more than 10 ms are kept as traces
            (ONECAST_TRACE_SKEW_MS): look for the phase in which the last rank still was.""",
            logarithmic=True,
            width=8,
        ),
        lines(
            "Time in collectives: waiting or transferring",
            [
                Query(sum_rate(f"{_WAIT}_sum", chosen=chosen), "waiting for the last rank"),
                Query(sum_rate(f"{_TRANSFER}_sum", chosen=chosen), "transferring"),
            ],
            "suffix: s/s",
            """Seconds per second, of all chosen ranks together. Mostly waiting: balance the ranks.
            Mostly transferring: fewer, larger or faster transfers.""",
            stacked=True,
        ),
        lines(
            "Oldest in flight",
            [
                Query(
                    f"max by (rank) ({select(age, chosen=chosen)})"
                    f" or max by (rank) ({select('onecast_up')} * 0)",
                    "rank {{rank}}",
                )
            ],
            "s",
            """A line that climbs second by second is a hang. The rank without one is the one that
            did not come: /hangs.json and the sidecar's log say what it does instead.""",
            limits=Limits(10, 60),
        ),
    ]
