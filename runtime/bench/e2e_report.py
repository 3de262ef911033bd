"""What `onecast bench e2e` reports: figures with their targets, and the tables of a terminal.

Owns the names and targets. Every figure is computed from rows or from the ablation: over all
launches, its spread from each launch alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from . import peers
from .e2e_ablation import Launch as AblationLaunch
from .e2e_channels import CHANNELS, FUSED, SHM, TWO
from .e2e_cost import make_ablation
from .e2e_rows import (
    ALL_REDUCE,
    BROADCAST_US,
    BROADCASTS,
    PAIRED,
    SHARE,
    STEP,
    TOKENS_PER_S,
    make_row,
    make_rows,
)
from .e2e_run import Case, Turn
from .e2e_steps import DRIVER_PHASES, FORWARD, WORKER_PHASES
from .e2e_telemetry import ToggledTurn
from .figures import REPORTED, Row, make_figure
from .terminal import make_figure_table, open_console, short

ON, OFF = f"{TOKENS_PER_S}, telemetry on", f"{TOKENS_PER_S}, telemetry off"
ON_VS_OFF = f"{TOKENS_PER_S}, on vs off"
RECORDS_ON, RECORDS_OFF = "records/step, telemetry on", "records/step, telemetry off"
STEP_ON, STEP_OFF = f"{STEP}, telemetry on", f"{STEP}, telemetry off"

_TP, _BATCH = 2, 8  # of the figures


class Seen(NamedTuple):
    """Everything that was measured, launch by launch."""

    turns: list[list[Turn]]
    telemetry: list[tuple[int, str, list[ToggledTurn]]]  # TP, channel
    ablation: list[AblationLaunch]


def make_all_rows(seen: Seen) -> list[Row]:
    return make_rows(seen.turns) + _telemetry_rows(seen.telemetry)


def _telemetry_rows(launches: Sequence[tuple[int, str, list[ToggledTurn]]]) -> list[Row]:
    values: dict[tuple[Case, str], list[list[float]]] = {}
    for tp, channel, turns in launches:
        for turn in turns:
            metric = STEP_ON if turn.on else STEP_OFF
            case = Case(tp, turn.batch, channel)
            values.setdefault((case, metric), []).append(turn.steps_us)
            metric = RECORDS_ON if turn.on else RECORDS_OFF
            values.setdefault((case, metric), []).append([turn.records])
        pairs: dict[tuple[int, int], dict[bool, float]] = {}
        for turn in turns:
            pairs.setdefault((turn.batch, turn.round), {})[turn.on] = turn.tokens_per_s
        for (batch, _), pair in pairs.items():
            found = {ON: pair[True], OFF: pair[False], ON_VS_OFF: pair[True] / pair[False]}
            for metric, value in found.items():
                values.setdefault((Case(tp, batch, channel), metric), []).append([value])
    return [make_row(case, None, metric, found) for (case, metric), found in values.items()]


# ---- figures

# name: (target with the shipped checkpoint on the CPU, what it is, channel, metric)
_FROM_ROWS = {
    "e2e_fused_vs_two_broadcast_tp2": (">= 1.3", "tokens/s, process group", FUSED, PAIRED),
    "e2e_shm_vs_two_broadcast_tp2": (REPORTED, "tokens/s, shared memory", SHM, PAIRED),
    "broadcast_share_of_step_shm": ("<= 0.02", "shared memory", SHM, SHARE),
    "broadcast_share_of_step_fused": (REPORTED, "process group", FUSED, SHARE),
    "broadcast_share_of_step_two_broadcasts": (REPORTED, "two-broadcasts", TWO, SHARE),
    "telemetry_on_vs_off_tokens": (">= 0.99", "tokens/s", SHM, ON_VS_OFF),
}
_FROM_MODEL = {
    "cost_model_median_error": ("relative, fitted points", "fit", "median_error"),
    "cost_model_held_out_median_error": ("relative, others", "held_out", "median_error"),
    "cost_model_held_out_max_error": ("relative, others", "held_out", "max_error"),
}
TEXTS = {
    **{name: text for name, (_, text, _, _) in _FROM_ROWS.items()},
    **{name: text for name, (text, _, _) in _FROM_MODEL.items()},
}


def make_ratios(seen: Seen, has_targets: bool) -> list[Row]:
    """The figures of TP 2 and batch 8, as far as those were measured.

    `has_targets`: it is the model and the device that the targets are for.
    """
    figures = []
    rows = make_all_rows(seen)
    alone = [make_rows([turns]) for turns in seen.turns]
    alone_telemetry = [_telemetry_rows([launch]) for launch in seen.telemetry]
    for name, (target, _, channel, metric) in _FROM_ROWS.items():
        value = _find(rows, channel, metric)
        if value is None:
            continue
        parts = alone_telemetry if metric == ON_VS_OFF else alone
        others = [found for part in parts if (found := _find(part, channel, metric)) is not None]
        figures.append(make_figure(name, target if has_targets else REPORTED, value, others))
    if seen.ablation:
        models = [make_ablation(some)["model"] for some in _all_and_each(seen.ablation)]
        for name, (_, part, error) in _FROM_MODEL.items():
            first, *others = (model[part][error] for model in models)
            figures.append(make_figure(name, REPORTED, first, others))
    return figures


def _find(rows: Sequence[Row], channel: str, metric: str) -> float | None:
    wanted = {"tp": _TP, "batch": _BATCH, "channel": channel, "rank": None, "metric": metric}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return float(row["median"])
    return None


def _all_and_each(launches: Sequence[AblationLaunch]) -> list[Sequence[AblationLaunch]]:
    return [launches, *([one] for one in launches)]


# ---- tables

Rows = Mapping[tuple[Case, int | None, str], Row]


def print_report(report: Row) -> None:
    """All tables; where no terminal says how wide it is, lines of 120 characters."""
    console = open_console(120)
    rows = {(_case(row), row["rank"], row["metric"]): row for row in report["rows"]}
    plan = report["plan"]
    for tp in plan["tp"]:
        console.print(_throughput_table(rows, tp, plan["batches"]))
        console.print(_step_table(rows, tp, plan["batches"]))
        batch = _BATCH if _BATCH in plan["batches"] else plan["batches"][0]
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
