"""HTML and SVG as text that is always escaped: elements, tables, numbers as a reader compares them.

Owns those. Knows nothing of what a page says.
"""

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is markup already. What is not is escaped when it becomes a part of some."""


def element(name: str, *children: object, **attributes: object) -> Markup:
    """`<name attributes>children</name>`.

    An attribute that is None is left out; `class_` is "class", and "_" within a name is "-".
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """One after the other; None is nothing."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], bad: str = ""
) -> Markup:
    """In a box that scrolls by itself where it is wider than the page.

    The first cell of a row names it. Cells that are numbers stand on the right, and a cell that
    begins with `bad` is marked as such.
    """
    head = (element("th", column, scope="col") for column in columns)
    body = [_row(cells, bad) for cells in rows]
    whole = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *body),
        aria_label=caption,
    )
    box = element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return join([element("p", caption, class_="caption"), box])  # not in the box: it would scroll


def _row(cells: Sequence[object], bad: str) -> Markup:
    first, *others = cells
    shown = [element("th", first, scope="row")]
    for cell in others:
        text = str(cell)
        kind = "bad" if bad and text.startswith(bad) else "n" if text[:1].isdigit() else None
        shown.append(element("td", cell, class_=kind))
    return element("tr", *shown)


def number(value: float) -> str:
    """As many digits as a reader compares."""
    size = abs(value)
    if size >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.01 else f"{value:.2g}"


def percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"


def spread(median: float, low_high: Sequence[float], show: object = number) -> str:
    """The median, and from where to where, unless there was one measurement only."""
    assert callable(show)
    low, high = (show(value) for value in low_high)
    return str(show(median)) if low == high else f"{show(median)} ({low} to {high})"
