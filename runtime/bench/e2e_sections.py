"""What the report of `onecast bench e2e` says: its sections, their order and words.

Owns each section of the page: the text around plots and tables, and when there is nothing to say.
What is drawn is in `e2e_plots` and its neighbours, how in `plots`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from . import e2e_plots, e2e_plots_ablation, e2e_plots_peers
from .e2e_plots import TWO, Figure, Report, Rows
from .markup import Markup, element, join, number, spread, table

Section = tuple[str, str, Markup]  # id, title, the whole

_TP, _BATCH = 2, 8  # of the timelines, where they were measured
_VERDICT = {True: "met", False: "missed", None: ""}


def chosen(rows: Rows) -> tuple[int, int]:
    """TP and batch of which timelines are shown."""
    tps, batches = rows.tps or [_TP], rows.batches or [_BATCH]
    return (_TP if _TP in tps else tps[-1], _BATCH if _BATCH in batches else batches[0])


def make_figure(figure: Figure, with_tables: bool = True) -> Markup:
    """A plot with its title and text, and the numbers behind it."""
    caption = element("figcaption", element("b", figure.title), element("span", figure.text))
    numbers = None
    if with_tables and figure.tables:
        numbers = element("details", element("summary", "The numbers"), *figure.tables)
    return element("figure", caption, figure.svg, numbers, id=f"plot-{figure.name}")


def _section(name: str, title: str, *parts: object) -> Section:
    heading = element("h2", title, id=f"{name}-title")
    return (
        name,
        title,
        element("section", heading, *parts, id=name, aria_labelledby=f"{name}-title"),
    )


def _plots(found: Sequence[Figure]) -> Markup | None:
    return element("div", *map(make_figure, found), class_="plots") if found else None


# ---- one after the other


def _targets(report: Report) -> Section | None:
    ratios = report.get("ratios")
    if not ratios:
        return None
    missed = [row["name"] for row in ratios if row["holds"] is False]
    held = [row["name"] for row in ratios if row["holds"]]
    verdict = f"{len(held)} of {len(held) + len(missed)} targets are met."
    if missed:
        verdict += f" Missed: {', '.join(missed)}."
    lines = [
        (row["name"], number(row["value"]), f"{number(row['spread'][0])} to "
         f"{number(row['spread'][1])}", row["target"], _VERDICT[row["holds"]])
        for row in ratios
    ]  # fmt: skip
    head = ("figure", "median", "lowest to highest", "target", "verdict")
    return _section(
        "figures", "Figures and targets", element("p", verdict, class_="verdict"),
        table("Figures, their spread over launches or rounds, and targets", head, lines, "missed"),
    )  # fmt: skip


def _original(report: Report) -> Section | None:
    found = report.get("original")
    if not found:
        return None
    channels = list(dict.fromkeys(name for row in found["rows"] for name in row["ours"]))
    spreads = {
        row["channel"]: [us / 1e3 for us in row["spread"]]
        for row in report.get("ablation", {}).get("protocols", [])
        if row["workload"] == "W1"
    }
    lines = []
    for row in found["rows"]:
        of_time = "time" in row["what"]
        cells = [
            "" if name not in row["ours"]
            else spread(row["ours"][name], spreads[name]) if of_time and name in spreads
            else number(row["ours"][name])
            for name in channels
        ]  # fmt: skip
        lines.append((row["what"], number(row["before"]), number(row["after"]), *cells))
        before = row["ours"].get(TWO)
        if of_time and before:
            gains = [f"{number(before / row['ours'][name])}x" for name in channels]
            gain = f"{number(row['before'] / row['after'])}x"
            lines.append(("times as fast as before", "1x", gain, *gains))
    head = ("what", "original, before", "original, after", *(f"here, {name}" for name in channels))
    return _section(
        "original", "The original change, and here",
        element(
            "p",
            "vLLM's pull request 4757 made the metadata of a block message a known size: one "
            "broadcast of it instead of two. Its published figures are from GPUs; ours are from "
            "the machine below, so that only the rows of bytes and broadcasts, and ratios of "
            "times, can be compared.",
        ),
        table("Block lists of one step (three tensors): median (spread)", head, lines),
        _plots(e2e_plots.original(report)),
    )  # fmt: skip


def _throughput(report: Report) -> Section | None:
    rows = Rows(report)
    found = [*e2e_plots.throughput(rows), *e2e_plots.gain(rows)]
    if not found:
        return None
    steps = [
        table(
            f"µs of a decode step, TP {tp}: median, spread of the medians of turns; p99",
            ("channel", *(f"batch {batch}" for batch in rows.batches)),
            [
                (channel, *(_step(rows, tp, batch, channel) for batch in rows.batches))
                for channel in rows.channels
            ],
        )
        for tp in rows.tps
    ]
    return _section(
        "throughput", "Tokens per second, by batch and protocol", _plots(found),
        element("details", element("summary", "Time of a decode step"), *steps),
    )  # fmt: skip


def _step(rows: Rows, tp: int, batch: int, channel: str) -> str:
    row = rows.find(tp, batch, channel, "step us")
    if row is None:
        return ""
    return f"{spread(row['median'], row['spread'])}; {number(row['p99'])}"


def _timelines(report: Report) -> Section | None:
    rows = Rows(report)
    tp, batch = chosen(rows)
    found = e2e_plots.timelines(report, tp, batch)
    if not found:
        return None
    return _section(
        "steps", "A step before and after", _plots(found),
        element("h3", "Phases of the step on every rank"),
        e2e_plots.phase_table(rows, tp, batch),
    )  # fmt: skip


def _share(report: Report) -> Section | None:
    found = e2e_plots.share(Rows(report))
    if not found:
        return None
    return _section("share", "The broadcast's share of a step, by TP and batch", _plots(found))


def _ablation(report: Report) -> Section | None:
    found = e2e_plots_ablation.ablation(report)
    if not found:
        return None
    ablation = report["ablation"]
    return _section(
        "ablation", "Fewer bytes or fewer broadcasts",
        element(
            "p",
            f"Messages of every number of broadcasts and bytes, on {ablation['ranks']} ranks over "
            f"{ablation['backend']}, and a cost model fitted to them: "
            f"{ablation['model']['formula']}.",
        ),
        _plots(found),
    )  # fmt: skip


def _peers(report: Report) -> Section | None:
    peers = report.get("peers")
    if not peers:
        return None
    left_out = [
        f"{one['peer']}{', ' + one['how'] if one.get('how') else ''}: {one['why']}."
        for one in peers.get("skipped", [])
    ]
    return _section(
        "peers", "Beside others", _plots(e2e_plots_peers.peers(report)),
        element("p", "Not measured. ", " ".join(left_out), class_="note") if left_out else None,
        _facts("Versions", peers.get("versions", {})),
        _facts("What the words mean", peers.get("definitions", {})),
    )  # fmt: skip


def _made(report: Report) -> Section | None:
    """What it was measured on, and how to do it again."""
    hardware = dict(report.get("hardware", {}))
    if "memory_bytes" in hardware:
        hardware["memory"] = f"{hardware.pop('memory_bytes') / 2**30:.1f} GiB"
    parts = [
        _facts(title, facts)
        for title, facts in (
            ("Hardware", hardware), ("Versions", report.get("versions", {})),
            ("Model", report.get("model", {})), ("Work", report.get("workload", {})),
            ("How much was measured", report.get("plan", {})),
            ("Protocols", report.get("channels", {})),
            ("What the words mean", report.get("definitions", {})),
        )
    ]  # fmt: skip
    command = report.get("command")
    if command is None and not any(parts):
        return None
    made = [element("h3", "The command that made this"), element("pre", command)] if command else []
    return _section("made", "How it was measured", *made, *parts)


def _facts(title: str, facts: dict[str, Any]) -> Markup | None:
    lines = [
        part
        for name, value in facts.items()
        if value not in (None, [], "")
        for part in (element("dt", name.replace("_", " ")), element("dd", _plain(value)))
    ]
    return join([element("h3", title), element("dl", *lines)]) if lines else None


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    _targets, _original, _throughput, _timelines, _share, _ablation, _peers, _made,
)  # fmt: skip
