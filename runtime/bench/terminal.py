"""How every benchmark is asked for and shows its figures: options, the table, the JSON file.

Owns those. Knows nothing of what was measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .arguments import new_file
from .figures import Row


def make_parser(bench: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that all have; `quick` is the help of `--quick`."""
    parser = argparse.ArgumentParser(
        prog=f"onecast bench {bench}", description=(description or "").split("\n")[0]
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the report there")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def deliver(report: Row, path: Path | None, print_report: Callable[[Row], None]) -> int:
    """Print a report, and write it where asked; returns the exit status."""
    print_report(report)
    if path is None:
        return 0
    return write("--json", path, lambda: path.write_text(json.dumps(report, indent=2) + "\n"))


def write(option: str, path: Path, writing: Callable[[], object]) -> int:
    """Write what was measured; returns the exit status: a disk that is full is told in a line."""
    try:
        writing()
    except OSError as error:
        print(f"onecast: {option}: {path}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def open_console(width: int = 120) -> Console:
    """The terminal; where none says how wide it is, lines of `width` characters."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def make_figure_table(
    title: str, figures: Sequence[Row], texts: Mapping[str, str] | None = None
) -> Table:
    """Each figure with its spread over the launches and its target; what it is, where known."""
    table = Table(title=title)
    table.add_column("name", no_wrap=True)
    for column in ("value", "low", "high", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if texts is not None:
        table.add_column("what it is")
    for figure in figures:
        numbers = [short(number) for number in (figure["value"], *figure["spread"])]
        verdict = {True: "met", False: "missed", None: ""}[figure["holds"]]
        what = [] if texts is None else [texts[figure["name"]]]
        table.add_row(figure["name"], *numbers, figure["target"], verdict, *what)
    return table


def short(value: float) -> str:
    """As many digits as a reader compares."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return (
        f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
        if abs(value) >= 1
        else f"{value:.3f}"
    )
