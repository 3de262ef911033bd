"""How a run's last events look in a terminal, and as plain text elsewhere.

Owns the layout: a report in lines, and one table with a column per rank as long as they fit the
width; beyond, ranks that did the same share a place. rich is imported only when it draws.
"""

import sys
from collections.abc import Sequence
from typing import TextIO

from .flight import FlightRun
from .flight_events import Event
from .flight_words import duration_text, ranks_text

_COLUMN = 20  # characters that a rank's column should have
_FIXED = 60  # those of time, step and event


def report(run: FlightRun) -> list[str]:
    """Who was in what at the end, where the ranks disagree, and who waits for whom."""
    live = run.kind == "live"
    title = {"live": "live run", "dead": "dead run", "kept": "kept run"}[run.kind]
    lines = [f"{title} {run.path}: engine {run.engine_id}, {_ranks_here(run)}"]
    if run.reason:
        lines.append(f"kept because: {run.reason}")
    lines += [f"problem: {problem}" for problem in run.problems]
    lines.append("")
    for rank, one in run.ranks.items():
        lost = max(0, one.image.head - len(one.image.rows))
        lines.append(
            f"rank {rank} ({one.state}, pid {one.image.pid}): "
            f"{'now' if live else 'at the end'} {one.was_in}"
            + (f"; {lost} older records are gone" if lost else "")
        )
    lines.append("")
    disagreement = run.disagreement()
    if disagreement is not None:
        lines.append(f"first disagreement: {disagreement.text}")
    else:
        lines.append("no disagreement in what the rings hold")
    lines += [f"{'now' if live else 'at the end'}: {hang.text}" for hang in run.hangs()]
    return lines


def _ranks_here(run: FlightRun) -> str:
    here = ranks_text(run.ranks)
    return f"{here} of {run.world_size}"


def print_run(
    run: FlightRun, events: Sequence[Event], file: TextIO | None = None, width: int | None = None
) -> None:
    """Print report and table to `file` (None: standard output); coloured on a terminal."""
    file = sys.stdout if file is None else file
    header, rows = table(run, events, _width(file) if width is None else width)
    if file.isatty():
        _print_rich(run, events, header, rows, file)
        return
    for line in report(run):
        print(line, file=file)
    print(file=file)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=file)


def _width(file: TextIO) -> int:
    if not file.isatty():
        return 1 << 16  # a file is as wide as it must be
    import shutil

    return shutil.get_terminal_size().columns


def table(run: FlightRun, events: Sequence[Event], width: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of cells: when (before the end), step, event, and each rank's part."""
    ranks = list(run.ranks)
    wide = len(ranks) <= max(2, (width - _FIXED) // _COLUMN)
    header = ["before the end" if run.kind != "live" else "ago", "step", "event"]
    header += [f"rank {rank}" for rank in ranks] if wide else ["ranks"]
    rows = []
    for event in events:
        row = [
            duration_text(run.now_ns - event.begin_ns),
            str(event.step) if event.step >= 0 else "",
            event.what,
        ]
        if wide:
            row += [event.text(rank, run.now_ns) for rank in ranks]
        else:
            row.append(_together(event, ranks, run.now_ns))
        rows.append(row)
    return header, rows


def _together(event: Event, ranks: Sequence[int], now_ns: int) -> str:
    """ "ranks 0-6: 1.1 ms to 1.3 ms | rank 7: in flight 12.0 s": those that are alike together."""
    alike: dict[str, list[int]] = {}
    for rank in ranks:
        cell = event.cells.get(rank)
        call = f"! {cell.what}: " if cell is not None and event.differs else ""
        alike.setdefault("-" if cell is None else f"{call}{cell.status}", []).append(rank)
    parts = []
    for text, who in alike.items():
        cells = [event.cells[rank] for rank in who if rank in event.cells]
        spent = [(cell.end_ns or now_ns) - cell.begin_ns for cell in cells]
        shown = text.removesuffix("ok")
        if spent:
            low, high = duration_text(min(spent)), duration_text(max(spent))
            shown = f"{shown} " if shown and not shown.endswith(" ") else shown
            shown += low if low == high else f"{low} to {high}"
        parts.append(f"{ranks_text(who)}: {shown}")
    return " | ".join(parts)


def _print_rich(
    run: FlightRun,
    events: Sequence[Event],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    file: TextIO,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file)
    for line in report(run):
        bad = line.startswith(("first disagreement", "now:", "at the end:", "problem"))
        console.print(Text(line, style="bold red" if bad else ""))
    drawn = Table(*header)
    for event, row in zip(events, rows, strict=True):
        statuses = {cell.status for cell in event.cells.values()}
        style = "" if statuses <= {"ok", "discarded"} else "yellow"
        style = "bold red" if event.differs else style
        drawn.add_row(*(Text(cell) for cell in row), style=style)
    console.print(drawn)
