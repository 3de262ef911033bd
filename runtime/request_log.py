"""When the requests of an engine were queued, first scheduled, and gave their first token.

Owns the times of requests that are under way, and what the observer is told of each. Times and
numbers only: prompts and texts stay with the engine.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from .observer import RequestObserver
from .request import Request
from .step import ScheduledSequence, StepPlan


@dataclass(slots=True)
class _Times:
    """perf_counter_ns; 0: not yet."""

    arrival: int
    first_scheduled: int = 0
    first_token: int = 0


class RequestLog:
    """Tells an observer what becomes of requests; an engine without one has no log.

    A step in which no request begins or ends costs it next to nothing.
    """

    def __init__(self, observer: RequestObserver) -> None:
        self._observer = observer
        self._under_way: dict[Request, _Times] = {}
        self._unscheduled: set[Request] = set()
        self._without_token: set[Request] = set()
        self._scheduled: list[ScheduledSequence] = []  # in the step before, ...
        self._numbers: set[int] = set()  # ... of these requests
        self._changed = True  # were there others in the step before it?

    def admitted(self, request: Request) -> None:
        self._under_way[request] = _Times(time.perf_counter_ns())
        self._unscheduled.add(request)
        self._without_token.add(request)
        trace = request.trace
        if trace is None:
            self._observer.admitted(request.number)
        else:
            self._observer.admitted(request.number, trace.traceparent, trace.tracestate)

    def scheduled(self, plan: StepPlan) -> None:
        """A step begins."""
        self._changed = plan.scheduled != self._scheduled  # entries are equal to themselves only
        if self._changed:
            self._scheduled = plan.scheduled.copy()
            self._numbers = {entry.sequence.request.number for entry in plan.scheduled}
            if self._unscheduled:
                now_ns = time.perf_counter_ns()
                for entry in plan.scheduled:
                    request = entry.sequence.request
                    if request in self._unscheduled:
                        self._unscheduled.remove(request)
                        self._under_way[request].first_scheduled = now_ns
        self._observer.scheduled(plan.step, self._numbers)

    def committed(self, plan: StepPlan) -> None:
        """The step scheduled last is done: tokens have been drawn, sequences may have ended."""
        if self._without_token and self._changed:  # a first token is that of a prefill
            now_ns = time.perf_counter_ns()
            for sequence in plan.samples:
                request = sequence.request
                if request in self._without_token:
                    self._without_token.remove(request)
                    self._under_way[request].first_token = now_ns
        for sequence in [s for s in plan.samples if s.finish_reason is not None]:
            request = sequence.request
            # The last of its choices ends it; several may have ended at once.
            if request in self._under_way and request.finished:
                self._finish(request, _reason(request))

    def aborted(self, request: Request) -> None:
        if request in self._under_way:
            self._finish(request, "abort")

    def failed(self, error: BaseException) -> None:
        """The engine cannot go on: nothing that is under way will end."""
        for request in list(self._under_way):
            self._finish(request, type(error).__name__, error=True)

    def _finish(self, request: Request, reason: str, *, error: bool = False) -> None:
        times = self._under_way.pop(request)
        self._unscheduled.discard(request)
        self._without_token.discard(request)
        self._observer.finished(
            request.number,
            times.arrival,
            times.first_scheduled,
            times.first_token,
            len(request.prompt_token_ids),
            sum(len(sequence.output) for sequence in request.sequences),
            reason,
            error,
        )


def _reason(request: Request) -> str:
    """Why its choices ended; where they differ, all the reasons."""
    reasons: Iterable[str] = {sequence.finish_reason or "" for sequence in request.sequences}
    return "+".join(sorted(reasons))
