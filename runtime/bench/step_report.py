"""What `onecast bench step` reports: rows, the figures to reach, and the tables.

Owns the names and targets. Every figure is computed from rows: over all launches, its spread from
the rows of each launch alone.
"""

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from .figures import REPORTED, Row, make_figure, summarize
from .step_run import (
    AUTO,
    DECODE,
    HITS,
    MOVED,
    OVERLAP,
    PRIOR,
    RUNNING,
    STEP,
    STEPS_PER_S,
    TOKENS,
    Case,
    Turns,
)
from .stopwatch import CRITICAL, PARTS
from .terminal import make_figure_table, open_console, short

DRIVER = "driver"  # the driver's own work, wherever in time it is done
_DRIVER_PARTS = ("schedule", "build", "publish")

Median = Callable[[Case, str], float]


def make_rows(launches: Sequence[Turns]) -> list[Row]:
    """One row per case and metric, over all launches.

    Metrics are microseconds a step of each part, of all of the driver's own work and of the whole
    step, each step one value; steps a second and counts a step, each turn one value.
    """
    pooled: dict[tuple[Case, str], list[float]] = {}
    for turns_of in launches:
        for case, turns in turns_of.items():
            for turn in turns:
                parts = turn.parts
                driver = [sum(of) for of in zip(*(parts[p] for p in _DRIVER_PARTS), strict=True)]
                for part, values in {**parts, DRIVER: driver}.items():
                    pooled.setdefault((case, f"{part} us"), []).extend(values)
                for metric, value in turn.values.items():
                    pooled.setdefault((case, metric), []).append(value)
    return [
        {**case._asdict(), "metric": metric, **summarize(values)}
        for (case, metric), values in pooled.items()
    ]


def _name(row: Row) -> tuple[Case, str]:
    return Case(*(row[field] for field in Case._fields)), row["metric"]


# ---- figures


def _decode(batch: int, channel: str = AUTO, overlap: bool = OVERLAP) -> Case:
    return Case(DECODE, batch, channel, overlap)


def _value(case: Case, metric: str) -> Callable[[Median], float]:
    return lambda median: median(case, metric)


def _ratio(over: Case, under: Case, metric: str) -> Callable[[Median], float]:
    return lambda median: median(over, metric) / median(under, metric)


# name: (target, what it is, from which rows)
FIGURES: dict[str, tuple[str, str, Callable[[Median], float]]] = {
    "driver_us_per_step_64": (
        "<= 500",
        "schedule+build+publish",
        _value(_decode(64), f"{DRIVER} us"),
    ),
    "driver_us_256_over_64": (
        "<= 4.5",
        "256 / 64 sequences",
        _ratio(_decode(256), _decode(64), f"{DRIVER} us"),
    ),
    "null_model_steps_per_second_64": (
        ">= 1000",
        "of the whole loop",
        _value(_decode(64), STEPS_PER_S),
    ),
    "driver_critical_us_64": (
        REPORTED,
        "until the frame is out",
        _value(_decode(64), f"{CRITICAL} us"),
    ),
    "driver_us_in_turn_64": (
        REPORTED,
        "without overlap",
        _value(_decode(64, overlap=False), f"{DRIVER} us"),
    ),
    "driver_us_overlapped_64": (
        REPORTED,
        "with overlap",
        _value(_decode(64, overlap=True), f"{DRIVER} us"),
    ),
    "overlap_gain_64": (
        REPORTED,
        "steps, in turn / overlap",
        _ratio(_decode(64, overlap=False), _decode(64, overlap=True), f"{STEP} us"),
    ),
    "steps_vs_two_broadcasts_64": (
        REPORTED,
        "auto / two-broadcasts",
        _ratio(_decode(64), _decode(64, PRIOR), STEPS_PER_S),
    ),
}


def make_ratios(launches: Sequence[Turns]) -> list[Row]:
    """Each figure, from the medians of rows."""
    medians = [_medians(make_rows(some)) for some in (launches, *([one] for one in launches))]
    ratios = []
    for name, (target, _, value) in FIGURES.items():
        first, *others = (value(median) for median in medians)
        ratios.append(make_figure(name, target, first, others))
    return ratios


def _medians(rows: Sequence[Row]) -> Median:
    found = {_name(row): row["median"] for row in rows}
    return lambda case, metric: found[case, metric]


# ---- tables


def print_report(report: Row) -> None:
    """All tables; where no terminal says how wide it is, lines of 100 characters."""
    console = open_console(100)
    rows = {_name(row): row for row in report["rows"]}
    console.print(_channel_table(rows))
    for overlap in (True, False):
        console.print(_part_table(rows, overlap))
    texts = {name: text for name, (_, text, _) in FIGURES.items()}
    console.print(make_figure_table("Figures", report["ratios"], texts))
    console.print(report["machine"])


Rows = Mapping[tuple[Case, str], Row]


def _channel_table(rows: Rows) -> Table:
    table = Table(title="Steps per second while decoding (µs of publish)")
    table.add_column("channel", no_wrap=True)
    cases = list(dict.fromkeys(case for case, _ in rows if case.workload == DECODE))
    batches = dict.fromkeys(case.batch for case in cases)
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    for channel, overlap in dict.fromkeys((case.channel, case.overlap) for case in cases):
        cells = []
        for batch in batches:
            case = _decode(batch, channel, overlap)
            rate, publish = (rows[case, of]["median"] for of in (STEPS_PER_S, "publish us"))
            cells.append(f"{rate:,.0f} ({publish:,.0f})")
        table.add_row(f"{channel}, {_HOW[overlap]}", *cells)
    return table


def _part_table(rows: Rows, overlap: bool) -> Table:
    table = Table(title=f"µs of a step, driver {_HOW[overlap]}: median (p99)")
    table.add_column("batch", no_wrap=True)
    cases = [
        case
        for case in dict.fromkeys(case for case, _ in rows)
        if case.channel == AUTO and case.overlap == overlap
    ]
    for case in cases:
        name = f"{case.batch}" if case.workload == DECODE else case.workload
        table.add_column(name, justify="right", no_wrap=True)
    for part, label in _LABELS.items():
        cells = [rows[case, f"{part} us"] for case in cases]
        shown = (f"{cell['median']:.0f} ({cell['p99']:.0f})" for cell in cells)
        table.add_row(label, *shown, end_section=part in (PARTS[-1], STEP))
    for metric, label in _COUNTS.items():
        table.add_row(label, *(short(rows[case, metric]["median"]) for case in cases))
    return table


_HOW = {True: "overlapped", False: "in turn"}
_LABELS = {**{part: part for part in PARTS}, DRIVER: "driver", CRITICAL: "  critical", STEP: "step"}
_COUNTS = {RUNNING: "running", TOKENS: "tokens", MOVED: "moved blocks", HITS: "prefix hits"}
