"""What `onecast bench e2e` shows in a terminal.

Owns the tables: what stands in which, in lines of 120 characters. Everything in them is in the
report already.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from . import peers
from .e2e_channels import CHANNELS, TWO
from .e2e_report import BATCH, TEXTS
from .e2e_rows import ALL_REDUCE, BROADCAST_US, BROADCASTS, PAIRED, SHARE, STEP, TOKENS_PER_S
from .e2e_run import Case
from .e2e_steps import DRIVER_PHASES, FORWARD, WORKER_PHASES
from .figures import Row
from .terminal import make_figure_table, open_console, short

Rows = Mapping[tuple[Case, int | None, str], Row]


def print_report(report: Row) -> None:
    """All tables; where no terminal says how wide it is, lines of 120 characters."""
    console = open_console(120)
    rows = {(_case(row), row["rank"], row["metric"]): row for row in report["rows"]}
    plan = report["plan"]
    for tp in plan["tp"]:
        console.print(_throughput_table(rows, tp, plan["batches"]))
        console.print(_step_table(rows, tp, plan["batches"]))
        batch = BATCH if BATCH in plan["batches"] else plan["batches"][0]
        console.print(_phase_table(rows, tp, batch))
    if "ablation" in report:
        console.print(_model_table(report["ablation"]))
        console.print(_protocol_table(report["ablation"]))
    if "peers" in report:
        peers.print_peers(report["peers"])
    console.print(make_figure_table("Figures", report["ratios"], TEXTS | peers.TEXTS))
    model = report["model"]
    console.print(
        f"{model['name']}: {model['parameters']:,} parameters, {model['dtype']} on "
        f"{model['device']}; {report['workload']['drawn_tokens']} tokens drawn by each sequence, "
        "greedily, the same over every channel"
    )
    console.print(report["machine"])


def _case(row: Row) -> Case:
    return Case(row["tp"], row["batch"], row["channel"])


def _channels(rows: Rows, tp: int) -> list[str]:
    found = {case.channel for case, _, _ in rows if case.tp == tp}
    return [name for name in CHANNELS if name in found]


def _throughput_table(rows: Rows, tp: int, batches: Sequence[int]) -> Table:
    table = Table(title=f"TP {tp}: tokens/s, over two-broadcasts (low to high of turns)")
    table.add_column("channel", no_wrap=True)
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    for channel in _channels(rows, tp):
        cells = []
        for batch in batches:
            case = Case(tp, batch, channel)
            text = short(rows[case, None, TOKENS_PER_S]["median"])
            paired = rows.get((case, None, PAIRED))
            if paired is not None and channel != TWO:
                low, high = paired["spread"]
                text += f"\nx {paired['median']:.2f}\n({low:.2f} to {high:.2f})"
            cells.append(text)
        table.add_row(channel, *cells)
    return table


def _step_table(rows: Rows, tp: int, batches: Sequence[int]) -> Table:
    table = Table(title=f"TP {tp}: µs of a decode step, median (p99), and the broadcast's share")
    table.add_column("channel", no_wrap=True)
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    for channel in _channels(rows, tp):
        cells = []
        for batch in batches:
            case = Case(tp, batch, channel)
            step, share = rows[case, None, STEP], rows[case, None, SHARE]
            cells.append(f"{step['median']:,.0f} ({step['p99']:,.0f})\n{share['median']:.1%} of it")
        table.add_row(channel, *cells)
    return table


def _phase_table(rows: Rows, tp: int, batch: int) -> Table:
    """The medians of each phase of each rank; the broadcast, which ranks share, below."""
    table = Table(title=f"TP {tp}, batch {batch}: µs of a decode step by phase, medians")
    table.add_column("rank, phase", no_wrap=True)
    channels = _channels(rows, tp)
    for channel in channels:
        table.add_column(channel, justify="right", no_wrap=True)
    for rank in range(tp):
        phases = DRIVER_PHASES if rank == 0 else WORKER_PHASES
        for phase in phases:
            cells = [rows[Case(tp, batch, one), rank, f"{phase} us"]["median"] for one in channels]
            if any(cells):
                shown = (f"{cell:,.0f}" for cell in cells)
                table.add_row(f"{rank} {phase}", *shown, end_section=phase == phases[-1])
            if phase == FORWARD and tp > 1:
                cells = [rows[Case(tp, batch, o), rank, ALL_REDUCE]["median"] for o in channels]
                table.add_row("    all-reduce", *(f"{cell:,.0f}" for cell in cells))
    cells = [rows[Case(tp, batch, one), None, BROADCAST_US]["median"] for one in channels]
    table.add_row("publish to last in hand", *(f"{cell:,.0f}" for cell in cells))
    counts = [rows[Case(tp, batch, one), None, BROADCASTS]["median"] for one in channels]
    table.add_row("broadcasts", *map(short, counts))
    return table


def _model_table(ablation: Row) -> Table:
    model = ablation["model"]
    fitted, kept = model["fit"], model["held_out"]
    table = Table(
        title=f"What a message costs over Gloo: {fitted['points']} points fitted, "
        f"{fitted['median_error']:.0%} off (at most {fitted['max_error']:.0%}); {kept['points']} "
        f"kept from the fit, {kept['median_error']:.0%} ({kept['max_error']:.0%})"
    )
    table.add_column("term", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for term in model["terms"]:
        table.add_row(term["name"], short(term["value"]), term["unit"])
    return table


def _protocol_table(ablation: Row) -> Table:
    table = Table(title="µs one way, measured and by the model; how it divides what is gained")
    table.add_column("step, channel", no_wrap=True)
    columns = ("broadcasts", "bytes", "measured", "model", "fewer broadcasts", "fewer bytes")
    for column in (*columns, "encoding"):
        table.add_column(column, justify="right")
    gains = {(gain["workload"], gain["to"]): gain for gain in ablation["gain"]}
    for row in ablation["protocols"]:
        gain: Mapping[str, Any] = gains.get((row["workload"], row["channel"]), {})
        parts = ("fewer broadcasts us", "fewer bytes us", "cheaper encoding us")
        table.add_row(
            f"{row['workload']}, {row['channel']}",
            short(row["broadcasts"]),
            f"{row['bytes']:,}",
            f"{row['measured_us']:,.0f}",
            f"{row['predicted_us']:,.0f}",
            *(f"{gain[part]:,.0f}" if gain else "" for part in parts),
            end_section=row["channel"] == [*CHANNELS][-1],
        )
    return table
