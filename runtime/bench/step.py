"""`onecast bench step`: the whole loop with a model that does nothing, on two real ranks.

Owns the command: how many launches and steps, and where the report goes. What is run is in
`step_run`, where its time goes is seen by `stopwatch`, the figures and their targets are in
`step_report`.

The cases take turns inside a launch, in an order that is drawn anew each time, so that a slow spell
of the machine meets all; between launches the machine may be another, and a figure shows its spread
over them.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from .figures import describe_machine
from .step_report import make_ratios, make_rows, print_report
from .step_run import RANKS, Plan, launch
from .terminal import deliver, make_parser

_BATCHES = (1, 16, 64, 256)
QUICK = Plan(_BATCHES, places=64, context=1000, rounds=2, warm_steps=30, steps=150, launches=1)
FULL = Plan(_BATCHES, places=64, context=1000, rounds=6, warm_steps=50, steps=200, launches=3)


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if asked; returns the exit status."""
    parser = make_parser("step", __doc__, "one short launch, under a minute")
    options = parser.parse_args(argv)
    report = measure(QUICK if options.quick else FULL)
    return deliver(report, options.json, print_report)


def measure(plan: Plan) -> dict[str, Any]:
    """The whole report: rows of what was measured, ratios against the figures to reach."""
    load = os.getloadavg()[0]
    launches = []
    for number in range(plan.launches):
        print(f"launch {number + 1} of {plan.launches}", file=sys.stderr, flush=True)
        launches.append(launch(plan))
    return {
        "bench": "step",
        "machine": describe_machine(load, f"{RANKS} ranks"),
        "rows": make_rows(launches),
        "ratios": make_ratios(launches),
    }
