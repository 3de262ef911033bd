"""Desync hang: ranks call different collectives, and wait for each other until a timeout."""

import sys
from collections.abc import Callable
from pathlib import Path

from .runs import ONECAST, Ended, run
from .situation import Asked, Case, Place, Shown, Situation

PROGRAM = Path(__file__).with_name("desync_program.py")
HANG_S = 1.0  # told of after this long


def _run(timeout_s: float, *options: str) -> Callable[[Place], Ended]:
    def start(place: Place) -> Ended:
        command = [
            str(ONECAST),
            "telemetry",
            "run",
            f"--port={place.port}",
            f"--trace={place.trace}",
            f"--hang={HANG_S}",
            "--step=none",  # the program says itself what a step is: one that hangs is a trace then
            "--",
            sys.executable,
            "-P",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(PROGRAM),
            str(timeout_s),
            *options,
        ]
        variables = {"OMP_NUM_THREADS": "1", "ONECAST_TRACE_ONE_IN": "1"}
        return run(command, place.folder, variables, may_fail=True)

    return start


def desync_hang(timeout_s: float = 6.0) -> Situation:
    return Situation(
        name="desync-hang",
        alert="OnecastDesync",
        knob="decide together what all ranks have to do alike; until then, a short group timeout",
        cases=(
            Case("before", "each rank decides when to stop", _run(timeout_s)),
            Case("after", "--agree: all decide together", _run(timeout_s, "--agree")),
        ),
        asked=(
            Asked("desyncs", "sum(onecast_desyncs_total{CASE}) or vector(0)"),
            Asked(
                "longest time in flight",
                "max(max_over_time(onecast_collective_in_flight_age_seconds{CASE}[5m]))",
                "s",
            ),
            Asked("steps of rank 0", 'onecast_step_duration_seconds_count{CASE, rank="0"}'),
        ),
        shown=(
            Shown("all_reduce", 0, longest=True),
            Shown("broadcast", 1, longest=True),
            Shown("worker.step", 0, longest=True),
        ),
        says="waits in",
    )
