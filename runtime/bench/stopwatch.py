"""Where the time of the driver's steps goes, seen from outside the engine.

Owns the parts of an engine that tell a stopwatch how long each call took. Knows nothing of what
they do, nor of when a step begins: whoever runs the steps asks what the last one took.

    part       what                                     in
    schedule   the plan                                 Scheduler.schedule
    build      its arrays, and tokens filled in later   InputBuilder.build, fill
    publish    the frame is on its way                  Channel.publish
    forward    block moves and the model                StepExecutor.execute
    sample     tokens are drawn                         Sampler.sample
    commit     sequences have them                      Scheduler.advance, commit, prune
    texts      texts grow, stop strings are looked for  Engine
    critical   what is done before the others can begin its phases "schedule" and "step.publish"
"""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from onecast.runtime.observer import NullObserver, Observer

PARTS = ("schedule", "build", "publish", "forward", "sample", "commit", "texts")
CRITICAL = "critical"

_CRITICAL_PHASES = ("schedule", "step.publish")


class Stopwatch:
    """Nanoseconds by part since they were last taken. For one thread."""

    def __init__(self) -> None:
        self.observer: Observer = _Phases(self)
        self._ns = dict.fromkeys((*PARTS, CRITICAL), 0)

    def time(self, part: str, owner: object, *methods: str) -> None:
        """From now on calls of these methods are timed, those of this one object alone."""
        for method in methods:
            setattr(owner, method, self._timed(getattr(owner, method), part))

    def take(self) -> dict[str, int]:
        """What has come together since the last call."""
        taken = self._ns.copy()
        self._ns.update(dict.fromkeys(taken, 0))
        return taken

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        clock, total = time.perf_counter_ns, self._ns

        @functools.wraps(call)
        def timed(*args: Any) -> Any:
            begin = clock()
            try:
                return call(*args)
            finally:
                total[part] += clock() - begin

        return timed

    def add_critical(self, ns: int) -> None:
        self._ns[CRITICAL] += ns


class _Phases(NullObserver):
    """Hands the phases that other ranks wait for to a stopwatch."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._critical = {name: _Phase(stopwatch) for name in _CRITICAL_PHASES}

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return self._critical.get(name, self._nothing)


class _Phase:
    """One phase, again and again."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._begin_ns = 0

    def __enter__(self) -> None:
        self._begin_ns = time.perf_counter_ns()

    def __exit__(self, *exception: object) -> None:
        self._stopwatch.add_critical(time.perf_counter_ns() - self._begin_ns)
