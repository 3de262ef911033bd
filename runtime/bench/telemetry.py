"""`onecast bench telemetry`: what measuring costs, and how much of it is seen.

Owns the command: how many launches of what, and where the report goes. What is measured is in
`telemetry_record`, `telemetry_steps`, `telemetry_node` and `telemetry_coverage`, each with real
processes of its own; the figures and their targets are in `telemetry_report`.

Whatever is compared takes turns inside one launch. Between launches the machine may be another, and
a figure shows its spread over them.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .figures import describe_machine
from .telemetry_coverage import coverage, measure_coverage
from .telemetry_node import NodePlan, measure_export, measure_metrics_only, measure_scrape
from .telemetry_receiver import Receiver
from .telemetry_record import RecordPlan, measure_record
from .telemetry_report import make_ratios, make_row, print_report
from .telemetry_steps import StepPlan, measure_naive, measure_steps
from .terminal import deliver, make_parser


class Plan(NamedTuple):
    launches: int
    record: RecordPlan
    steps: StepPlan
    naive: StepPlan
    node: NodePlan
    coverage_rounds: int


QUICK = Plan(
    launches=1,
    record=RecordPlan(pairs=60, calls=50),
    steps=StepPlan(blocks=10, steps=25, gloo_blocks=1, gloo_steps=4, pause_s=0.2),
    naive=StepPlan(blocks=2, steps=20, gloo_blocks=0, gloo_steps=0, pause_s=0.1),
    node=NodePlan(feed_s=3.0, scrapes=5),
    coverage_rounds=1,
)
FULL = Plan(
    launches=3,
    record=RecordPlan(pairs=300, calls=50),
    steps=StepPlan(blocks=40, steps=40, gloo_blocks=4, gloo_steps=10, pause_s=0.25),
    naive=StepPlan(blocks=6, steps=40, gloo_blocks=0, gloo_steps=0, pause_s=0.2),
    node=NodePlan(feed_s=8.0, scrapes=20),
    coverage_rounds=5,
)


class _Launch:
    """What one launch has found: a value per figure, rows of what it is the median of."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.values: dict[str, list[float]] = {}
        self.not_recorded: list[str] = []

    def add(self, values: dict[str, list[float]]) -> None:
        self.values |= values
        self.figures |= {name: statistics.median(of) for name, of in values.items()}


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if asked; returns the exit status."""
    parser = make_parser("telemetry", __doc__, "one short launch, under a minute")
    options = parser.parse_args(argv)
    report = measure(QUICK if options.quick else FULL)
    return deliver(report, options.json, print_report)


def measure(plan: Plan) -> dict[str, Any]:
    """The whole report: rows of what was measured, ratios against the figures to reach."""
    load = os.getloadavg()[0]
    launches = []
    for number in range(plan.launches):
        launches.append(_Launch())
        for name, part in _PARTS.items():
            progress = f"launch {number + 1} of {plan.launches}, {name}"
            print(progress, file=sys.stderr, flush=True)
            part(plan, launches[-1])
    pooled: dict[str, list[float]] = {}
    for launch in launches:
        for metric, values in launch.values.items():
            pooled.setdefault(metric, []).extend(values)
    return {
        "bench": "telemetry",
        "machine": describe_machine(load, "Gloo"),
        "rows": [make_row(metric, values) for metric, values in pooled.items()],
        "ratios": make_ratios([launch.figures for launch in launches]),
        "not_recorded": sorted({name for launch in launches for name in launch.not_recorded}),
    }


# ---- the parts of a launch


def _record(plan: Plan, launch: _Launch) -> None:
    launch.add(measure_record(plan.record))


def _steps(plan: Plan, launch: _Launch) -> None:
    with Receiver() as receiver, tempfile.TemporaryDirectory() as folder:
        found = measure_steps(plan.steps, receiver.url, Path(folder))
        found |= measure_naive(plan.naive, receiver.url)
    for name, prefix in (("synthetic", ""), ("naive", "naive_"), ("gloo", "gloo_")):
        steps = found[name]
        p50 = "naive_step_overhead" if name == "naive" else f"{prefix}step_p50_overhead"
        launch.figures |= {p50: steps.p50, f"{prefix}step_p99_overhead": steps.p99}
        for mode, blocks in (("without", steps.without), ("with", steps.with_it)):
            launch.values[f"{name} step {mode}, s"] = [one for block in blocks for one in block]


def _export(plan: Plan, launch: _Launch) -> None:
    with Receiver() as receiver:
        launch.add(measure_export(plan.node, receiver.url))


def _metrics_only(plan: Plan, launch: _Launch) -> None:
    launch.add(measure_metrics_only(plan.node))


def _scrape(plan: Plan, launch: _Launch) -> None:
    launch.add(measure_scrape(plan.node))


def _coverage(plan: Plan, launch: _Launch) -> None:
    cases = measure_coverage(plan.coverage_rounds)
    launch.figures["coverage"] = coverage(cases)
    launch.figures["recorded_twice"] = sum(max(0, case.recorded - case.issued) for case in cases)
    launch.not_recorded = [case.name for case in cases if case.recorded < case.issued]


_PARTS: dict[str, Callable[[Plan, _Launch], None]] = {
    "recording": _record,
    "steps": _steps,
    "exporting": _export,
    "metrics only": _metrics_only,
    "scraping": _scrape,
    "coverage": _coverage,
}
