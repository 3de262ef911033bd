"""What happened lately: the difference of two readings of what only ever grows.

Owns how long "lately" is, and that numbers are since the start until there are two readings. Knows
nothing of how they are shown.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .histograms import DURATIONS
from .top_view import LiveView, Straggler

SPAN_S = 30.0


@dataclass(frozen=True, slots=True)
class LatelyLatency:
    op: str
    group: str
    size: str
    clock: str
    count: int
    p50_s: float | None
    p99_s: float | None
    bus_bytes_s: float | None  # bytes on the bus a second of transfer


@dataclass(frozen=True, slots=True)
class Lately:
    """`span_s` None: all but the rate is since the start."""

    span_s: float | None
    steps_s: float | None
    p50_s: float | None
    p99_s: float | None
    exposed: float | None  # part of the steps' time
    latency: list[LatelyLatency]  # what took the most time first, what did not happen last
    stragglers: list[Straggler]


class Window:
    """The readings of the last `SPAN_S` seconds of one run."""

    def __init__(self) -> None:
        self._views: deque[LiveView] = deque()

    def add(self, view: LiveView) -> None:
        if self._views:
            latest = self._views[-1]
            if latest.engine_id != view.engine_id or latest.steps.count > view.steps.count:
                self._views.clear()  # another run, or a sidecar that counts anew
            elif view.now_ms <= latest.now_ms:
                self._views.pop()  # the same answer, or a clock that was set
        self._views.append(view)
        while len(self._views) > 2 and _seconds(self._views[1], view) >= SPAN_S:
            self._views.popleft()

    @property
    def view(self) -> LiveView:
        """The latest reading."""
        return self._views[-1]

    def lately(self, *, whole: bool = False) -> Lately:
        """Needs a reading. `whole`: of the whole run, but for the rate."""
        base, view = self._views[0], self._views[-1]
        if base is view:
            return _since_the_start(view)
        found = _between(base, view)
        return replace(_since_the_start(view), steps_s=found.steps_s) if whole else found


def _seconds(base: LiveView, view: LiveView) -> float:
    return (view.now_ms - base.now_ms) / 1000


def _since_the_start(view: LiveView) -> Lately:
    rows = [
        LatelyLatency(
            *row.key, row.count, row.p50_s, row.p99_s, _rate(row.bus_bytes, row.transfer_s)
        )
        for row in view.latency
    ]
    steps = view.steps
    exposed = _rate(steps.exposed_s, steps.seconds)
    return Lately(None, None, steps.p50_s, steps.p99_s, exposed, rows, view.stragglers)


def _between(base: LiveView, view: LiveView) -> Lately:
    span_s = _seconds(base, view)
    steps = _counts_between(base.steps.hist, view.steps.hist)
    known = {row.key: row for row in base.latency}
    rows = []
    for row in view.latency:
        before = known.get(row.key)
        count = row.count - (before.count if before else 0)
        p50_s, p99_s = row.p50_s, row.p99_s  # of long ago, where there are no buckets
        if row.hist is not None and not (before and before.hist is None):
            counts = _counts_between(before.hist if before and before.hist else [0], row.hist)
            p50_s, p99_s = _quantile(counts, 0.5), _quantile(counts, 0.99)
        bus = row.bus_bytes - (before.bus_bytes if before else 0)
        transfer_s = row.transfer_s - (before.transfer_s if before else 0.0)
        rows.append(LatelyLatency(*row.key, max(0, count), p50_s, p99_s, _rate(bus, transfer_s)))
    return Lately(
        span_s,
        (view.steps.count - base.steps.count) / span_s,
        _quantile(steps, 0.5),
        _quantile(steps, 0.99),
        _rate(view.steps.exposed_s - base.steps.exposed_s, view.steps.seconds - base.steps.seconds),
        sorted(rows, key=lambda row: row.count == 0),
        _stragglers_between(base.stragglers, view.stragglers),
    )


def _rate(amount: float, per: float) -> float | None:
    return amount / per if amount >= 0 and per > 0 else None


def _stragglers_between(base: Sequence[Straggler], rows: Sequence[Straggler]) -> list[Straggler]:
    known = {row.rank: row for row in base}
    nothing = Straggler(0, 0, 0, 0.0)
    found = []
    for row in rows:
        before = known.get(row.rank, nothing)
        found.append(
            Straggler(
                row.rank,
                max(0, row.joined - before.joined),
                max(0, row.last - before.last),
                max(0.0, row.waited_s - before.waited_s),
            )
        )
    return found


def _counts_between(before: Sequence[int], now: Sequence[int]) -> dict[int, int]:
    """By bucket: each is [number of the first bucket, counts...], as `live` has them."""
    counts = dict(enumerate(now[1:], now[0] if now else 0))
    for bucket, count in enumerate(before[1:], before[0] if before else 0):
        counts[bucket] = counts.get(bucket, 0) - count
    return {bucket: count for bucket, count in counts.items() if count > 0}


def _quantile(counts: Mapping[int, int], fraction: float) -> float | None:
    """As `histograms.merged_quantile`, in seconds."""
    target = max(1.0, fraction * sum(counts.values()))
    passed = 0
    edges = DURATIONS.edges
    for bucket in sorted(counts):
        passed += counts[bucket]
        if passed >= target:
            upper = float(edges[max(0, min(bucket, len(edges) - 1))])
            lower = float(edges[bucket - 1]) if 0 < bucket < len(edges) else upper
            return float((lower * upper) ** 0.5 * DURATIONS.unit)
    return None
