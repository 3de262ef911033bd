"""The report of `onecast bench e2e` as one HTML page that needs nothing else, and as pictures.

Owns the document: its head, what stands above the sections, and the pictures beside it. The
sections are in `e2e_sections`. The page has no script and asks for nothing: what it shows is in it.

The pictures are the page's own plots, painted by Chromium where there is one: a second way of
drawing them, with a library of its own, would have to be kept equal by hand.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import e2e_plots, e2e_plots_ablation, e2e_plots_peers
from .e2e_plots import Figure, Report, Rows
from .e2e_sections import SECTIONS, chosen, make_figure
from .e2e_style import STYLE
from .markup import Markup, element, join
from .pictures import paint


def write_report(report: Report, folder: Path) -> Path:
    """Write `e2e.html`, and a PNG of each plot where Chromium is there; returns the page.

    `report`: as the JSON of `onecast bench e2e`, of which any part may be absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "e2e.html"
    page.write_text(make_page(report), encoding="utf-8")
    painted = paint({one.name: (alone(one), _height(one)) for one in figures(report)}, folder)
    if not painted:
        print("no pictures: Chromium is not installed; the page is whole", file=sys.stderr)
    return page


def make_page(report: Report) -> str:
    sections = [section for section in (make(report) for make in SECTIONS) if section is not None]
    links = [element("li", element("a", title, href=f"#{name}")) for name, title, _ in sections]
    body = join(
        [
            element("a", "Skip to the report", href="#main", class_="skip"),
            _header(report, links),
            element("main", *(section for _, _, section in sections), id="main", tabindex=-1),
        ]
    )
    return _document(body)


def _document(body: Markup, kind: str = "report") -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><title>onecast: end to end</title>'
        f"<style>{STYLE}</style>"
    )
    top = f'<!doctype html>\n<html lang="en"><head>{head}</head>'
    return f'{top}<body class="{kind}">{body}</body></html>\n'


def figures(report: Report) -> list[Figure]:
    """Every plot of the page."""
    rows = Rows(report)
    tp, batch = chosen(rows)
    return [
        *e2e_plots.original(report),
        *e2e_plots.throughput(rows),
        *e2e_plots.gain(rows),
        *e2e_plots.timelines(report, tp, batch),
        *e2e_plots.share(rows),
        *e2e_plots_ablation.ablation(report),
        *e2e_plots_peers.peers(report),
    ]


def alone(figure: Figure) -> str:
    """A page of one plot, to be painted."""
    return _document(element("main", make_figure(figure, with_tables=False)), "picture")


def _height(figure: Figure) -> int:
    """CSS pixels that a plot takes in a picture: the drawing, the title, the lines of text."""
    _, _, width, height = re.findall(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', figure.svg)[0]
    return 60 + 20 * (len(figure.text) // 80 + 1) + 560 * int(height) // int(width)


def _header(report: Report, links: Sequence[Markup]) -> Markup:
    model = report.get("model", {})
    what = (
        f"{model['name']} ({model['parameters']:,} parameters, {model['dtype']} on "
        f"{model['device']})"
        if model
        else "a model"
    )
    return element(
        "header",
        element("h1", "Does one broadcast a step matter end to end?"),
        element(
            "p",
            f"The same prompts and the same greedy tokens, checked to be equal, with {what}: one "
            "way of telling the ranks what to do after the other, in turns, repeated. Every figure "
            "is a median; in brackets, or as a whisker, stands its spread.",
        ),
        element("p", report.get("machine", "")) if report.get("machine") else None,
        element("nav", element("ul", *links), aria_label="Sections"),
    )
