"""Which steps become traces: whole steps, decided when they are over.

Owns the reasons. Knows nothing of spans. A step is kept by the first of these that holds:

    error      a collective or the step itself raised
    hang       it was given up while a collective was in flight
    slow       it took longer than 99% of the last steps did, once 100 are known
    skew       a rank waited longer than trace_skew_s for the last one to call a collective
    one_in_n   its number is a multiple of trace_one_in, on all nodes alike
    all        trace_one_in is 1

Where all three settings are off (trace_one_in 0, trace_slow false, trace_skew_s 0), none is kept.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from .arrivals import Arrivals
from .kept_step import arrivals_in
from .ring import AUX, BEGIN, COLLECTIVE, END, ERROR, META, OK, STEP_KIND
from .settings import TelemetrySettings
from .steps import JoinedStep

_WINDOW = 1000  # steps that the quantile is of
_FEWEST = 100
_QUANTILE = 0.99


class TailSampler:
    """Ask it about every step, in order: it learns from those that it does not keep, too."""

    def __init__(self, settings: TelemetrySettings) -> None:
        self._one_in = settings.trace_one_in
        self._slow = settings.trace_slow
        self._skew_ns = round(settings.trace_skew_s * 1e9)
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    @property
    def enabled(self) -> bool:
        return bool(self._one_in or self._slow or self._skew_ns)

    def decide(
        self,
        joined: JoinedStep,
        names_by_rank: Mapping[int, Sequence[str]],
        arrivals: Mapping[int, Arrivals] | None = None,
    ) -> str | None:
        """The reason for which the step is kept, or None. `arrivals`: if they are known already."""
        if not self.enabled:
            return None
        slow = self._slow and self._is_slow(joined)
        if _failed(joined):
            return "error"
        if _hung(joined):
            return "hang"
        if slow:
            return "slow"
        if self._skew_ns:
            if arrivals is None:
                (arrivals,) = arrivals_in([joined], names_by_rank)
            if max(_longest(found) for found in arrivals.values()) > self._skew_ns:
                return "skew"
        if self._one_in and joined.step % self._one_in == 0:
            return "all" if self._one_in == 1 else "one_in_n"
        return None

    def _is_slow(self, joined: JoinedStep) -> bool:
        """Compares with the steps before, and remembers this one."""
        duration = _duration(joined)
        if duration is None:
            return False
        known = len(self._sorted)
        slow = known >= _FEWEST and duration > self._sorted[int(known * _QUANTILE)]
        insort(self._sorted, duration)
        self._recent.append(duration)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        return slow


def _duration(joined: JoinedStep) -> int | None:
    """Of the rank that took the least: one that had to wait for work was not slow."""
    found = []
    for rows in joined.rows.values():
        steps = rows[((rows[:, META] & 0xF) == STEP_KIND) & ((rows[:, AUX] & 0xFF) == OK)]
        if len(steps):
            found.append(int(steps[0, END] - steps[0, BEGIN]))
    return min(found, default=None)


def _failed(joined: JoinedStep) -> bool:
    for rows in joined.rows.values():
        failed = rows[(rows[:, AUX] & 0xFF) == ERROR, META] & 0xF
        if np.any((failed == COLLECTIVE) | (failed == STEP_KIND)):
            return True
    return False


def _hung(joined: JoinedStep) -> bool:
    return any(np.any(rows[:, META] & 0xF == COLLECTIVE) for rows in joined.unfinished.values())


def _longest(arrivals: Arrivals) -> int:
    return int(arrivals.wait_ns.max(initial=-1))
