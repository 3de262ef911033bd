"""Which steps become traces: whole steps, decided when they are over.

Owns the reasons. Knows nothing of spans. A step is kept by the first of these that holds:

    error      a collective or the step itself raised
    hang       it was given up while a collective was in flight, or a rank waited longer than hang_s
               for the last one to call a collective
    slow       it took longer than 99% of the last steps did, once 100 are known
    skew       a rank waited longer than trace_skew_s for the last one to call a collective
    one_in_n   its number is a multiple of trace_one_in, on all nodes alike
    all        trace_one_in is 1

Where all three settings are off (trace_one_in 0, trace_slow false, trace_skew_s 0), none is kept.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence

from .settings import TelemetrySettings
from .step_facts import StepFacts, step_facts
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
        self._hang_ns = round(settings.hang_s * 1e9)
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    @property
    def enabled(self) -> bool:
        return bool(self._one_in or self._slow or self._skew_ns)

    def decide(
        self,
        joined: JoinedStep,
        names_by_rank: Mapping[int, Sequence[str]],
        facts: StepFacts | None = None,
    ) -> str | None:
        """The reason for which the step is kept, or None. `facts`: if they are known already."""
        if not self.enabled:
            return None
        if facts is None:
            (facts,) = step_facts([joined], names_by_rank)
        slow = self._slow and self._is_slow(facts.duration_ns)
        if facts.failed:
            return "error"
        if facts.hung or 0 < self._hang_ns < facts.longest_wait_ns:
            return "hang"
        if slow:
            return "slow"
        if self._skew_ns and facts.longest_wait_ns > self._skew_ns:
            return "skew"
        if self._one_in and joined.step % self._one_in == 0:
            return "all" if self._one_in == 1 else "one_in_n"
        return None

    def _is_slow(self, duration: int | None) -> bool:
        """Compares with the steps before, and remembers this one.

        A step takes as long as the rank that took the least: one that had to wait for work makes
        none slow.
        """
        if duration is None:
            return False
        known = len(self._sorted)
        slow = known >= _FEWEST and duration > self._sorted[int(known * _QUANTILE)]
        insort(self._sorted, duration)
        self._recent.append(duration)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        return slow
