"""One frame of `onecast top`: a reading of `/live.json` as lines for a terminal.

Owns what stands where, the styles, and which lines give way on a low terminal. Knows neither HTTP
nor when frames are drawn. What is said by colour is said by words or characters too.
"""

import time
from textwrap import wrap

from rich.text import Text

from .flight_words import duration_text, size_text
from .top_section import Section, flow, shrink
from .top_table import Column, Row, fit, plain, table
from .top_timeline import timeline
from .top_view import LiveView
from .top_window import Lately

_LATE_S = 1.0  # a collective that is in flight for so long is marked
_METER = 10
_ASCII = str.maketrans("▁▂▃▄▅▆▇█░▒▓·…▲├─┤▪", "__--==##wwW..![-]#")


def frame(
    view: LiveView, lately: Lately, width: int, height: int | None = None, note: str = ""
) -> list[Text]:
    """Lines of at most `width` cells, and at most `height` of them; `note` stands at the top."""
    health, bad = _health(view, width)
    sections = [
        _hangs(view, width),
        Section("", _header(view, lately, note, width), fixed=99),
        timeline(view, width),
        _ranks(view, width),
        _stragglers(lately, width),
        _latency(view, lately, width),
    ]
    sections.insert(2 if bad else len(sections), health)
    shown = [section for section in sections if section.rows]
    if height is not None:
        shrink(shown, height)
    return [line for section in shown for line in section.lines(width)][:height]


def as_ascii(line: Text, encoding: str) -> Text:
    """The line for an output whose encoding has no blocks."""
    text = line.plain.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return Text(text, spans=line.spans, style=line.style)


def _hangs(view: LiveView, width: int) -> Section:
    rows = []
    for hang in view.hangs:
        for text in wrap(f"▲ {hang.kind.upper()}: {hang.text}", width, subsequent_indent="  "):
            rows.append(fit(Text(plain(text), style="bold white on red"), width))
    return Section("", rows, "lines about hangs", fixed=2)


def _header(view: LiveView, lately: Lately, note: str, width: int) -> list[Text]:
    up, here = sum(rank.up for rank in view.ranks), view.local_world_size
    of = f"{up} of {here}" + (f" here, {view.world_size} in all" if view.world_size > here else "")
    rate = "" if lately.steps_s is None else f" ({lately.steps_s:.3g}/s)"
    span = "since the start" if lately.span_s is None else f"last {lately.span_s:.0f} s"
    dropped = sum(one.count for one in view.health.dropped)
    items = [
        Text(f"ranks up {of}", style="bold red" if up < here else ""),
        Text(f"steps {view.steps.count}{rate}"),
        Text(f"step p50 {_duration(lately.p50_s)}"),
        Text(f"p99 {_duration(lately.p99_s)}"),
        Text(f"exposed communication {_percent(lately.exposed)}"),
        Text(span, style="dim"),
    ]
    if dropped:
        items.append(Text(f"dropped {dropped}", style="bold red"))
    clock = time.strftime("%H:%M:%S", time.localtime(view.now_ms / 1000))
    title = Text.assemble(("onecast top", "bold"), " · ", plain(view.engine_id), " · ", clock)
    lines = [fit(title, width)]
    if note:
        lines.append(fit(Text(plain(note), style="bold yellow"), width))
    return lines + flow(items, width)


def _ranks(view: LiveView, width: int) -> Section:
    columns = [
        Column("rank", right=True),
        Column("step", 2, right=True),
        Column("phase", 1, cut=True),
        Column("in flight", cut=True),
        Column("size", 3, right=True),
        Column("age", right=True),
    ]
    flying: dict[int, list[tuple[str, str, float]]] = {}
    for one in view.in_flight:
        call = f"{one.op} #{one.sequence} ({one.group})"
        flying.setdefault(one.rank, []).append((call, size_text(one.bytes), one.age_s))
    rows = []
    for rank in view.ranks:
        phase = ("-" if rank.phase is None else rank.phase) if rank.up else "has ended"
        step = str(rank.step) if rank.step >= 0 else "-"
        for call, size, age_s in flying.get(rank.rank, [("-", "", -1.0)]):
            late = age_s >= _LATE_S
            age = ("! " if late else "") + duration_text(round(age_s * 1e9)) if age_s >= 0 else ""
            style = "bold red" if late or not rank.up else ""
            rows.append((-age_s, Row([str(rank.rank), step, phase, call, size, age], style)))
    if not rows:
        none = fit(Text("No rank has appeared yet.", style="dim"), width)
        return Section("Ranks now", [none])
    oldest_first = [row for _, row in sorted(rows, key=lambda one: one[0])]
    return Section("Ranks now", table(columns, oldest_first, width), "rows", fixed=2)


def _stragglers(lately: Lately, width: int) -> Section:
    columns = [
        Column("rank", right=True),
        Column("came last", right=True),
        Column("share", right=True),
        Column("", 1),
        Column("mean wait for others", 2, right=True),
    ]
    total = sum(one.last for one in lately.stragglers)
    worst = max(lately.stragglers, key=lambda one: one.last, default=None)
    rows = []
    for one in sorted(lately.stragglers, key=lambda one: (-one.last, one.rank)):
        part = one.last / total if total else None
        fair = 1 / len(lately.stragglers)
        late = one is worst and total >= 20 and (part or 0) > 1.5 * fair
        waited = _duration(one.waited_s / one.joined if one.joined else None)
        meter = "▪" * round((part or 0) * _METER)
        name = f"{'▲ ' if late else ''}{one.rank}"
        style = "bold yellow" if late else ""
        rows.append(Row([name, str(one.last), _percent(part), meter.ljust(_METER), waited], style))
    if not rows:
        none = Text("Nothing joined yet: it takes a collective of two ranks of this host.")
        return Section("Stragglers", [fit(none, width)])
    return Section("Stragglers", table(columns, rows, width), "ranks", fixed=2)


def _latency(view: LiveView, lately: Lately, width: int) -> Section:
    columns = [
        Column("collective", cut=True),
        Column("group", 3, cut=True),
        Column("up to", right=True),
        Column("count", 2, right=True),
        Column("p50", 4, right=True),
        Column("p99", right=True),
        Column("bus", 1, right=True),
    ]
    rows = [
        Row(
            [
                one.op + (" (device)" if one.clock == "device" else ""),
                one.group,
                "more" if one.size == "inf" else one.size,
                str(one.count),
                _duration(one.p50_s),
                _duration(one.p99_s),
                _bandwidth(one.bus_bytes_s),
            ],
            "" if one.count else "dim",
        )
        for one in lately.latency
    ]
    if not rows:
        none = fit(Text("No collective has ended yet.", style="dim"), width)
        return Section("Latency", [none])
    lines = table(columns, rows, width)
    if view.latency_left_out:
        text = f"{view.latency_left_out} more, which took less time, are not listed"
        lines.append(fit(Text(text, style="dim"), width))
    return Section("Latency", lines, "rows", fixed=2)


def _health(view: LiveView, width: int) -> tuple[Section, bool]:
    """And whether something is wrong with it."""
    health = view.health
    bad = [f"{one.count} {one.signal} dropped: {one.reason}" for one in health.dropped]
    bad += [
        f"rank {one.rank}, group {one.group}: {one.count} collectives not recorded"
        for one in health.unrecorded
    ]
    bad += [
        f"rank {one.rank}: {one.op} in {one.group} raised {one.type}, {one.count}x"
        for one in health.errors
    ]
    if health.restarts:
        bad.append(f"the sidecar was started again, {health.restarts}x")
    good = [
        text
        for text, broken in (
            ("nothing dropped", health.dropped),
            ("every collective recorded", health.unrecorded),
            ("none failed", health.errors),
        )
        if not broken
    ]
    rows = [Text(f"! {plain(text)}", style="bold red") for text in bad]
    rows += flow([Text(text, style="green") for text in good], width)
    rows += [
        Text(f"{one.count} collectives not joined: {plain(one.reason)}", style="dim")
        for one in health.unjoined
    ]
    return Section("Telemetry", [fit(row, width) for row in rows], "lines"), bool(bad)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else duration_text(round(seconds * 1e9))


def _bandwidth(bytes_s: float | None) -> str:
    if not bytes_s:
        return "-"
    return f"{bytes_s / 1e9:.3g} GB/s" if bytes_s >= 0.9995e9 else f"{bytes_s / 1e6:.3g} MB/s"


def _percent(part: float | None) -> str:
    if part is None:
        return "-"
    return f"{part:.0%}" if part >= 0.0995 else f"{part:.1%}"
