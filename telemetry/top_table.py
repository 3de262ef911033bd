"""A table that fits: rows of cells as styled lines of at most `width` cells.

Owns how columns give way: those of the least weight go first, then what may be cut is cut. Text is
shown as it is, never as markup, without what a terminal would obey.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from .flight_words import printable

_GAP = 2
_LEAST = 8  # cells that a column which may be cut keeps


@dataclass(frozen=True, slots=True)
class Column:
    """`weight`: those with the least go first; 0: always there. `cut`: may become narrower."""

    name: str
    weight: int = 0
    right: bool = False
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    cells: Sequence[str]
    style: str = ""


def plain(text: str) -> str:
    """A name from the program: one line, nothing that a terminal would obey."""
    return printable(text).replace("\t", " ")


def fit(line: Text, width: int) -> Text:
    """The line, cut to `width` cells and marked so."""
    line.truncate(max(1, width), overflow="ellipsis")
    return line


def table(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[Text]:
    """The header and one line for each row."""
    texts = [[plain(cell) for cell in row.cells] for row in rows]
    widths = [
        max(cell_len(cell) for cell in [column.name, *(row[i] for row in texts)])
        for i, column in enumerate(columns)
    ]
    least = [
        min(wide, max(_LEAST, cell_len(column.name))) if column.cut else wide
        for column, wide in zip(columns, widths, strict=True)
    ]
    shown = list(range(len(columns)))
    while _total(least, shown) > width:
        lightest = min((columns[i].weight for i in shown if columns[i].weight), default=0)
        if not lightest:
            break
        shown.remove(next(i for i in shown if columns[i].weight == lightest))
    over = _total(widths, shown) - width
    for i in shown:
        less = min(max(0, over), widths[i] - least[i])
        widths[i] -= less
        over -= less
    lines = [_line(columns, [column.name for column in columns], widths, shown, "dim")]
    for row, cells in zip(rows, texts, strict=True):
        lines.append(_line(columns, cells, widths, shown, row.style))
    return [fit(line, width) for line in lines]


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + _GAP * (len(shown) - 1)


def _line(
    columns: Sequence[Column],
    cells: Sequence[str],
    widths: Sequence[int],
    shown: Sequence[int],
    style: str,
) -> Text:
    parts = []
    for i in shown:
        cell, wide = cells[i], widths[i]
        missing = wide - cell_len(cell)
        if missing < 0:
            cell = set_cell_size(cell, wide - 1) + "…"
        elif columns[i].right:
            cell = " " * missing + cell
        else:
            cell += " " * missing
        parts.append(cell)
    return Text((" " * _GAP).join(parts).rstrip(), style=style)
