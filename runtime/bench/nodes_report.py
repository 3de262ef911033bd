"""The report of `nodes` as tables on the terminal.

Owns their columns. Knows nothing of how a figure came about.
"""

from rich.table import Table

from .figures import Row
from .terminal import make_figure_table, open_console

_WIDTH = 140
_SHAPE = "nodes x ranks"
_MESSAGES = "messages"


def print_report(report: Row) -> None:
    """Measured beside modelled; then what only the model says."""
    console = open_console(_WIDTH)
    console.print(
        f"a frame of {report['frame_bytes']:,} bytes, {report['broadcast_bytes']:,} with its room; "
        f"an all-reduce of {report['reduced_bytes']:,}, a gather of {report['gathered_bytes']:,} "
        "from each rank; bytes with Gloo's headers, messages of all and (of rank 0)"
    )
    console.print(_measured_table(report["rows"]))
    console.print(_model_table(report["beyond"]))
    console.print(make_figure_table("Figures", report["ratios"]))
    console.print(report["machine"])


def _measured_table(rows: list[Row]) -> Table:
    table = Table(title="bytes per step, measured and modelled")
    table.add_column("operation", no_wrap=True)
    for column in (_SHAPE, _MESSAGES):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("all", "between nodes", "busiest rank"):
        table.add_column(column, justify="right", no_wrap=True)
        table.add_column("model", justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["operation"]):
        numbers = (
            *(row["bytes"], row["model_bytes"]),
            *(row["between_nodes"], row["model_between_nodes"]),
            *(max(row["bytes_by_rank"]), max(row["model_bytes_by_rank"])),
        )
        table.add_row(*_names(row), *(f"{number:,.0f}" for number in numbers))
    return table


def _model_table(rows: list[Row]) -> Table:
    table = Table(title="beyond what was measured: the model alone")
    table.add_column("operation", no_wrap=True)
    for column in (_SHAPE, _MESSAGES, "bytes of all", "between nodes"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["operation"]):
        numbers = (row["model_bytes"], row["model_between_nodes"])
        table.add_row(*_names(row), *(f"{number:,.0f}" for number in numbers))
    return table


def _names(row: Row) -> tuple[str, ...]:
    shape = f"{row['nodes']} x {row['ranks_per_node']}"
    return row["operation"], shape, f"{row['messages']:,.0f} ({row['source_messages']:,.0f})"
