"""The report as tables on the terminal.

Owns their columns. Knows nothing of how a figure came about.
"""

from rich.table import Table

from .all_reduce import METHODS, SIZES
from .all_reduce import METRIC as ALL_REDUCE
from .figures import Row
from .launch import ANY_READER, BROADCASTS, BYTES, CPU, METADATA, ONE_WAY, SENDER, Key
from .report import all_reduces, one_way
from .terminal import make_figure_table, open_console


def print_report(report: Row) -> None:
    """All tables; where no terminal says how wide it is, lines of 120 characters."""
    console = open_console()
    by_key = {Key(*(row[field] for field in Key._fields)): row for row in report["rows"]}
    tables = dict.fromkeys((key.ranks, key.mode) for key in by_key if key.metric == ONE_WAY)
    for ranks, mode in tables:
        console.print(_table(by_key, ranks, mode))
    console.print(_all_reduce_table(by_key))
    idle = {key.method: row for key, row in by_key.items() if key.mode == "idle"}
    text = ", ".join(f"{method} {row['median']:.2f}%" for method, row in idle.items())
    console.print(f"A receiver for which nothing comes takes of a core: {text}\n")
    console.print(_ablation_table(by_key))
    values = {ratio["name"]: ratio["value"] for ratio in report["ratios"]}
    for workload in ("W1", "W2"):
        both, broadcasts, fewer_bytes, percent = (
            values[f"ablation_{what}_{workload}"]
            for what in ("both", "fewer_broadcasts", "fewer_bytes", "broadcasts_percent")
        )
        console.print(
            f"{workload}: {both:.1f}x together, fewer broadcasts alone {broadcasts:.1f}x, "
            f"fewer bytes alone {fewer_bytes:.1f}x: "
            f"{percent:.0f}% of the gain comes from fewer broadcasts"
        )
    console.print(make_figure_table("Figures", report["ratios"]))
    console.print(report["machine"])


def _table(rows: dict[Key, Row], ranks: int, mode: str) -> Table:
    table = Table(title=f"{mode}, {ranks} ranks: median (p99)")
    table.add_column("workload")
    table.add_column("method", no_wrap=True)
    metrics = [
        metric
        for metric in (ONE_WAY, ANY_READER, SENDER, CPU)
        if any(key[2:] == (ranks, mode, metric) for key in rows)
    ]
    for column in (*metrics, BYTES, BROADCASTS, "n"):
        table.add_column(column, justify="right")
    for key, row in rows.items():
        if key[2:] != (ranks, mode, ONE_WAY):
            continue
        cells = []
        for metric in metrics:
            cell = rows.get(key._replace(metric=metric))
            numbers = () if cell is None else (_short(cell["median"]), f"({_short(cell['p99'])})")
            cells.append(" ".join(numbers))
        for metric in (BYTES, BROADCASTS):
            cells.append(f"{rows[key._replace(mode='steady', metric=metric)]['median']:g}")
        table.add_row(key.workload, key.method, *cells, str(row["n"]))
    return table


def _all_reduce_table(rows: dict[Key, Row]) -> Table:
    table = Table(title="all-reduce (sum) of float32, us: median (p99)")
    table.add_column("tensor")
    ranks = sorted({key.ranks for key in rows if key.metric == ALL_REDUCE})
    for count in ranks:
        for method in METHODS:
            table.add_column(
                f"{method.removeprefix('all-reduce-')}, {count} ranks", justify="right"
            )
    for size in SIZES:
        cells = [
            f"{_short(row['median'])} ({_short(row['p99'])})"
            for count in ranks
            for row in (rows[all_reduces(size, method, count)] for method in METHODS)
        ]
        table.add_row(size, *cells)
    return table


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ablation_table(rows: dict[Key, Row]) -> Table:
    table = Table(title="Fewer bytes or fewer broadcasts? One way us, tight, 2 ranks, Gloo")
    table.add_column("workload")
    table.add_column("metadata")
    for column in ("many broadcasts", "one broadcast", "bytes (metadata)"):
        table.add_column(column, justify="right")
    for workload in ("W1", "W2"):
        for metadata in ("fat", "compact"):
            cells = []
            for carriage in ("many", "one"):
                method = f"ablation-{metadata}-{carriage}"
                cells.append(f"{rows[one_way(method, workload=workload)]['median']:.1f}")
            steady = [
                rows[Key(workload, f"ablation-{metadata}-many", 2, "steady", metric)]["median"]
                for metric in (BYTES, METADATA)
            ]
            table.add_row(workload, metadata, *cells, f"{steady[0]:g} ({steady[1]:g})")
    return table
