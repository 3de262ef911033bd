"""A situation and what came of it, as the Markdown table that the guide shows."""

from collections.abc import Sequence

from .situation import Outcome, Shown, Situation


def table(situation: Situation, outcomes: Sequence[Outcome]) -> str:
    """One column a case: its setting, what Prometheus answered, its spans."""
    rows = [["", *(outcome.case.setting for outcome in outcomes)]]
    rows.append([f"alert `{situation.alert}`", *map(_alert, outcomes)])
    for number, asked in enumerate(situation.asked):
        values = (number_with_unit(outcome.values[number], asked.unit) for outcome in outcomes)
        rows.append([asked.what, *values])
    for shown in situation.shown:
        rank = "" if shown.rank is None else f" of rank {shown.rank}"
        how = "longest" if shown.longest else "median"
        durations = (_duration_s(outcome, shown) for outcome in outcomes)
        rows.append(
            [f"span `{shown.name}`{rank}, {how}", *(number_with_unit(d, "s") for d in durations)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, _line(["-" * width for width in widths], widths))
    said = [
        f"{outcome.case.name}: {line}" for outcome in outcomes for line in _said(situation, outcome)
    ]
    return "\n".join([*lines, "", *said, f"Knob: {situation.knob}."])


def _alert(outcome: Outcome) -> str:
    if outcome.alert is None:
        return "-"
    state, seconds = outcome.alert
    return f"{state}, {number_with_unit(seconds, 's')}"


def _duration_s(outcome: Outcome, shown: Shown) -> float | None:
    spans = outcome.spans
    return (spans.longest_s if shown.longest else spans.median_s)(shown.name, shown.rank)


def _said(situation: Situation, outcome: Outcome) -> list[str]:
    if situation.says is None:
        return []
    return [line.strip() for line in outcome.ended.output.splitlines() if situation.says in line]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"


def number_with_unit(value: float | None, unit: str) -> str:
    """Three digits; seconds as s, ms or us, shares as percentages. `-` for what is not there."""
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.2%}" if 0 < value < 0.01 else f"{value:.1%}"
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e3, "ms")):
            if value * scale >= 1:
                return f"{value * scale:.3g} {name}"
        return f"{value * 1e6:.3g} us"
    if unit == "B" and value >= 10_000:
        return f"{value / 1000:.3g} kB"
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{text} {unit}" if unit == "B" else f"{text}{unit}"
