"""When the requests of an engine were queued, first scheduled, and gave their first token.

Owns the times of requests that are under way, and what the observer is told of each. Times and
numbers only: prompts and texts stay with the engine.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from .observer import RequestObserver
from .request import Request
from .step import StepPlan


@dataclass(slots=True)
class _Times:
    """perf_counter_ns; 0: not yet."""

    arrival: int
    first_scheduled: int = 0
    first_token: int = 0


class RequestLog:
    """Tells an observer what becomes of requests; an engine without one has no log."""

    def __init__(self, observer: RequestObserver) -> None:
        self._observer = observer
        self._under_way: dict[Request, _Times] = {}

    def admitted(self, request: Request) -> None:
        self._under_way[request] = _Times(time.perf_counter_ns())
        trace = request.trace
        if trace is None:
            self._observer.admitted(request.number)
        else:
            self._observer.admitted(request.number, trace.traceparent, trace.tracestate)

    def scheduled(self, plan: StepPlan) -> None:
        """A step begins."""
        requests = {entry.sequence.request for entry in plan.scheduled}
        now_ns = time.perf_counter_ns()
        for request in requests:
            times = self._under_way[request]
            if not times.first_scheduled:
                times.first_scheduled = now_ns
        self._observer.scheduled(plan.step, {request.number for request in requests})

    def committed(self, plan: StepPlan) -> None:
        """A step is done: tokens have been drawn, sequences may have ended."""
        now_ns = time.perf_counter_ns()
        for request in {sequence.request for sequence in plan.samples}:
            times = self._under_way.get(request)
            if times is None:
                continue  # aborted meanwhile
            if not times.first_token:
                times.first_token = now_ns
            if request.finished:
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
