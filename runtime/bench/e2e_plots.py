"""What of a report of `onecast bench e2e` is drawn, and as what.

Owns the choice of plots, their words, and the numbers of each as a table. A report may lack any of
its parts: what is not there is not drawn. The ablation and the peers have files of their own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .markup import Markup, number, percent, spread, table
from .plots import Bar, Lane, Series, Value, bar_plot, line_plot, timeline_plot

Report = Mapping[str, Any]
Row = Mapping[str, Any]

TWO, FUSED, SHM = "two-broadcasts", "process-group", "shared-memory"
STYLES = {TWO: 1, "fixed-metadata": 4, "cached-size": 3, FUSED: 0, SHM: 2}
_PHASES = {
    "schedule": 5, "publish": 1, "broadcast": 1, "ahead": 3, "forward": 0, "sample": 2,
    "commit": 6, "move blocks": 4, "wait": 7,
}  # fmt: skip
OTHER_STYLE = 5  # of what has no style


class Figure(NamedTuple):
    """`name`: of its picture; `tables`: its numbers."""

    name: str
    title: str
    text: str
    svg: Markup
    tables: list[Markup]


class Rows:
    """The rows of a report by what they are of."""

    def __init__(self, report: Report) -> None:
        self._rows = {
            (row["tp"], row["batch"], row["channel"], row["rank"], row["metric"]): row
            for row in report.get("rows", [])
        }
        keys = list(self._rows)
        self.tps = sorted({key[0] for key in keys})
        self.batches = sorted({key[1] for key in keys})
        there = {key[2] for key in keys}
        self.channels = [name for name in report.get("channels", STYLES) if name in there]

    def find(
        self, tp: int, batch: int, channel: str, metric: str, rank: int | None = None
    ) -> Row | None:
        return self._rows.get((tp, batch, channel, rank, metric))

    def ranks(self, tp: int, batch: int, channel: str) -> dict[int, dict[str, Row]]:
        """The phases of each rank."""
        found: dict[int, dict[str, Row]] = {}
        for (of_tp, of_batch, of_channel, rank, metric), row in self._rows.items():
            if rank is not None and (of_tp, of_batch, of_channel) == (tp, batch, channel):
                found.setdefault(rank, {})[metric] = row
        return found


def by_batch(
    rows: Rows, name: str, metric: str, title: str, text: str, label: str, **options: Any
) -> list[Figure]:
    """One figure for each TP: a metric by batch size, a series for each channel."""
    show = options.get("show", number)
    figures = []
    for tp in rows.tps:
        series, lines = [], []
        for channel in rows.channels:
            found = {b: rows.find(tp, b, channel, metric) for b in rows.batches}
            values = {str(b): value_of(row) for b, row in found.items() if row is not None}
            if values:
                series.append(Series(channel, values, STYLES.get(channel, OTHER_STYLE)))
                cells = (cell_of(found[b], show) for b in rows.batches)
                lines.append((channel, *cells))
        if series:
            whole = f"{title}, TP {tp}"
            svg = line_plot(whole, text, series, ("sequences in the batch", label), **options)
            head = ("channel", *(f"batch {b}" for b in rows.batches))
            caption = f"{whole}: median (lowest to highest turn)"
            figures.append(
                Figure(f"{name}-tp{tp}", whole, text, svg, [table(caption, head, lines)])
            )
    return figures


def value_of(row: Row) -> Value:
    return Value(row["median"], *row["spread"])


def cell_of(row: Row | None, show: Any = number) -> str:
    return "" if row is None else spread(row["median"], row["spread"], show)


def throughput(rows: Rows) -> list[Figure]:
    return by_batch(
        rows, "tokens", "tokens/s", "Tokens per second",
        "Median over turns, whiskers from the lowest to the highest turn; logarithmic.",
        "tokens/s", is_log=True,
    )  # fmt: skip


def gain(rows: Rows) -> list[Figure]:
    return by_batch(
        rows, "gain", f"tokens/s vs {TWO}", f"Tokens per second over those with {TWO}",
        "Each turn over the turn of the same round; median, whiskers from lowest to highest. The "
        "dashed line is no gain.",
        f"times {TWO}", line_at=1.0,
    )  # fmt: skip


def share(rows: Rows) -> list[Figure]:
    return by_batch(
        rows, "share", "broadcast share", "Share of the broadcast in a decode step",
        "From the driver beginning to publish until the last rank has the mapping, over the step; "
        "median over steps, whiskers from the lowest to the highest median of a turn.",
        "of the step", show=percent,
    )  # fmt: skip


# ---- the original change


def original(report: Report) -> list[Figure]:
    found = report.get("original")
    if not found:
        return []
    time = next((row for row in found["rows"] if "time" in row["what"]), None)
    if time is None:
        return []
    spreads = {
        row["channel"]: [us / 1e3 for us in row["spread"]]
        for row in report.get("ablation", {}).get("protocols", [])
        if row["workload"] == "W1"
    }
    bars = [
        Bar("the original change, before", _alone(time["before"]), 7),
        Bar("the original change, after", _alone(time["after"]), 7),
    ]
    for channel, value in time["ours"].items():
        low, high = spreads.get(channel, (value, value))
        bars.append(
            Bar(f"here, {channel}", Value(value, low, high), STYLES.get(channel, OTHER_STYLE))
        )
    text = (
        "Milliseconds for the block lists of a step (three tensors, W1); logarithmic. Ours: median "
        "one way, the line at the end of a bar from the lowest to the highest launch. Theirs: as "
        "published, on their GPUs; compare ratios, not milliseconds."
    )
    svg = bar_plot("The block message", text, bars, "ms", is_log=True)
    return [Figure("original", "The block message", text, svg, [])]


def _alone(value: float) -> Value:
    return Value(value, value, value)


# ---- timelines


def timelines(report: Report, tp: int, batch: int) -> list[Figure]:
    """Before and after, on one scale of time."""
    of_channel = {
        one["channel"]: one
        for one in report.get("timelines", [])
        if (one["tp"], one["batch"]) == (tp, batch)
    }
    shown = [of_channel[name] for name in (TWO, FUSED, SHM) if name in of_channel]
    high = max((step["begin_us"] + step["step_us"] for one in shown for step in one["steps"]),
               default=0.0)  # fmt: skip
    text = (
        "Consecutive decode steps of the turn with the median speed, on one clock and one scale. "
        "The grey band is the broadcast: from the driver beginning to publish until the last rank "
        "has the mapping. Single steps, no medians: those are in the table below."
    )
    figures = []
    for one in shown:
        when = "Before" if one["channel"] == TWO else "After"
        title = f"{when}: {one['channel']}, TP {tp}, batch {batch}"
        lanes: dict[int, list[tuple[str, float, float, int]]] = {}
        for step in one["steps"]:
            for rank in step["ranks"]:
                lanes.setdefault(rank["rank"], []).extend(
                    (
                        phase["phase"], max(phase["begin_us"], 0.0), max(phase["end_us"], 0.0),
                        _PHASES.get(phase["phase"], OTHER_STYLE),
                    )
                    for phase in rank["phases"]
                )  # fmt: skip
        bands = [(step["publish_begin_us"], step["in_hand_us"]) for step in one["steps"]]
        svg = timeline_plot(
            title, text,
            [Lane(f"rank {rank}", phases) for rank, phases in sorted(lanes.items())],
            bands, high, "µs since the first of these steps began",
        )  # fmt: skip
        figures.append(Figure(f"timeline-{one['channel']}", title, text, svg, []))
    return figures


def _place(metric: str) -> int:
    """In the order of a step; all-reduce is part of forward, and stands below it."""
    name = metric.removesuffix(" us")
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


_ORDER = (
    "schedule", "wait", "publish", "broadcast", "ahead", "move blocks", "forward", "all-reduce",
    "sample", "commit",
)  # fmt: skip


def phase_table(rows: Rows, tp: int, batch: int) -> Markup | None:
    """The medians of each phase of each rank, a column for each channel."""
    columns = {channel: rows.ranks(tp, batch, channel) for channel in rows.channels}
    names = dict.fromkeys(
        (rank, metric)
        for ranks in columns.values()
        for rank in sorted(ranks)
        for metric in ranks[rank]
    )
    if not names:
        return None
    lines: list[tuple[str, ...]] = []
    for rank, metric in sorted(names, key=lambda name: (name[0], _place(name[1]))):
        found = [columns[channel].get(rank, {}).get(metric) for channel in columns]
        if any(row is not None and row["p99"] for row in found):
            part = metric.removesuffix(" us")
            name = "of that, all-reduce" if part == "all-reduce" else part
            lines.append((f"rank {rank}, {name}", *map(cell_of, found)))
    for metric in ("broadcast us", "step us"):
        cells = (rows.find(tp, batch, channel, metric) for channel in columns)
        name = "publish to the last rank's hand" if metric == "broadcast us" else "whole step"
        lines.append((name, *(cell_of(one) for one in cells)))
    caption = (
        f"µs of a decode step by phase, TP {tp}, batch {batch}: median (lowest to highest "
        "median of a turn)"
    )
    return table(caption, ("rank, phase", *columns), lines)
