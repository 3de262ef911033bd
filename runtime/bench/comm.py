"""`onecast bench comm`: how long a step's mapping takes from one rank to the others, and a sum.

Owns the command: how many launches of how many ranks and steps, and where the report goes.
What a launch does, and what "one way" means, is in `launch` and `exchanges`; `all_reduce` is about
the sums of a tensor-parallel model.

Each launch opens every method anew and lets the methods take turns, so that a slow spell of the
machine meets all; between launches the machine may be another, and a ratio shows its spread over
them. A full run has at least 2,000 timed exchanges per row of one-way times, unless the machine is
so slow or busy that ten minutes would not do: later launches then have fewer steps.
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from .all_reduce import METRIC as ALL_REDUCE
from .all_reduce import time_all_reduces
from .arguments import at_least_one
from .figures import describe_machine
from .launch import Figures, Key, Plan, launch
from .report import make_ratios, make_rows
from .tables import print_report
from .terminal import deliver, make_parser

RANKS = (2, 4)
_LAUNCHES = 3
_STEPS = 700  # per launch: 2,100 in all
_QUICK_STEPS = 50
_ALL_REDUCES = 5  # one for so many timed exchanges
_LIMIT_S = 560.0  # a full run, where one launch does not take it all
_FIXED_S = 20.0  # of a launch, whatever its steps: ranks start, and wait idly
_LEAST_STEPS = 20


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if asked; returns the exit status."""
    parser = make_parser("comm", __doc__, "one launch of few steps")
    parser.add_argument(
        "--steps", type=at_least_one, help="timed exchanges per method and launch, at most"
    )
    options = parser.parse_args(argv)
    steps = options.steps
    if steps is None:
        steps = _QUICK_STEPS if options.quick else _STEPS
    report = measure(steps, launches=1 if options.quick else _LAUNCHES, quick=options.quick)
    return deliver(report, options.json, print_report)


def measure(steps: int, launches: int, quick: bool) -> dict[str, Any]:
    """The whole report: rows of what was measured, ratios against the figures to reach."""
    load = os.getloadavg()[0]
    start = time.monotonic()
    seen: list[Figures] = []
    for number in range(launches):
        begin = time.monotonic()
        figures: Figures = {}
        for ranks in RANKS:
            progress = f"launch {number + 1} of {launches}, {ranks} ranks"
            print(progress, file=sys.stderr, flush=True)
            few = max(steps // 5, 1) if quick and ranks > 2 else steps
            untimed, idle_s = (8, 1.0) if quick else (20, 3.0)
            figures |= launch(Plan(ranks, few, few, untimed, idle_s))
            times = time_all_reduces(ranks, max(few // _ALL_REDUCES, 1))
            for (size, method), values in times.items():
                figures[Key(size, method, ranks, "tight", ALL_REDUCE)] = values
        seen.append(figures)
        left, now = launches - number - 1, time.monotonic()
        if left:
            fewer = steps_for(steps, now - begin, (start + _LIMIT_S - now) / left)
            if fewer < steps:
                print(f"{fewer} steps in place of {steps} from now on", file=sys.stderr, flush=True)
            steps = fewer
    notes = ["Gloo"]
    if len(os.sched_getaffinity(0)) < max(RANKS):
        notes.append(f"with {max(RANKS)} ranks, ranks that spin take a core from others")
    machine = describe_machine(load, *notes)
    rows, ratios = make_rows(seen), make_ratios(seen)
    return {"bench": "comm", "machine": machine, "rows": rows, "ratios": ratios}


def steps_for(steps: int, took_s: float, left_s: float) -> int:
    """Steps of a launch that has `left_s`, when one of `steps` took `took_s`; some at least."""
    share = (left_s - _FIXED_S) / max(took_s - _FIXED_S, 1e-9)
    return min(steps, max(_LEAST_STEPS, int(steps * share)))
