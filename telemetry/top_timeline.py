"""The last kept step as a section of a frame: what is said of it, and its lanes with their styles.

Owns words and styles; `top_lanes` has the cells.
"""

from textwrap import wrap

from rich.text import Text

from .flight_words import duration_text
from .top_lanes import MARKS, cells, longest_wait, newest_drawn, phase_line
from .top_section import Section, flow
from .top_table import fit, plain
from .top_view import Detail, LiveView, Step

_STYLES = {"transfer": "cyan", "wait": "yellow", "bad": "bold red", "step": "dim", "outside": ""}
_LEAST_LANES = 4  # also on a low terminal
_LEGEND = {
    "transfer": "transfer",
    "wait": "waiting",
    "step": "no collective",
    "bad": "failed",
}


def timeline(view: LiveView, width: int) -> Section:
    found = newest_drawn(view.kept)
    if found is None:
        why = "No step is kept yet." if not view.kept else "The kept steps are too large to show."
        return Section("Last kept step", [fit(Text(why, style="dim"), width)])
    step, detail = found
    title = f"Step {step.step}: {duration_text(step.duration_ns)}, {step.bars} collective calls"
    title += f", batch {step.batch}" if step.batch else ""
    title += f", kept: {step.reason}"
    about = _about(step, detail, width)
    phases_and_lanes = _lanes(step, detail, width)
    fixed = len(about) + min(len(phases_and_lanes), _LEAST_LANES + 1)
    return Section(plain(title), about + phases_and_lanes, "ranks", fixed=fixed, weight=2)


def _about(step: Step, detail: Detail, width: int) -> list[Text]:
    rows = []
    if step.error is not None:
        rows.append(Text(f"error: {plain(step.error)}", style="bold red"))
    worst = longest_wait(detail)
    if worst is not None:
        whom = "" if worst.for_rank is None else f" for rank {worst.for_rank}"
        call = f"{worst.op} #{worst.sequence} ({worst.group})"
        text = f"longest wait: rank {worst.rank}{whom}, {duration_text(worst.wait_ns)} in {call}"
        rows += [Text(line) for line in wrap(plain(text), width)[:2]]
    if detail.left_out:
        rows.append(Text(f"{detail.left_out} shorter calls left out", style="dim"))
    marks = [Text.assemble((MARKS[mark], _STYLES[mark]), f" {_LEGEND[mark]}") for mark in _LEGEND]
    return [fit(row, width) for row in rows] + flow(marks, width)


def _lanes(step: Step, detail: Detail, width: int) -> list[Text]:
    """The phases of the first rank, then a lane for each; on a wide terminal, how often it came
    last."""
    if not detail.lanes:
        return []
    label = max(len(str(lane.rank)) for lane in detail.lanes)
    before = "rank " if width >= 60 else ""
    last = [f" last {lane.caused[0]}x" if width >= 60 else "" for lane in detail.lanes]
    room = max(4, width - len(before) - label - 1 - max(map(len, last)))
    phases = phase_line(detail, detail.lanes[0], step.duration_ns, room)
    lines = [Text(" " * (len(before) + label + 1) + phases, style="magenta")] if phases else []
    for lane, suffix in zip(detail.lanes, last, strict=True):
        line = Text(f"{before}{lane.rank:>{label}} ", style="bold red" if lane.error else "")
        for cell in cells(lane, step.duration_ns, room):
            line.append(cell.glyph, _STYLES[cell.mark])
        line.append(suffix, "dim")
        lines.append(line)
    return [fit(line, width) for line in lines]
