"""A kept step as lanes of characters: one line a rank, one cell for each part of the step.

Owns which character stands for what happened in a cell. Knows neither the terminal nor colours;
`MARKS` names the sorts of cells, which whoever draws them gives styles.

    rank 0 ··▁█·▒▓▃·······▂··    blocks: in a collective, by how much of the cell; shades: most of
    rank 1 ··▁█···▃·······▂··    that waiting for the last rank; dots: in the step, in none
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .live_steps import FAILED, LAST, OPEN
from .top_view import Detail, Lane, Step

MARKS = {"transfer": "█", "wait": "▒", "bad": "!", "step": "·", "outside": " "}
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHADES = "░▒▓"


@dataclass(frozen=True, slots=True)
class Cell:
    glyph: str
    mark: str  # of MARKS


@dataclass(frozen=True, slots=True)
class LongestWait:
    """The rank that waited longest for another one, and for whom (None: not in the step)."""

    rank: int
    op: str
    group: str
    sequence: int
    wait_ns: int
    for_rank: int | None


def newest_drawn(kept: Sequence[Step]) -> tuple[Step, Detail] | None:
    """The last kept step that came with its detail."""
    for step in reversed(kept):
        if step.detail is not None:
            return step, step.detail
    return None


def cells(lane: Lane, duration_ns: int, width: int) -> list[Cell]:
    """`width` cells of the step's `duration_ns`."""
    scale = width / max(1, duration_ns)
    waits, moves, bad = [0.0] * width, [0.0] * width, [0.0] * width
    bars = lane.bars
    for begin, took, wait, flags in zip(
        accumulate(bars.begin), bars.took, bars.wait, bars.flags, strict=True
    ):
        arrived, end = begin + min(max(wait, 0), took), begin + took
        if flags & (FAILED | OPEN):
            _fill(bad, begin * scale, end * scale)
        else:
            _fill(waits, begin * scale, arrived * scale)
            _fill(moves, arrived * scale, end * scale)
    first, last = int(lane.begin_ns * scale), lane.end_ns * scale
    return [_cell(waits[i], moves[i], bad[i], inside=first <= i < last) for i in range(width)]


def _fill(parts: list[float], begin: float, end: float) -> None:
    """Add [begin, end) to the parts of the cells it covers; what is short is not nothing."""
    width = len(parts)
    if end <= begin or end <= 0 or begin >= width:
        return
    begin, end = max(0.0, begin), min(float(width), end)
    first, last = int(begin), min(int(end), width - 1)
    if first == last:
        parts[first] += end - begin
        return
    parts[first] += first + 1 - begin
    for i in range(first + 1, last):
        parts[i] += 1.0
    parts[last] += end - last


def _cell(wait: float, move: float, bad: float, *, inside: bool) -> Cell:
    if bad:
        return Cell("!", "bad")
    part = min(1.0, wait + move)
    if not part:
        return Cell("·", "step") if inside else Cell(" ", "outside")
    if wait > move:
        return Cell(_SHADES[min(2, int(part * 3))], "wait")
    return Cell(_BLOCKS[min(7, int(part * 8))], "transfer")


def phase_line(detail: Detail, lane: Lane, duration_ns: int, width: int) -> str:
    """The names of the lane's phases where they are, the inner over the outer; "" without any.

    Names are cut to the room they have; a character that is not printable or takes another room
    than one cell is a "?".
    """
    scale = width / max(1, duration_ns)
    line = [" "] * width
    for number, begin, took, _ in lane.phases:
        first = min(max(0, int(begin * scale)), width)
        last = min(max(first, int((begin + took) * scale)), width)
        room = last - first
        if room < 3:
            continue
        name = "".join(
            c if c.isascii() and c.isprintable() else "?" for c in detail.phase_names[number]
        )
        text = name[: room - 2]
        line[first:last] = f"├{text}{'─' * (room - 2 - len(text))}┤"
    return "".join(line).rstrip()


def longest_wait(detail: Detail) -> LongestWait | None:
    """Who waited longest in this step, and for whom."""
    worst: tuple[int, int, tuple[int, int], int] | None = None  # wait, rank, key, kind
    last: dict[tuple[int, int], int] = {}
    for lane in detail.lanes:
        bars = lane.bars
        for kind, sequence, wait, flags in zip(
            bars.kind, accumulate(bars.sequence), bars.wait, bars.flags, strict=True
        ):
            key = detail.kinds[kind][2], sequence  # (number of its group, sequence)
            if flags & LAST and wait >= 0:
                last[key] = lane.rank
            if wait > (worst[0] if worst else 0):
                worst = wait, lane.rank, key, kind
    if worst is None:
        return None
    wait, rank, key, kind = worst
    op, group = detail.kinds[kind][:2]
    return LongestWait(rank, op, group, key[1], wait, last.get(key))
