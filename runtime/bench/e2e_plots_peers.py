"""The plots of what others do with the same work.

Owns their choice and words, and the numbers of each as a table.
"""

from collections.abc import Sequence

from .e2e_plots import Figure, Report, Row, cell_of, value_of
from .markup import number, table
from .plots import Bar, bar_plot


def peers(report: Report) -> list[Figure]:
    rows: Sequence[Row] = report.get("peers", {}).get("rows", [])
    return [one for one in (_rates(rows), _queues(rows)) if one is not None]


def _rates(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if "tokens_per_s" in row]
    if not rows:
        return None
    bars, lines = [], []
    for row in rows:
        rate, equal = row["tokens_per_s"], row["equal"]
        cores = f"{row['cores']} core{'s' if row['cores'] > 1 else ''}"
        name = f"{row['peer']}, {row['how']}, {cores}"
        bars.append(Bar(name, value_of(rate), 2 if row["peer"] == "onecast" else 7))
        same = "" if equal is None else f"{equal['sequences']} of {equal['of']}"
        lines.append(
            (name, f"{row['processes']} x {row['threads']}", cell_of(rate), str(rate["n"]), same)
        )
    text = (
        f"Tokens per second, batch {rows[0]['batch']} on the CPU: the same checkpoint, prompts and "
        "cores, greedily, in turns; median, the line at the end of a bar from the slowest to the "
        "fastest turn."
    )
    title = "Beside Hugging Face transformers"
    svg = bar_plot(title, text, bars, "tokens/s")
    head = ("who", "processes x threads", "tokens/s, median (spread)", "turns", "equal sequences")
    return Figure("peers", title, text, svg, [table(title, head, lines)])


def _queues(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if "one_way_us" in row]
    if not rows:
        return None
    bars = [
        Bar(f"{row['peer']}, {row['how']}", value_of(row["one_way_us"]),
            2 if row["peer"] == "onecast" else 7)
        for row in rows
    ]  # fmt: skip
    text = (
        "µs one way for the step of 64 decoding sequences on two ranks, in a busy loop, in turns; "
        "logarithmic; median, the line at the end of a bar over thirds of the launch."
    )
    title = "Beside other step queues"
    lines = [
        (bar.name, cell_of(row["one_way_us"]), number(row["one_way_us"]["p99"]))
        for bar, row in zip(bars, rows, strict=True)
    ]
    head = ("queue", "µs, median (spread)", "p99")
    svg = bar_plot(title, text, bars, "µs", is_log=True)
    return Figure("queues", title, text, svg, [table(title, head, lines)])
