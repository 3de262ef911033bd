"""The kinds of plots: lines with whiskers, points against points, bars, stacked bars.

Owns how each is drawn of plain numbers. Every mark has the class "mark" and says its numbers when
it is pointed at. Knows nothing of what is measured.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .markup import Markup, element, join, number, spread
from .plot_axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    bottom_axis,
    frame,
    left_axis,
    legend,
    linear,
    logarithmic,
    mark,
    places,
    tick,
)

_BAR, _BAR_GAP = 14, 22  # height of a bar, and of the line of text above it
_ABOVE = 6  # of the first


class Value(NamedTuple):
    """A median, and the lowest and the highest of what it is of."""

    median: float
    low: float
    high: float


class Series(NamedTuple):
    """`values` by the name of the place along the axis; `style`: its colour and shape."""

    name: str
    values: dict[str, Value]
    style: int


class Bar(NamedTuple):
    name: str
    value: Value
    style: int


def line_plot(
    title: str,
    text: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    is_log: bool = False,
    show: Callable[[float], str] = number,
    line_at: float | None = None,
) -> Markup:
    """Medians joined by lines, whiskers over their spread, side by side at each place.

    `labels`: of the axis below and the one on the left. `line_at`: a value to compare with.
    """
    names = list(dict.fromkeys(name for one in series for name in one.values))
    seen = [v for one in series for value in one.values.values() for v in (value.low, value.high)]
    seen += [] if line_at is None else [line_at]
    vertical = (logarithmic if is_log else linear)(seen, HEIGHT - BOTTOM, TOP)
    middles = dict(zip(names, places(len(names)), strict=True))
    parts = [
        left_axis(vertical, labels[1], show),
        bottom_axis([(x, name) for name, x in middles.items()], labels[0]),
    ]
    if line_at is not None:
        y = vertical(line_at)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="compare"))
    for index, one in enumerate(series):
        aside = (index - (len(series) - 1) / 2) * min(7, 240 / len(names) / len(series))
        points = [(middles[name] + aside, value) for name, value in one.values.items()]
        path = " ".join(f"{x:.1f},{vertical(value.median)}" for x, value in points)
        parts.append(element("polyline", points=path, class_=f"line s{one.style}"))
        for (x, value), name in zip(points, one.values, strict=True):
            said = f"{one.name}, {name}: {spread(value.median, value[1:], show)}"
            parts.append(_whisker(x, x, vertical(value.low), vertical(value.high), one.style))
            parts.append(mark(round(x, 1), vertical(value.median), one.style, title=said))
    return frame(title, text, parts, legend([(one.name, one.style) for one in series]))


def _whisker(x1: float, x2: float, y1: float, y2: float, style: int) -> Markup:
    return element("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=f"whisker s{style}")


class Cloud(NamedTuple):
    """Points that belong together: what each is, and its two values."""

    name: str
    points: list[tuple[str, float, float]]
    style: int


def scatter_plot(
    title: str, text: str, clouds: Sequence[Cloud], labels: tuple[str, str], unit: str
) -> Markup:
    """Points against points on equal logarithmic scales, with the line of equality."""
    seen = [value for cloud in clouds for _, *both in cloud.points for value in both]
    vertical = logarithmic(seen, HEIGHT - BOTTOM, TOP)
    across = logarithmic(seen, LEFT, WIDTH - RIGHT)
    low, high = across.low, across.high
    parts = [
        left_axis(vertical, labels[1]),
        bottom_axis([(across(value), tick(value)) for value in across.ticks], labels[0]),
        element(
            "line", x1=across(low), y1=vertical(low), x2=across(high), y2=vertical(high),
            class_="compare",
        ),
    ]  # fmt: skip
    for cloud in clouds:
        for name, x, y in cloud.points:
            said = f"{name}: {labels[0]} {number(x)} {unit}, {labels[1]} {number(y)} {unit}"
            parts.append(mark(across(x), vertical(y), cloud.style, title=said))
    return frame(title, text, parts, legend([(one.name, one.style) for one in clouds]))


def bar_plot(
    title: str, text: str, bars: Sequence[Bar], label: str, *, is_log: bool = False
) -> Markup:
    """Bars from left to right, each under its name, whiskers over the spread."""
    low = min(bar.value.low for bar in bars)
    high = max(bar.value.high for bar in bars)
    begin, end = 16, WIDTH - RIGHT
    # On a logarithmic scale lengths mean nothing by themselves: it begins below the lowest.
    across = logarithmic([low / 2, high], begin, end) if is_log else linear([high], begin, end)
    parts = []
    for index, bar in enumerate(bars):
        top = _ABOVE + index * (_BAR + _BAR_GAP)
        x, (median, *ends) = across(bar.value.median), bar.value
        said = f"{bar.name}: {spread(median, ends)}"
        parts += [
            element("text", said, x=begin, y=top + 11),
            element(
                "rect", element("title", said), x=begin, y=top + 17, height=_BAR,
                width=round(max(x - begin, 1), 2), class_=f"mark s{bar.style}",
            ),
            _ends(across(ends[0]), across(ends[1]), top + 17 + _BAR / 2),
        ]  # fmt: skip
    bottom = _ABOVE + len(bars) * (_BAR + _BAR_GAP) + 4
    ticks = [(across(value), tick(value)) for value in across.ticks]
    return frame(title, text, [*parts, _axis_of_bars(ticks, label, bottom)], height=bottom + 36)


def _ends(x1: float, x2: float, y: float) -> Markup:
    return element("line", x1=x1, x2=x2, y1=y, y2=y, class_="ends")


def _axis_of_bars(ticks: Sequence[tuple[float, str]], label: str, y: float) -> Markup:
    parts = [element("line", x1=16, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis")]
    parts += [element("text", text, x=x, y=y + 15, class_="middle") for x, text in ticks]
    parts.append(element("text", label, x=WIDTH / 2, y=y + 30, class_="middle label"))
    return join(parts)


class Stack(NamedTuple):
    """A bar of several parts, laid end to end; parts below zero are not drawn."""

    name: str
    parts: list[tuple[str, float, int]]


def stack_plot(title: str, text: str, stacks: Sequence[Stack], label: str) -> Markup:
    begin, end = 16, WIDTH - RIGHT
    longest = max(sum(max(size, 0) for _, size, _ in stack.parts) for stack in stacks)
    across = linear([longest], begin, end)
    parts = []
    for index, stack in enumerate(stacks):
        top, at = _ABOVE + index * (_BAR + _BAR_GAP), 0.0
        parts.append(element("text", stack.name, x=begin, y=top + 11))
        for name, size, style in stack.parts:
            if size <= 0:
                continue
            x, at = across(at), at + size
            said = element("title", f"{stack.name}, {name}: {number(size)}")
            width = round(max(across(at) - x, 1), 2)
            parts.append(
                element("rect", said, x=x, y=top + 17, width=width, height=_BAR,
                        class_=f"mark s{style}")
            )  # fmt: skip
    bottom = _ABOVE + len(stacks) * (_BAR + _BAR_GAP) + 4
    parts.append(
        _axis_of_bars([(across(value), tick(value)) for value in across.ticks], label, bottom)
    )
    names = dict.fromkeys((name, style) for stack in stacks for name, _, style in stack.parts)
    height = bottom + 40
    return frame(title, text, parts, legend(list(names), top=height), height=height)


class Lane(NamedTuple):
    """What one rank did when: phase, begin, end, style."""

    name: str
    phases: list[tuple[str, float, float, int]]


def timeline_plot(
    title: str,
    text: str,
    lanes: Sequence[Lane],
    bands: Sequence[tuple[float, float]],
    high: float,
    label: str,
) -> Markup:
    """Lanes above each other from 0 to `high`; `bands` are spans of time across all of them."""
    lane_height, gap, top = 26, 16, _ABOVE + 8
    across = linear([high], 16, WIDTH - RIGHT, exact=True)
    bottom = top + len(lanes) * (lane_height + gap)
    parts = []
    for begin, end in bands:
        x = across(begin)
        width = round(max(across(end) - x, 1), 2)
        parts.append(
            element("rect", x=x, y=top - 6, width=width, height=bottom - top, class_="band")
        )
    for index, lane in enumerate(lanes):
        y = top + index * (lane_height + gap)
        parts.append(element("text", lane.name, x=16, y=y + 6))
        for phase, begin, end, style in lane.phases:
            x = across(begin)
            said = element("title", f"{lane.name}, {phase}: {number(end - begin)} µs")
            width = round(max(across(end) - x, 0.7), 2)
            parts.append(
                element("rect", said, x=x, y=y + 10, width=width, height=lane_height - 8,
                        class_=f"mark s{style}")
            )  # fmt: skip
    ticks = [(across(value), tick(value)) for value in across.ticks]
    parts.append(_axis_of_bars(ticks, label, bottom))
    names = dict.fromkeys((phase, style) for lane in lanes for phase, _, _, style in lane.phases)
    height = bottom + 40
    return frame(title, text, parts, legend(list(names), top=height), height=height)
