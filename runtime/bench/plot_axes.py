"""The frame of a plot: scales, ticks, axes, the legend, and the SVG around it all.

Owns a coordinate system of 360 by 240, small enough to be read on a telephone as it is. Colours are
classes (`s0` to `s7`), for light and dark; every series has a mark of its own shape, too,
so that nothing rests on colour alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .markup import Markup, element, join, number

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 40, 24, 24, 36
_LEGEND_LINE = 16


class Scale(NamedTuple):
    """From values to places along an axis; `ticks` are values."""

    low: float
    high: float
    begin: float
    end: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._of(one) for one in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.begin + share * (self.end - self.begin), 2)

    def _of(self, value: float) -> float:
        return math.log(max(value, self.low)) if self.is_log else value


def linear(values: Sequence[float], begin: float, end: float, exact: bool = False) -> Scale:
    """From 0, with ticks at round numbers; to one of those, or exactly to the highest value."""
    high = max(max(values), 0.0) or 1.0
    step = _round_step(high / 4)
    last = math.floor(high / step) if exact else math.ceil(high / step * 0.999)
    ticks = tuple(round(n * step, 12) for n in range(last + 1))
    return Scale(0.0, high if exact else ticks[-1], begin, end, ticks)


def _round_step(size: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(size))
    return power * next(digit for digit in (1, 2, 2.5, 5, 10) if digit * power >= size * 0.999)


def logarithmic(values: Sequence[float], begin: float, end: float) -> Scale:
    """With ticks at powers of ten, and between them where there are few."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    below = max((tick for tick in ticks if tick <= low * 1.001), default=ticks[0])
    above = min((tick for tick in ticks if tick >= high * 0.999), default=ticks[-1])
    if below == above:
        above = below * 10
    shown = tuple(tick for tick in ticks if below <= tick <= above)
    return Scale(below, above, begin, end, shown, is_log=True)


def places(count: int, begin: float = LEFT, end: float = WIDTH - RIGHT) -> list[float]:
    """Of so many things side by side, their middles."""
    size = (end - begin) / count
    return [round(begin + (n + 0.5) * size, 2) for n in range(count)]


def frame(
    title: str, text: str, parts: Sequence[Markup], legend: Markup | None = None, height: int = 0
) -> Markup:
    """The whole plot, with its name and what it shows in words for who does not see it."""
    height = height or HEIGHT
    if legend is not None:
        height += _LEGEND_LINE * -(-legend.count('class="entry"') // 2) + 6
    return element(
        "svg", element("title", title), element("desc", text), *parts, legend,
        viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=f"{title}. {text}",
    )  # fmt: skip


def tick(value: float) -> str:
    """A round number, short enough to stand beside an axis."""
    return f"{value / 1000:,.0f}k" if value >= 10_000 else number(value)


def left_axis(scale: Scale, label: str, show: Callable[[float], str] = number) -> Markup:
    show = tick if show is number else show
    parts = []
    for value in scale.ticks:
        y = scale(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", show(value), x=LEFT - 5, y=y + 4, class_="end"))
    parts.append(element("text", label, x=2, y=11, class_="label"))
    return join(parts)


def bottom_axis(ticks: Sequence[tuple[float, str]], label: str, y: float = 0) -> Markup:
    """`ticks`: places and what stands there."""
    y = y or HEIGHT - BOTTOM
    parts = [element("text", text, x=x, y=y + 15, class_="middle") for x, text in ticks]
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis"))
    parts.append(
        element("text", label, x=(LEFT + WIDTH - RIGHT) / 2, y=y + 30, class_="middle label")
    )
    return join(parts)


def legend(names: Sequence[tuple[str, int]], top: int = HEIGHT + 4) -> Markup:
    """Two in a line: the mark of a series, its name."""
    entries = []
    for index, (name, series) in enumerate(names):
        x, y = 16 + index % 2 * (WIDTH // 2), top + index // 2 * _LEGEND_LINE
        shown = (mark(x, y + 6, series, "key"), element("text", name, x=x + 11, y=y + 10))
        entries.append(element("g", *shown, class_="entry"))
    return join(entries)


def mark(x: float, y: float, series: int, kind: str = "mark", title: str | None = None) -> Markup:
    """A point of a series, in its colour and shape."""
    shapes = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        "M-3.6 -3.6h7.2v7.2h-7.2z",
        "M0 -4.8L4.6 3.4H-4.6z",
        "M0 -5L5 0L0 5L-5 0z",
        "M0 4.8L4.6 -3.4H-4.6z",
        "M-4.5 -1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    )
    return element(
        "path", None if title is None else element("title", title),
        d=shapes[series % len(shapes)], transform=f"translate({x} {y})", class_=f"{kind} s{series}",
    )  # fmt: skip
