"""What `onecast bench telemetry` reports: the figures to reach, and the table.

Owns the names and targets. A figure is the median over launches, its spread from the lowest to the
highest of them; with one launch they are the same.
"""

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Launch = Mapping[str, float]  # one value per figure

REPORTED = "reported"

# name: (target, what it is)
FIGURES: dict[str, tuple[str, str]] = {
    "record_ns": ("<= 1000", "added to each dist.all_reduce"),
    "all_reduce_ns": (REPORTED, "the same call without"),
    "step_p50_overhead": ("<= 1.01", "5 ms step, exported / without"),
    "step_p99_overhead": ("<= 1.05", "its slowest hundredth"),
    "naive_step_overhead": (REPORTED, "SDK spans, histograms inline"),
    "naive_step_p99_overhead": (REPORTED, "its slowest hundredth"),
    "gloo_step_p50_overhead": (REPORTED, "130 real all_reduces over Gloo"),
    "spans_per_core_second": (">= 100000", "joined, built, encoded, posted"),
    "sidecar_core_share_exporting": ("< 1", "8 ranks, 100 steps/s, spans"),
    "spans_dropped": ("= 0", "records and spans lost"),
    "sidecar_core_share_metrics_only": ("< 0.05", "the same, no spans"),
    "coverage": ("= 1", "recorded / issued"),
    "recorded_twice": ("= 0", "collectives with more records"),
    "scrape_ms": ("<= 100", "GET /metrics of 64 ranks"),
    "scrape_p90_ms": (REPORTED, "its slowest tenth"),
    "scrape_series": (REPORTED, "lines of that answer"),
}

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    "=": operator.eq,
}


def make_ratios(launches: Sequence[Launch]) -> list[Row]:
    """Every figure that a launch has: name, value, target, holds and spread."""
    ratios = []
    for name, (target, _) in FIGURES.items():
        values = [launch[name] for launch in launches if name in launch]
        if not values:
            continue
        value = statistics.median(values)
        ratios.append(
            {
                "name": name,
                "value": value,
                "target": target,
                "holds": _holds(value, target),
                "spread": [min(values), max(values)],
            }
        )
    return ratios


def _holds(value: float, target: str) -> bool | None:
    if target == REPORTED:
        return None
    relation, number = target.split()
    return _RELATIONS[relation](value, float(number))


def make_row(metric: str, values: Sequence[float]) -> Row:
    """Median, p99 and number of what was measured, as the report's `rows` have it."""
    ordered = sorted(values)
    return {
        "metric": metric,
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
        "n": len(ordered),
    }


def print_report(report: Row) -> None:
    """The table; where no terminal says how wide it is, lines of 120 characters."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(title="Telemetry")
    table.add_column("name", no_wrap=True)
    for column in ("value", "low", "high", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what it is")
    for ratio in report["ratios"]:
        numbers = [_short(number) for number in (ratio["value"], *ratio["spread"])]
        verdict = {True: "met", False: "missed", None: ""}[ratio["holds"]]
        what = FIGURES[ratio["name"]][1]
        table.add_row(ratio["name"], *numbers, ratio["target"], verdict, what)
    console.print(table)
    for case in report["not_recorded"]:
        console.print(f"not recorded: {case}", markup=False)
    console.print(report["machine"])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
