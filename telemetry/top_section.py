"""A section of a frame: a title and rows, and how it gives way on a low terminal.

Owns which rows go when there is no room, and that it is said how many. Knows nothing of what the
rows are.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.text import Text

from .top_table import fit


@dataclass(slots=True)
class Section:
    """`fixed`: so many rows at the top stay; `more`: what the rows are, where some are left out;
    `weight`: of those that are as long, the lighter gives way."""

    title: str
    rows: list[Text]
    more: str = ""
    fixed: int = 1
    weight: int = 1
    left_out: int = 0
    apart: bool = True  # from the one before, by an empty line

    def lines(self, width: int) -> list[Text]:
        lines = [Text()] if self.title and self.apart else []
        if self.title:
            lines.append(fit(Text(self.title, style="bold"), width))
        lines += self.rows[: len(self.rows) - self.left_out]
        if self.left_out:
            lines.append(fit(Text(f"… {self.left_out} more {self.more}", style="dim"), width))
        return lines

    @property
    def height(self) -> int:
        above = 1 + self.apart if self.title else 0
        return above + len(self.rows) - self.left_out + bool(self.left_out)

    @property
    def spare(self) -> int:
        """How many rows may still go."""
        return max(0, len(self.rows) - self.left_out - self.fixed)


def shrink(sections: list[Section], height: int) -> None:
    """Take empty lines first, then rows from the longest, then whole sections from the end."""

    def excess() -> int:
        return sum(section.height for section in sections) - height

    for section in sections:
        section.apart = excess() <= 0
    while excess() > 0:
        # Of two rows that go, one line says so.
        giving = [one for one in sections if one.spare >= (1 if one.left_out else 2)]
        if giving:
            longest = max(giving, key=lambda one: one.spare / one.weight)
            longest.left_out += 1 if longest.left_out else 2
        elif len(sections) > 2:
            del sections[-1]
        else:
            return


def flow(items: Iterable[Text], width: int) -> list[Text]:
    """Items one after the other, in as many lines as they need."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 3 + item.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", item)
        else:
            lines.append(item)
    return [fit(line, width) for line in lines]
