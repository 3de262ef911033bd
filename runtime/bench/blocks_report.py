"""What `onecast bench blocks` reports: rows, the figures to reach, and the tables.

Owns the names and targets. Every figure is computed from rows: over all
launches, its spread from the rows of each launch alone.
"""

import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from .blocks_moves import (
    CONTIGUOUS,
    COPY,
    MEMCPY,
    ONECAST,
    OPS,
    PER_LAYER,
    PER_LAYER_NUMPY,
    SCATTERED,
    SWAPS,
    Cell,
    Headline,
    Times,
)
from .figures import REPORTED, Row, make_figure, summarize
from .terminal import make_figure_table, open_console, short

Launch = Mapping[Cell, Times]


def make_rows(launches: Sequence[Launch]) -> list[Row]:
    """One row per cell and method, over all launches.

    `median`, `p99` and `n` are of microseconds; `gb_per_s` is the bytes moved in the median, each
    counted once. `of_memcpy` and `onecast_gain` are medians over rounds, of the two times in one
    round: memcpy's over this method's, and this method's over onecast's.
    """
    pooled: dict[Cell, Times] = {}
    for times_of in launches:
        for cell, times in times_of.items():
            all_times = pooled.setdefault(cell, {})
            for method, values in times.items():
                all_times.setdefault(method, []).extend(values)
    rows = []
    for cell, times in pooled.items():
        for method, values in times.items():
            row = {**cell._asdict(), "method": method, "metric": "us"}
            row |= summarize([value / 1e3 for value in values])
            row["gb_per_s"] = cell.blocks * cell.block_bytes / row["median"] / 1e3
            row["of_memcpy"] = _paired(times[MEMCPY], values)
            row["onecast_gain"] = _paired(values, times[ONECAST])
            rows.append(row)
    return rows


def _paired(over: Sequence[int], under: Sequence[int]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


# ---- figures


# name: (target, what it is); a GPU's are those of `blocks_gpu`
FIGURES: dict[str, tuple[str, str]] = {
    "swap_cpu_vs_memcpy": (">= 0.8", "the slower of out and in"),
    "copy_cpu_vs_memcpy": (">= 0.8", "copies within the pool"),
    "swap_vs_per_layer_copies": (">= 3", "Tensor.copy_ loop / swap"),
    "swap_vs_per_layer_numpy": (REPORTED, "loop of numpy rows / swap"),
    "swap_cpu_vs_memcpy_lowest": (REPORTED, "of all rows:"),
    "copy_cpu_vs_memcpy_lowest": (REPORTED, "of all rows:"),
}


def make_ratios(launches: Sequence[Launch], headline: Headline) -> list[Row]:
    """Each figure of the CPU, from the rows of all launches; `of` says which rows."""
    rows = make_rows(launches)
    of_launches = [{_name(row): row for row in make_rows([one])} for one in launches]
    ratios = []
    for name, (op, field, method) in _FROM.items():
        target, text = FIGURES[name]
        lowest = name.endswith("_lowest")
        row = _worst(rows, op, field, method, None if lowest else headline)
        spread = [one[_name(row)][field] for one in of_launches]
        if lowest:
            text += f" {row['blocks']} {row['pattern']} {row['op']}, {row['model']}"
        ratios.append({**make_figure(name, target, row[field], spread), "of": text})
    return ratios


def _name(row: Row) -> tuple[object, ...]:
    return *(row[field] for field in _CELL), row["method"]


_FROM = {
    "swap_cpu_vs_memcpy": ("swap", "of_memcpy", ONECAST),
    "copy_cpu_vs_memcpy": ("copy", "of_memcpy", ONECAST),
    "swap_vs_per_layer_copies": ("swap", "onecast_gain", PER_LAYER),
    "swap_vs_per_layer_numpy": ("swap", "onecast_gain", PER_LAYER_NUMPY),
    "swap_cpu_vs_memcpy_lowest": ("swap", "of_memcpy", ONECAST),
    "copy_cpu_vs_memcpy_lowest": ("copy", "of_memcpy", ONECAST),
}


def _worst(rows: Sequence[Row], op: str, field: str, method: str, headline: Headline | None) -> Row:
    """The row with the lowest value; "swap" is in both directions."""
    candidates = [row for row in rows if row["method"] == method and row["op"].startswith(op)]
    if headline is not None:
        of = (*headline, SCATTERED)
        candidates = [
            row for row in candidates if (row["model"], row["blocks"], row["pattern"]) == of
        ]
    return min(candidates, key=operator.itemgetter(field))


# ---- tables


def print_report(report: Row) -> None:
    """All tables; where no terminal says how wide it is, lines of 100 characters."""
    console = open_console(100)
    rows = {_name(row): row for row in report["rows"]}
    sizes = {row["model"]: row["block_bytes"] for row in report["rows"]}
    for model, block_bytes in sizes.items():
        title = f"{model}, blocks of {block_bytes >> 10:,} KiB: GB/s (percent of memcpy's)"
        console.print(_bandwidths(title, model, rows))
    console.print(_gains(rows, sizes))
    texts = {ratio["name"]: ratio["of"] for ratio in report["ratios"]}
    model, blocks = report["headline"]
    title = f"Figures: {blocks} scattered blocks, {model}"
    console.print(make_figure_table(title, report["ratios"], texts))
    console.print(report["machine"])


_CELL = ("model", "blocks", "pattern", "op")


def _bandwidths(title: str, model: str, rows: Mapping[tuple[object, ...], Row]) -> Table:
    table = Table(title=title)
    table.add_column("blocks", justify="right")
    columns = [(pattern, op) for pattern in (SCATTERED, CONTIGUOUS) for op in OPS]
    for pattern, op in columns:
        table.add_column(f"{pattern}\n{op}", justify="right", no_wrap=True)
    table.add_column("mem-\ncpy", justify="right", no_wrap=True)
    table.add_column("copy_", justify="right", no_wrap=True)
    counts = dict.fromkeys(key[1] for key in rows if key[0] == model)
    for blocks in counts:
        cells = []
        for column in columns:
            row = rows[model, blocks, *column, ONECAST]
            cells.append(f"{short(row['gb_per_s'])} {row['of_memcpy'] * 100:3.0f}")
        for method in (MEMCPY, COPY):
            cells.append(short(rows[model, blocks, SCATTERED, SWAPS[0], method]["gb_per_s"]))
        table.add_row(str(blocks), *cells)
    return table


def _gains(rows: Mapping[tuple[object, ...], Row], models: Iterable[str]) -> Table:
    title = "Times faster than a layer-major cache, copied by Tensor.copy_ / by numpy"
    table = Table(title=title)
    table.add_column("scattered swap_out, blocks:", no_wrap=True)
    counts = dict.fromkeys(key[1] for key in rows)
    for blocks in counts:
        table.add_column(str(blocks), justify="right", no_wrap=True)
    for model in models:
        cells = []
        for blocks in counts:
            pair = [rows.get((model, blocks, SCATTERED, SWAPS[0], m)) for m in _LOOPS]
            cells.append("/".join(f"{row['onecast_gain']:.1f}" for row in pair if row is not None))
        table.add_row(model, *cells)
    return table


_LOOPS = (PER_LAYER, PER_LAYER_NUMPY)
