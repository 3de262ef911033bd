"""What `onecast bench telemetry` reports: the figures to reach, and the table.

Owns the names and targets. A figure is the median over launches, its spread from the lowest to the
highest of them; with one launch they are the same.
"""

import statistics
from collections.abc import Mapping, Sequence

from .figures import REPORTED, Row, make_figure, summarize
from .terminal import make_figure_table, open_console

Launch = Mapping[str, float]  # one value per figure

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


def make_ratios(launches: Sequence[Launch]) -> list[Row]:
    """Every figure that a launch has: name, value, target, holds and spread."""
    ratios = []
    for name, (target, _) in FIGURES.items():
        values = [launch[name] for launch in launches if name in launch]
        if not values:
            continue
        ratios.append(make_figure(name, target, statistics.median(values), values))
    return ratios


def make_row(metric: str, values: Sequence[float]) -> Row:
    """Median, p99 and number of what was measured, as the report's `rows` have it."""
    return {"metric": metric, **summarize(values)}


def print_report(report: Row) -> None:
    """The table; where no terminal says how wide it is, lines of 120 characters."""
    console = open_console()
    texts = {name: text for name, (_, text) in FIGURES.items()}
    console.print(make_figure_table("Telemetry", report["ratios"], texts))
    for case in report["not_recorded"]:
        console.print(f"not recorded: {case}", markup=False)
    console.print(report["machine"])
